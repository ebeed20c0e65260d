"""GPTQ checkpoints: read back, by the published formula, and by GPTQModel where it is installed."""

import doctest
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import smidgen.quant.export.gptq
from smidgen.errors import UserError
from smidgen.grid import Grid
from smidgen.quant.blocks import decoder_list
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export.gptq import Gptq, packed, read, unpacked
from smidgen.quant.linear import LINEAR
from smidgen.quant.solvers import RTN

CPU = torch.device("cpu")


def layers_of(model) -> list[str]:
    path, blocks = decoder_list(model)
    return [f"{path}.{i}.{n}" for i, block in enumerate(blocks) for n, m in block.named_modules() if isinstance(m, LINEAR)]


def written(source: Path, grid: Grid, folder: Path) -> dict:
    """Writes the model rounded to nearest, block by block, and returns its layers."""
    checkpoint = Checkpoint(source, "tiny")
    skeleton = checkpoint.skeleton(CPU)
    path, blocks = decoder_list(skeleton)
    names = layers_of(skeleton)
    values = checkpoint.read(f"{n}.weight" for n in names)
    weights = {n: RTN()(values[f"{n}.weight"], None, grid) for n in names}
    Gptq.check(skeleton, names, grid)
    folder.mkdir()
    exporter = Gptq(folder, checkpoint, skeleton)
    for i, block in enumerate(blocks):
        exporter.add({n: q for n, q in weights.items() if n.startswith(f"{path}.{i}.")}, block, f"{path}.{i}")
    exporter.finish()
    return weights


def by_formula(tensors: dict, layer: str, bits: int) -> torch.Tensor:
    """(in, out) weights: s[g] * (q - z[g]), each integer found by its own shift in the words of the layout, as Python integers."""

    def bit_stream(words: list[int]) -> int:
        return sum((word % 2**32) << 32 * i for i, word in enumerate(words))

    qweight, qzeros, scales, g_idx = (tensors[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    columns, rows = len(g_idx), scales.shape[1]
    q, z = torch.empty(columns, rows), torch.empty(len(scales), rows)
    for o in range(rows):
        stream = bit_stream(qweight[:, o].tolist())
        q[:, o] = torch.tensor([stream >> bits * j & 2**bits - 1 for j in range(columns)])
    for g in range(len(scales)):
        stream = bit_stream(qzeros[g].tolist())
        z[g] = torch.tensor([stream >> bits * o & 2**bits - 1 for o in range(rows)])
    return scales.float()[g_idx] * (q - z[g_idx])


def test_examples_in_docstrings_are_right():
    tests = [t for t in doctest.DocTestFinder().find(smidgen.quant.export.gptq) if t.examples]
    assert [t.name for t in tests] == ["smidgen.quant.export.gptq"]
    assert all(doctest.DocTestRunner().run(t).failed == 0 for t in tests)


def test_the_drawn_layout_at_3_bits():
    def words(column: int) -> list[int]:
        w = torch.zeros(32, 32)
        w[0, column] = 1
        q = RTN()(w, None, Grid(3, scale_dtype="float16"))  # zero 0, so code 7 in that column and 0 elsewhere
        return [word % 2**32 for word in packed(q)["qweight"][:, 0].tolist()]

    assert words(0) == [0b111, 0, 0] and words(9) == [0b111 << 27, 0, 0]
    assert words(10) == [0b11 << 30, 0b1, 0] and words(11) == [0, 0b111 << 1, 0]
    assert words(20) == [0, 0b111 << 28, 0] and words(21) == [0, 0b1 << 31, 0b11]
    assert words(22) == [0, 0, 0b111 << 2] and words(31) == [0, 0, 0b111 << 29]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_was_solved_is_what_is_read(tiny_llama, tmp_path, bits, group, symmetric):
    grid = Grid(bits, group, symmetric, "float16")
    weights = written(tiny_llama, grid, tmp_path / "gptq")
    found = read(tmp_path / "gptq")
    assert found.keys() == weights.keys() and len(found) == 14
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    for name, q in weights.items():
        assert found[name].grid == grid
        assert torch.equal(found[name].codes, q.codes)
        assert torch.equal(found[name].scale, q.scale) and torch.equal(found[name].zero, q.zero)
        torch.testing.assert_close(by_formula(tensors, name, bits).T, grid.decode(q.codes.float(), *q.expanded()), rtol=0, atol=0)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, group or -1, symmetric)
    assert (config["quant_method"], config["checkpoint_format"], config["desc_act"]) == ("gptq", "gptq_v2", False)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_opt", "tiny_qwen3"])
def test_the_rest_of_the_model_travels_with_it(family, request, tmp_path):
    source = request.getfixturevalue(family)
    weights = written(source, Grid(4, 32, scale_dtype="float16"), tmp_path / "gptq")
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = {n for n in model.state_dict() if n not in model.all_tied_weights_keys}
    parts = {f"{n}.{part}" for n in weights for part in ("qweight", "qzeros", "scales", "g_idx")}
    assert tensors.keys() == (expected - {f"{n}.weight" for n in weights}) | parts
    for name in tensors.keys() - parts:
        assert torch.equal(tensors[name].float(), model.state_dict()[name].to(tensors[name].dtype).float())
    text = "a text"
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "gptq")(text)["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(source)(text)["input_ids"]
    )


def test_two_shards_are_read_back(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("smidgen.quant.shards.SHARD", 10_000)
    weights = written(tiny_llama, Grid(4, 32, scale_dtype="float16"), tmp_path / "gptq")
    assert len(list((tmp_path / "gptq").glob("*.safetensors"))) == 3
    found = read(tmp_path / "gptq")
    assert all(torch.equal(found[n].codes, q.codes) for n, q in weights.items())


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
def test_gptqmodel_reads_the_same_weights_and_computes_the_same_logits(tiny_llama, test_tokens, tmp_path):
    grids = [Grid(*grid, "float16") for grid in ((2, 32, False), (3, 32, False), (4, None, True), (4, 32, False), (8, 32, True))]
    layers = [written(tiny_llama, grid, tmp_path / f"gptq-{i}") for i, grid in enumerate(grids)]
    torch.save(test_tokens[:10], tmp_path / "tokens.pt")
    script = """
import torch
from gptqmodel import BACKEND, GPTQModel
for i in range(5):
    model = GPTQModel.load(f"gptq-{i}", backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "TorchLinear"}
    with torch.inference_mode():
        logits = model(torch.load("tokens.pt")).logits.float()
        torch.save((logits, {n: m.dequantize_weight().float() for n, m in layers.items()}), f"found-{i}.pt")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for i, weights in enumerate(layers):
        logits, theirs = torch.load(tmp_path / f"found-{i}.pt")
        assert theirs.keys() == weights.keys()
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, q in weights.items():
                torch.testing.assert_close(theirs[name].T, q.dequantize(), rtol=0, atol=0)
                model.get_submodule(name).weight.copy_(q.dequantize())
            expected = model(test_tokens[:10]).logits
        assert logits[..., 0].numel() >= 512
        assert (logits - expected).abs().max() < 0.05  # float16 against float32
        assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.99


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def check(tiny_llama):
    """(grid) -> the line with which the format refuses it for the tiny Llama."""

    def refuse(grid: Grid) -> str:
        skeleton = Checkpoint(tiny_llama, "tiny").skeleton(CPU)
        with pytest.raises(UserError) as refusal:
            Gptq.check(skeleton, layers_of(skeleton), grid)
        return str(refusal.value)

    return refuse


@pytest.mark.parametrize("bits, nearest", [(5, 4), (6, 8), (7, 8)])
def test_other_widths_are_refused_with_the_nearest(check, bits, nearest):
    assert check(Grid(bits, scale_dtype="float16")).endswith(f"not {bits}; use --bits {nearest}")


def test_other_groups_and_scales_are_refused_with_the_nearest(check):
    assert check(Grid(4, 8, scale_dtype="float16")).endswith("not 8; use --group 16")
    assert check(Grid(4, 4096, scale_dtype="float16")).endswith("not 4096; use --group 64")
    assert "does not divide a row of 64" in check(Grid(4, 128, scale_dtype="float16"))
    assert check(Grid(4)).endswith("use --scale-dtype float16")


def test_layers_the_format_cannot_hold(tiny_gpt2, tokenizer, tmp_path):
    skeleton = Checkpoint(tiny_gpt2, "tiny").skeleton(CPU)
    with pytest.raises(UserError, match="is a Conv1D; use --export none"):
        Gptq.check(skeleton, layers_of(skeleton), Grid(4, scale_dtype="float16"))
    config = transformers.LlamaConfig(vocab_size=384, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    narrow = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"multiples of 32, .*q_proj is 48 x 48; use --export compressed-tensors"):
        Gptq.check(narrow, layers_of(narrow), Grid(4, scale_dtype="float16"))


def test_a_layer_left_out_is_refused(tiny_llama):
    skeleton = Checkpoint(tiny_llama, "tiny").skeleton(CPU)
    with pytest.raises(UserError, match="model.layers.0.self_attn.q_proj would be left"):
        Gptq.check(skeleton, layers_of(skeleton)[1:], Grid(4, scale_dtype="float16"))


def test_a_second_grid_and_scales_beyond_float16_are_refused(tiny_llama, tmp_path):
    checkpoint = Checkpoint(tiny_llama, "tiny")
    skeleton = checkpoint.skeleton(CPU)
    names = layers_of(skeleton)
    values = checkpoint.read(f"{n}.weight" for n in names)
    exporter = Gptq(tmp_path, checkpoint, skeleton)
    mixed = {n: RTN()(values[f"{n}.weight"], None, Grid(3 + i % 2, scale_dtype="float16")) for i, n in enumerate(names)}
    with pytest.raises(UserError, match="leave out --target-bpw"):
        exporter.add(mixed, skeleton.model.layers[0], "model.layers.0")
    small = RTN()(values[f"{names[0]}.weight"] * 1e-7, None, Grid(4, scale_dtype="bfloat16"))
    with pytest.raises(UserError, match=f"{names[0]}: scales .* use --scale-dtype float16"):
        Gptq(tmp_path, checkpoint, skeleton).add({names[0]: small}, skeleton.model.layers[0], "model.layers.0")
    assert not list(tmp_path.iterdir())


def test_scales_of_a_bfloat16_model_are_kept(normal):
    q = RTN()(normal(32, 64).float(), None, Grid(4, 32, scale_dtype="bfloat16"))
    assert torch.equal(unpacked(packed(q), Grid(4, 32, scale_dtype="float16")).scale, q.scale)


def test_a_missing_tokenizer_is_refused_before_any_work(tiny_llama, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        shutil.copy(tiny_llama / file, tmp_path / "bare")
    checkpoint = Checkpoint(tmp_path / "bare", "bare")
    with pytest.raises(UserError, match="no usable tokenizer"):
        Gptq(tmp_path / "gptq", checkpoint, checkpoint.skeleton(CPU))


@pytest.fixture
def damaged(tiny_llama, tmp_path):
    """(changes) -> the line with which `read` refuses a checkpoint after `changes(folder, config, tensors)`."""

    def refuse(changes) -> str:
        folder = tmp_path / "gptq"
        shutil.rmtree(folder, ignore_errors=True)
        written(tiny_llama, Grid(4, 32, True, "float16"), folder)
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        before = dict(tensors)
        changes(folder, config["quantization_config"], tensors)
        if (folder / "config.json").is_file():
            (folder / "config.json").write_text(json.dumps(config))
        if tensors.keys() != before.keys() or any(tensors[n] is not t for n, t in before.items()):
            save_file(tensors, folder / "model.safetensors")
        with pytest.raises(UserError) as refusal:
            read(folder)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    return refuse


def test_foreign_folders_are_refused(damaged, tiny_llama, tmp_path):
    assert "is not a gptq checkpoint: its quant_method is awq" in damaged(lambda f, c, t: c.update(quant_method="awq"))
    assert "checkpoint_format is gptq; only gptq_v2" in damaged(lambda f, c, t: c.update(checkpoint_format="gptq"))
    assert "act-order" in damaged(lambda f, c, t: c.update(desc_act=True))
    assert "bits 5" in damaged(lambda f, c, t: c.update(bits=5))
    assert "no config.json" in damaged(lambda f, c, t: (f / "config.json").unlink())
    with pytest.raises(UserError, match="its quant_method is not given"):
        read(tiny_llama)
    with pytest.raises(UserError, match="no config.json"):
        read(tmp_path / "nowhere")


def test_damaged_weights_are_refused(damaged):
    layer = "model.layers.1.mlp.up_proj"
    truncated = damaged(lambda f, c, t: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]))
    assert "model.safetensors is not a readable safetensors file" in truncated
    assert f"the weights lack {layer}.qzeros" in damaged(lambda f, c, t: t.pop(f"{layer}.qzeros"))
    assert f"{layer}: qweight should be" in damaged(lambda f, c, t: t.update({f"{layer}.qweight": t[f"{layer}.qweight"][:-1]}))
    assert f"{layer}: g_idx is not in order" in damaged(lambda f, c, t: t.update({f"{layer}.g_idx": t[f"{layer}.g_idx"].flip(0)}))
    assert f"{layer}: scales are not all positive" in damaged(lambda f, c, t: t.update({f"{layer}.scales": t[f"{layer}.scales"] * 0}))
    assert f"{layer}: a symmetric" in damaged(lambda f, c, t: t.update({f"{layer}.qzeros": t[f"{layer}.qzeros"] * 0}))
    assert "group 48 does not divide" in damaged(lambda f, c, t: c.update(group_size=48))
