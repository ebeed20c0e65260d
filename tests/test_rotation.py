"""Rotated models against the models they were made from."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from smidgen.errors import UserError
from smidgen.grid import Grid
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.solvers import RTN
from smidgen.quant.transforms import rotation
from smidgen.quant.transforms.rotation import hadamard, orders, paley, rotate, rotations

CPU = torch.device("cpu")
COMMON = dict(
    vocab_size=384, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    head_dim=12, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
CONFIGS = {  # heads of 12 in a stream of 48: neither a power of two, and heads together wider than the stream
    "llama, all biases": transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=6),
    "qwen2, biases": transformers.Qwen2Config(**COMMON | dict(hidden_size=72)),
    "qwen2, tied": transformers.Qwen2Config(**COMMON | dict(hidden_size=72), tie_word_embeddings=True),
    "qwen3, biases": transformers.Qwen3Config(**COMMON, attention_bias=True),
    "smollm3": transformers.SmolLM3Config(**COMMON, no_rope_layers=[1, 0]),
}


@pytest.fixture
def saved(tmp_path, tokenizer):
    """(config) -> folder of a model with random weights, biases and gains."""

    def save(config, name="source", dtype=torch.float32):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.5 * torch.randn(parameter.shape)
        model.to(dtype).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def opened(folder):
    return Checkpoint.open(str(folder))


def loaded(folder, dtype=torch.float32):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(folder, tokens):
    return loaded(folder)(tokens, use_cache=False).logits


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def peak(w):
    return (w.abs().max() / w.square().mean().sqrt()).item()


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 64, 76, 96, 108, 240, 576, 896, 1536])
def test_hadamard(n):
    h = hadamard(n)
    assert h.dtype == torch.float64 and h.shape == (n, n)
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 23, 46, 52, 92, 172])
def test_no_hadamard(n):
    with pytest.raises(UserError, match=f"^width {n} cannot be rotated: .*$"):
        hadamard(n)


def test_the_smallest_factors_are_taken():
    assert orders(576) == (2, 2, 2, 2, 36)
    assert orders(1536) == (2,) * 7 + (12,)
    assert orders(1) == ()


def test_docstring_of_paley():
    assert paley(3).tolist() == [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]]


def test_signs_come_before_the_mixing(generator):
    first, second = rotation.rotation(36, generator), rotation.rotation(36, generator)
    assert torch.allclose(first @ first.T, torch.eye(36, dtype=torch.float64), atol=1e-14)
    row = torch.arange(36.0, dtype=torch.float64)
    assert not torch.allclose((row @ first).abs(), (row @ second).abs())


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_qwen3"])
def test_logits_of_trained_models_stay(fixture, request, test_tokens, tmp_path):
    folder = request.getfixturevalue(fixture)
    want, got = logits(folder, test_tokens[:8]), logits(rotate(opened(folder), tmp_path / "out").folder, test_tokens[:8])
    assert torch.allclose(want, got, rtol=0, atol=3e-5)  # 6e-6 seen, logits reach 10
    assert not torch.equal(want, got)


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_of_every_family_stay(kind, saved, test_tokens, tmp_path):
    folder = saved(CONFIGS[kind])
    want, got = logits(folder, test_tokens[:4]), logits(rotate(opened(folder), tmp_path / "out").folder, test_tokens[:4])
    assert torch.allclose(want, got, rtol=0, atol=1e-5 * want.abs().max().item())


def test_every_family_is_covered():
    assert {config.model_type for config in CONFIGS.values()} == set(rotation.RMSNORM)


def test_norms_have_no_gain_and_the_head_is_its_own(tiny_qwen3, tmp_path):
    before, after = stored(tiny_qwen3), stored(rotate(opened(tiny_qwen3), tmp_path / "out").folder)
    assert "lm_head.weight" not in before and set(after) == set(before) | {"lm_head.weight"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    norms = [n for n in after if n.endswith("norm.weight")]
    inside = [n for n in norms if "self_attn" in n]
    assert len(norms) == 9 and len(inside) == 4
    assert all(torch.equal(after[n], before[n] if n in inside else torch.ones(64)) for n in norms)
    gain = before["model.norm.weight"]
    assert gain.std() > 0.01
    r1, _ = rotations(opened(tiny_qwen3).skeleton(CPU), 0)
    embedding = before["model.embed_tokens.weight"].double()
    assert torch.allclose(after["model.embed_tokens.weight"].double(), embedding @ r1, atol=1e-6)
    assert torch.allclose(after["lm_head.weight"].double(), embedding * gain @ r1, atol=1e-5)


def test_tied_weights_stored_as_the_head_only(saved, test_tokens, tmp_path):
    folder = saved(CONFIGS["qwen2, tied"])
    want = logits(folder, test_tokens[:2])
    tensors = stored(folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    got = logits(rotate(opened(folder), tmp_path / "out").folder, test_tokens[:2])
    assert torch.allclose(want, got, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"])
def test_an_outlier_channel_is_spread(layer, tiny_llama, tmp_path):
    """Stream channels by R1, channels of a head by R2."""
    checkpoint = with_outliers(tiny_llama, tmp_path, [layer])
    name = f"model.layers.0.{layer}.weight"
    before, after = stored(checkpoint.folder)[name], stored(rotate(checkpoint, tmp_path / "out").folder)[name]
    assert after.norm() / before.norm() < 2  # gains are in it now
    assert peak(after) < peak(before) / 2


def with_outliers(folder, tmp_path, layers, factor=20.0):
    """The model with one input channel of some layers larger; with all that read a norm the output stays, as its gain is smaller."""
    tensors = stored(folder)
    for layer in layers:
        tensors[f"model.layers.0.{layer}.weight"][:, 5] *= factor
    if len(layers) == 3:
        tensors["model.layers.0.input_layernorm.weight"][5] /= factor
    target = tmp_path / "outliers"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return opened(target)


def test_rounding_a_model_with_outliers_costs_less_after_rotation(tiny_llama, tmp_path, test_tokens, quantized, perplexity):
    checkpoint = with_outliers(tiny_llama, tmp_path, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], factor=200.0)
    after = rotate(checkpoint, tmp_path / "out")
    exact = perplexity(loaded(tiny_llama), test_tokens[:64])
    assert perplexity(loaded(checkpoint.folder), test_tokens[:64]) == pytest.approx(exact, rel=1e-4)
    assert perplexity(loaded(after.folder), test_tokens[:64]) == pytest.approx(exact, rel=1e-4)
    plain, turned = (perplexity(quantized(c.folder, None, RTN(), Grid(4)), test_tokens[:64]) for c in (checkpoint, after))
    assert exact < turned < plain
    assert turned - exact < (plain - exact) / 2


def test_blocks_see_the_rotated_stream(tiny_llama, blocks_of, test_tokens, tmp_path):
    checkpoint = rotate(opened(tiny_llama), tmp_path / "out", seed=3)
    r1, _ = rotations(checkpoint.skeleton(CPU), 3)
    before = [b.hidden.clone() for b in blocks_of(tiny_llama, test_tokens[:4])]
    after = [b.hidden.clone() for b in blocks_of(checkpoint.folder, test_tokens[:4])]
    assert len(before) == len(after) == 2
    for want, got in zip(before, after, strict=True):
        assert torch.allclose(want @ r1.float(), got, atol=1e-4)


def test_the_folder_is_complete(tiny_llama, tmp_path, tokenizer):
    source = tmp_path / "named"
    source.mkdir()
    for file in tiny_llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    transformers.GenerationConfig(temperature=0.25, do_sample=True).save_pretrained(source)
    checkpoint = rotate(opened(source), tmp_path / "deep" / "out")
    assert (checkpoint.name, checkpoint.folder) == ("named", tmp_path / "deep" / "out")
    again = opened(checkpoint.folder)
    assert again.keys.keys() == opened(source).keys.keys()
    assert again.tokenizer().get_vocab() == tokenizer.get_vocab()
    assert loaded(checkpoint.folder).generation_config.temperature == 0.25
    kept, new = again.config.to_dict(), opened(source).config.to_dict()
    assert {k for k in kept if kept[k] != new[k]} <= {"_name_or_path"}


def test_shards_and_types(saved, tmp_path, test_tokens, monkeypatch):
    checkpoint = opened(saved(CONFIGS["llama, all biases"], dtype=torch.bfloat16))
    whole = rotate(checkpoint, tmp_path / "whole")
    monkeypatch.setattr("smidgen.quant.shards.SHARD", 20_000)
    monkeypatch.setattr(rotation, "ROWS", 50)
    parts = rotate(checkpoint, tmp_path / "parts")
    assert not (whole.folder / "model.safetensors.index.json").exists()
    files = sorted(f.name for f in parts.folder.glob("*.safetensors"))
    index = json.loads((parts.folder / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(parts.folder).values())
    sizes = [[t.nbytes for t in load_file(parts.folder / f).values()] for f in files]
    assert all(sum(s) <= 20_000 or len(s) == 1 for s in sizes)
    one, many = stored(whole.folder), stored(parts.folder)
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) and one[n].dtype == torch.bfloat16 for n in one)
    assert parts.dtype() == torch.bfloat16 and json.loads((parts.folder / "config.json").read_text())["dtype"] == "bfloat16"
    want, got = logits(checkpoint.folder, test_tokens[:2]), logits(parts.folder, test_tokens[:2])
    assert (want - got).norm() / want.norm() < 0.05


def test_the_seed_decides(tiny_llama, tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    first, again, other = (
        stored(rotate(opened(tiny_llama), tmp_path / n, seed).folder)[name] for n, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first.abs(), other.abs(), atol=1e-3)


def test_each_block_has_its_own_r2(tiny_llama):
    r1, r2 = rotations(opened(tiny_llama).skeleton(CPU), 0)
    assert r1.shape == (64, 64) and [r.shape for r in r2] == [(16, 16)] * 2
    assert not torch.equal(r2[0], r2[1])


@pytest.mark.parametrize("fixture", ["tiny_opt", "tiny_gpt2"])
def test_layer_norm_is_refused(fixture, request, tmp_path):
    with pytest.raises(UserError, match="^rotation needs RMSNorm, .*llama, .*smollm3; this model is of the family '(opt|gpt2)'$"):
        rotate(opened(request.getfixturevalue(fixture)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_is_refused(saved, tmp_path):
    config = transformers.GemmaConfig(**COMMON)  # RMSNorm, but with gain 1 + g and scaled embeddings
    with pytest.raises(UserError, match="'gemma'$"):
        rotate(opened(saved(config)), tmp_path / "out")


@pytest.mark.parametrize(("size", "width"), [(dict(hidden_size=92, num_attention_heads=2), 92), (dict(head_dim=6), 6)])
def test_widths_without_a_hadamard_matrix_are_refused(size, width, saved, tmp_path):
    checkpoint = opened(saved(transformers.LlamaConfig(**COMMON | size)))
    with pytest.raises(UserError, match=f"^width {width} cannot be rotated"):
        rotate(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_weights_is_refused(tiny_llama):
    with pytest.raises(UserError, match="holds weights already"):
        rotate(opened(tiny_llama), tiny_llama)


def test_a_quantized_model_is_refused(saved, tmp_path):
    folder = saved(CONFIGS["mistral"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="quantized already"):
        rotate(opened(folder), tmp_path / "out")


def test_values_beyond_the_type_are_refused(saved, tmp_path):
    folder = saved(CONFIGS["mistral"], dtype=torch.float16)
    tensors = stored(folder)
    tensors["model.layers.0.input_layernorm.weight"][:] = 6e4
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 100
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^model\.layers\.0\.self_attn\.q_proj\.weight, rotated, .*beyond float16$"):
        rotate(opened(folder), tmp_path / "out")
