"""ONNX artifacts: the solver's integers in the file, and the dequantized model's logits from ONNX Runtime."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.checkpoint import Checkpoint, load_model
from smidgen.quant.quantize import with_weights
from smidgen.quant.runtimes import Runtime
from smidgen.quant.solvers import RTN

onnx = pytest.importorskip("onnx", reason="needs smidgen[onnx]")
pytest.importorskip("onnx_ir", reason="needs smidgen[onnx]")
pytest.importorskip("onnxruntime", reason="needs smidgen[onnx]")

from smidgen.quant.export.onnx import Onnx, codes_of, fields, packed, read  # noqa: E402 (after the skips)
from smidgen.quant.runtimes.onnxruntime import PIECE, OnnxRuntime  # noqa: E402 (after the skips)

CPU = torch.device("cpu")
SMALL = dict(
    vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=1024, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
)  # fmt: skip
CONFIGS = {
    "mistral-window": transformers.MistralConfig(sliding_window=16, head_dim=16, **SMALL),
    "llama3-angles": transformers.LlamaConfig(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **SMALL,
        rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 128},
    ),
    "qwen2-window": transformers.Qwen2Config(use_sliding_window=True, sliding_window=16, max_window_layers=1, **SMALL),
    "smollm3": transformers.SmolLM3Config(pad_token_id=0, no_rope_layers=[1, 0], **SMALL),
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen2(trained) -> Path:
    """A trained Qwen2: biases at queries, keys and values."""
    small = SMALL | {"max_position_embeddings": 128, "initializer_range": 0.06}
    return trained("tiny-qwen2", transformers.Qwen2Config(**small))


@pytest.fixture
def random_model(tmp_path, tokenizer):
    """Saves a model of random weights, biases and norms included."""

    def save(config: transformers.PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.2 * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def solved(model, grid: Grid) -> dict[str, QWeight]:
    """Every layer of the blocks, rounded to nearest."""
    return {n: RTN()(m.weight.detach(), None, grid) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}


def export(model: Path, folder: Path, grid: Grid, loaded: bool = True) -> dict[str, QWeight]:
    """Quantizes a model folder into an artifact; `loaded`: blocks come with values, not on the meta device."""
    checkpoint = Checkpoint(model, model.name)
    whole = load_model(model, torch.float32, CPU)
    weights = solved(whole, grid)
    skeleton = checkpoint.skeleton(CPU)
    folder.mkdir()
    Onnx.check(skeleton, list(weights), grid)
    exporter = Onnx(folder, checkpoint, skeleton)
    for i in range(len(skeleton.model.layers)):
        path = f"model.layers.{i}"
        block = (whole if loaded else skeleton).get_submodule(path)
        exporter.add({n: q for n, q in weights.items() if n.startswith(f"{path}.")}, block, path)
    exporter.finish()
    return weights


@torch.no_grad()
def reference(model: Path, weights: dict[str, QWeight], tokens: torch.Tensor) -> np.ndarray:
    """Logits of the dequantized model in float32, whose products are float32 too."""
    single = {n: replace(q, grid=replace(q.grid, scale_dtype="float32")) for n, q in weights.items()}
    return with_weights(stored(load_model(model, torch.float32, CPU)), single, {})(tokens).logits.numpy()


@torch.no_grad()
def stored(model):
    """Embedding and head as a file holds them."""
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.copy_(layer.weight.half())
    return model


def assert_same_logits(folder: Path, expected: np.ndarray, tokens: torch.Tensor) -> None:
    """expected: (texts, length, vocab), of at least 512 tokens."""
    runtime = OnnxRuntime.open(folder, threads=1)
    measured = np.stack([runtime.logits(text.numpy()) for text in tokens])
    assert measured.dtype == np.float32 and tokens.numel() >= 512
    assert np.abs(measured - expected).max() < 1e-3
    assert (measured.argmax(-1) == expected.argmax(-1)).mean() >= 0.995
    runtime.close()


# --- what is written is what was solved -----------------------------------------------------------------------------


def test_fields_are_the_docstrings_bytes():
    assert fields(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert fields(np.array([[1, 2, 3]], np.uint8), 8).tolist() == [[1, 2, 3]]
    assert codes_of(np.array([[0x21, 0x03]], np.uint8), 4, 3).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_artifact_has_the_codes_of_the_weights_in_memory(tiny_llama, tmp_path, bits, group, symmetric):
    grid = Grid(bits, group, symmetric, scale_dtype="float16")
    weights = export(tiny_llama, tmp_path / "artifact", grid)
    found = read(tmp_path / "artifact")
    assert list(found) == list(weights) and len(found) == 14
    for name, q in weights.items():
        assert found[name].grid == grid
        assert torch.equal(found[name].codes, q.codes)
        assert torch.equal(found[name].scale, q.scale)
        assert torch.equal(found[name].zero, q.zero)


@pytest.mark.parametrize(("bits", "symmetric", "stored"), [(4, True, False), (4, False, True), (3, True, True), (8, True, False)])
def test_zero_points_are_stored_where_they_are_not_the_operators_default(bits, symmetric, stored, normal):
    q = RTN()(normal(8, 96).float(), None, Grid(bits, 32, symmetric))
    assert ("zero_points" in packed(q)) == stored


@pytest.mark.parametrize("family", ["tiny_llama", "qwen2", "tiny_qwen3"])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, 16), Grid(2, 64), Grid(8, 32, True), Grid(4, 64, True)], ids=str)
def test_runtime_has_the_logits_of_the_dequantized_model(family, grid, request, test_tokens, tmp_path):
    model = request.getfixturevalue(family)
    weights = export(model, tmp_path / "artifact", grid)
    tokens = test_tokens[:9]
    assert_same_logits(tmp_path / "artifact", reference(model, weights, tokens), tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_windows_scaled_angles_biases_and_layers_without_angles(name, random_model, test_tokens, tmp_path):
    model = random_model(CONFIGS[name])
    weights = export(model, tmp_path / "artifact", Grid(4, 32), loaded=False)
    tokens = test_tokens[:10].reshape(1, 640)
    assert_same_logits(tmp_path / "artifact", reference(model, weights, tokens), tokens)


@pytest.mark.parametrize("tied", [True, False])
def test_16_bit_embeddings_stay_so_and_a_tied_head_is_stored_once(tied, random_model, test_tokens, tmp_path):
    model = random_model(transformers.Qwen3Config(head_dim=16, tie_word_embeddings=tied, **SMALL), torch.bfloat16)
    weights = export(model, tmp_path / "artifact", Grid(4, 32, scale_dtype="bfloat16"))
    tokens = test_tokens[:9]
    assert_same_logits(tmp_path / "artifact", reference(model, weights, tokens), tokens)
    graph = onnx.load(tmp_path / "artifact" / "model.onnx", load_external_data=False).graph
    halves = {t.name: tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    assert halves == {"model.embed_tokens.weight": (384, 64)} | ({} if tied else {"lm_head.weight": (384, 64)})


def test_blocks_without_values_are_read_from_the_checkpoint(qwen2, tmp_path):
    for name, loaded in (("values", True), ("meta", False)):
        export(qwen2, tmp_path / name, Grid(4, 32), loaded)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "values" / file).read_bytes() == (tmp_path / "meta" / file).read_bytes()


def test_values_of_a_block_win_over_the_checkpoints(qwen2, test_tokens, tmp_path):
    checkpoint, whole, grid = Checkpoint(qwen2, "tiny"), load_model(qwen2, torch.float32, CPU), Grid(4, 32)
    weights = solved(whole, grid)
    rest = {n: p.detach() + 0.1 for n, p in whole.named_parameters() if p.ndim == 1 and ".layers." in n}
    with_weights(whole, {}, rest)
    (tmp_path / "artifact").mkdir()
    exporter = Onnx(tmp_path / "artifact", checkpoint, checkpoint.skeleton(CPU))
    for i, block in enumerate(whole.model.layers):
        exporter.add({n: q for n, q in weights.items() if f".layers.{i}." in n}, block, f"model.layers.{i}")
    exporter.finish()
    with torch.no_grad():
        expected = with_weights(stored(whole), weights, {})(test_tokens[:9]).logits.numpy()
    assert_same_logits(tmp_path / "artifact", expected, test_tokens[:9])


def test_layers_may_have_bits_of_their_own(tiny_llama, test_tokens, tmp_path):
    checkpoint, whole = Checkpoint(tiny_llama, "tiny"), load_model(tiny_llama, torch.float32, CPU)
    by_bits = [solved(whole, Grid(bits, 32)) for bits in (2, 4, 8)]
    weights = {name: by_bits[i % 3][name] for i, name in enumerate(by_bits[0])}
    (tmp_path / "artifact").mkdir()
    exporter = Onnx(tmp_path / "artifact", checkpoint, checkpoint.skeleton(CPU))
    for i, block in enumerate(whole.model.layers):
        exporter.add({n: q for n, q in weights.items() if f".layers.{i}." in n}, block, f"model.layers.{i}")
    exporter.finish()
    found = read(tmp_path / "artifact")
    assert all(found[n].grid == q.grid and torch.equal(found[n].codes, q.codes) for n, q in weights.items())
    assert_same_logits(tmp_path / "artifact", reference(tiny_llama, weights, test_tokens[:9]), test_tokens[:9])


# --- the file ---------------------------------------------------------------------------------------------------------


def test_standard_nodes_pass_the_checker(tiny_qwen3, tmp_path):
    export(tiny_qwen3, tmp_path / "artifact", Grid(4, 32))
    model = onnx.load(tmp_path / "artifact" / "model.onnx")
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {o.domain: o.version for o in model.opset_import}
    contributed = {"SimplifiedLayerNormalization"}  # of ONNX Runtime, although in the standard domain
    standard = [n for n in model.graph.node if n.domain == "" and n.op_type not in contributed]
    assert len(standard) > 20
    for node in standard:
        onnx.checker.check_node(node, context)
    for tensor in model.graph.initializer:
        onnx.checker.check_tensor(tensor, context)
    names = [n.name for n in model.graph.node]
    assert len(set(names)) == len(names)
    made = {i.name for i in [*model.graph.input, *model.graph.initializer]}
    for node in model.graph.node:  # sorted, and every value is made once
        assert set(node.input) - {""} <= made and made.isdisjoint(set(node.output) - {""})
        made |= set(node.output) - {""}
    assert {o.name for o in model.graph.output} <= made


def test_graph_has_the_inputs_and_outputs_of_genais_builder(tiny_llama, tmp_path):
    export(tiny_llama, tmp_path / "artifact", Grid(4, 32))
    graph = onnx.load(tmp_path / "artifact" / "model.onnx", load_external_data=False).graph
    caches = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert [v.name for v in graph.input] == ["input_ids", "attention_mask", *(f"past_key_values.{c}" for c in caches)]
    assert [v.name for v in graph.output] == ["logits", *(f"present.{c}" for c in caches)]
    stored = [t for t in graph.initializer if t.name == "model.layers.0.self_attn.q_proj.B"]
    assert stored[0].data_location == onnx.TensorProto.EXTERNAL and list(stored[0].dims) == [64, 2, 16]


def test_genai_writes_what_the_runtime_does(tiny_llama, test_text, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
    export(tiny_llama, tmp_path / "artifact", Grid(4, 32))
    runtime = OnnxRuntime.open(tmp_path / "artifact", length=64, threads=1)
    text = test_text.read_text(encoding="utf-8")[:60]
    prompt = runtime.encode(text)
    expected, logits = list(prompt), runtime.start(np.array(prompt))
    while len(expected) < 64 and (token := int(logits.argmax())) != 0:
        expected.append(token)
        logits = runtime.step(token)
    model = genai.Model(str(tmp_path / "artifact"))
    assert genai.Tokenizer(model).encode(text).tolist() == prompt
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist()[: len(expected)] == expected and len(expected) > len(prompt)


# --- the runtime ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, PIECE, PIECE + 1, 300])
def test_start_and_steps_have_the_logits_of_the_whole_text(random_model, test_tokens, tmp_path, length):
    export(random_model(CONFIGS["mistral-window"]), tmp_path / "artifact", Grid(4, 32))
    runtime = OnnxRuntime.open(tmp_path / "artifact", threads=1)
    tokens = test_tokens.flatten()[: length + 8].numpy()
    expected = runtime.logits(tokens)
    for _ in range(2):  # a second text finds no trace of the first
        found = [runtime.start(tokens[:length]), *(runtime.step(int(t)) for t in tokens[length:])]
        np.testing.assert_allclose(np.stack(found), expected[length - 1 :], rtol=0, atol=1e-4)


def test_text_comes_back(tiny_llama, tokenizer, test_text, tmp_path):
    export(tiny_llama, tmp_path / "artifact", Grid(4, 32))
    runtime = OnnxRuntime.open(tmp_path / "artifact" / "model.onnx", threads=1)
    assert isinstance(runtime, Runtime)
    assert runtime.ends(0) and not runtime.ends(1)
    text = test_text.read_text(encoding="utf-8")[:500]
    assert runtime.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert runtime.decode(runtime.encode(text)) == text


def test_runtime_imports_neither_torch_nor_transformers(tiny_llama, tmp_path):
    export(tiny_llama, tmp_path / "artifact", Grid(4, 32))
    script = f"""
import sys
from pathlib import Path
from smidgen.quant.runtimes.onnxruntime import OnnxRuntime
import numpy as np
runtime = OnnxRuntime.open(Path({str(tmp_path / "artifact")!r}), threads=1)
logits = runtime.start(np.array(runtime.encode("The array")))
print(runtime.step(int(logits.argmax())).shape, runtime.name, *{{"torch", "transformers", "onnx", "onnx_ir"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    shape, _, rest = done.stdout.partition(" ")
    assert shape == "(384,)" and rest.split()[0] == "onnxruntime" and len(rest.split()) == 2


def test_runtime_refuses_more_tokens_than_it_was_opened_for(tiny_llama, tmp_path):
    export(tiny_llama, tmp_path / "artifact", Grid(4, 32))
    runtime = OnnxRuntime.open(tmp_path / "artifact", length=8, threads=1)
    runtime.start(np.arange(8))
    with pytest.raises(UserError, match="9 tokens are more than the 8"):
        runtime.step(1)
    assert OnnxRuntime.open(tmp_path / "artifact", length=1000, threads=1).length == 128  # the model's positions
    with pytest.raises(UserError, match="between 0 and 383"):
        runtime.start(np.array([384]))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "advice"),
    [(Grid(4), "--group none.*--group 64"), (Grid(4, 8), "--group 8.*--group 16"), (Grid(4, 128), "--group 128.*--group 64")],
)
def test_grids_that_do_not_fit_are_refused_with_the_nearest(tiny_llama, grid, advice):
    skeleton = Checkpoint(tiny_llama, "tiny").skeleton(CPU)
    layers = [n for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    with pytest.raises(UserError, match=advice):
        Onnx.check(skeleton, layers, grid)


@pytest.mark.parametrize("family", ["tiny_opt", "tiny_gpt2"])
def test_other_families_are_refused(family, request):
    skeleton = Checkpoint(request.getfixturevalue(family), "tiny").skeleton(CPU)
    with pytest.raises(UserError, match="llama, mistral, qwen2, qwen3, smollm3 models, not '(opt|gpt2)'"):
        Onnx.check(skeleton, [], Grid(4, 32))


def test_angles_that_depend_on_length_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(rope_parameters=rope, **SMALL))
    with pytest.raises(UserError, match="not this model's dynamic"):
        Onnx.check(model, [], Grid(4, 32))


def test_a_model_without_tokenizer_is_refused(tiny_llama, tmp_path):
    load_model(tiny_llama, torch.float32, CPU).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="tokenizer"):
        export(tmp_path / "bare", tmp_path / "artifact", Grid(4, 32))
    assert not (tmp_path / "artifact" / "model.onnx").exists()


@pytest.fixture
def artifact(tiny_llama, tmp_path) -> Path:
    export(tiny_llama, tmp_path / "artifact", Grid(4, 32))
    return tmp_path / "artifact"


def cut(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


@pytest.mark.parametrize("keep", [0, 0.3, 0.99])
@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data"])
def test_files_that_are_cut_off_are_refused(artifact, file, keep):
    cut(artifact / file, keep)
    with pytest.raises(UserError, match=str(artifact)):
        read(artifact)
    with pytest.raises(UserError, match=str(artifact)):
        OnnxRuntime.open(artifact)


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"])
def test_incomplete_folders_are_refused(artifact, file):
    (artifact / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        OnnxRuntime.open(artifact)
    if file.startswith("model"):
        with pytest.raises(UserError, match="it needs model.onnx and model.onnx.data"):
            read(artifact)


def test_a_foreign_onnx_file_is_refused(artifact):
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "foreign", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), artifact / "model.onnx")
    with pytest.raises(UserError, match="no layers that smidgen quantized"):
        read(artifact)
    with pytest.raises(UserError, match="not a decoder with a cache"):
        OnnxRuntime.open(artifact)


def test_codes_beyond_their_grid_are_refused(tiny_llama, tmp_path):
    export(tiny_llama, tmp_path / "artifact", Grid(3, 32))
    data = tmp_path / "artifact" / "model.onnx.data"
    data.write_bytes(b"\xff" * data.stat().st_size)
    with pytest.raises(UserError, match="q_proj does not fit its grid of 3 bits"):
        read(tmp_path / "artifact")


def test_missing_packages_are_named_with_their_extra(artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"package onnxruntime: pip install 'smidgen\[onnx\]'"):
        OnnxRuntime.open(artifact)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(UserError, match=r"package onnx_ir: pip install 'smidgen\[onnx\]'"):
        read(artifact)


@pytest.mark.parametrize("file", ["genai_config.json", "tokenizer.json"])
def test_foreign_json_is_refused(artifact, file):
    (artifact / file).write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match="damaged"):
        OnnxRuntime.open(artifact)
