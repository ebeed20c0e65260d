"""GGUF files: integers read back from the bytes, and llama.cpp's logits against the dequantized model's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight, expand
from smidgen.quant.blocks import decoder_list
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export import ggml_blocks
from smidgen.quant.export.gguf import FILE, Gguf, pre_tokenizer, read, rope_order, write_float
from smidgen.quant.formats import FORMATS, units
from smidgen.quant.linear import LINEAR, weight_of
from smidgen.quant.solvers import AESPA, BOA, GPTQ, RTN

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

GRIDS = ggml_blocks.GRIDS | {name: g for name, g in FORMATS.items() if name != "q4_1"}
CPU = torch.device("cpu")
LENGTH = 64


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory, tokenizer) -> Path:
    """A Llama of width 256, which super-blocks need."""
    return random(transformers.LlamaConfig, tmp_path_factory.mktemp("wide") / "llama", tokenizer, hidden_size=256, intermediate_size=256)


def config(kind, **changed):
    sizes = dict(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=None, initializer_range=0.06,
    )  # fmt: skip
    return kind(**sizes | changed)


def random(kind, folder: Path, tokenizer, **changed) -> Path:
    """An untrained model: enough to compare two runtimes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config(kind, **changed))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim == 1:  # norms and biases that would show if they were lost
                    p.add_(torch.randn_like(p) * 0.2)
                elif "lm_head" in name or "embed_tokens" in name or "wte" in name:
                    p.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def layers_of(model) -> dict[str, torch.nn.Module]:
    path, blocks = decoder_list(model)
    return {f"{path}.{i}.{n}": m for i, b in enumerate(blocks) for n, m in b.named_modules() if isinstance(m, LINEAR)}


@torch.no_grad()
def written(source: Path, folder: Path, grid: Grid) -> tuple[dict[str, QWeight], transformers.PreTrainedModel]:
    """The file in `folder`, the integers given to it, and the model as torch computes it."""
    checkpoint = Checkpoint(source, source.name)
    skeleton = checkpoint.skeleton(CPU)
    Gguf.check(skeleton, list(layers_of(skeleton)), grid)
    folder.mkdir()
    exporter = Gguf(folder, checkpoint, skeleton)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    solved = {name: RTN()(weight_of(m).clone(), None, grid) for name, m in layers_of(model).items()}
    for name, m in layers_of(model).items():
        weight_of(m).copy_(solved[name].dequantize())
    path, blocks = decoder_list(model)
    for i, block in enumerate(blocks):
        mine = {n: q for n, q in solved.items() if n.startswith(f"{path}.{i}.")}
        exporter.add(mine, block if i else checkpoint.skeleton(CPU).get_submodule(f"{path}.{i}"), f"{path}.{i}")  # once from the checkpoint
    exporter.finish()
    return solved, model


def runtime(folder: Path):
    pytest.importorskip("llama_cpp_py_sync", reason="needs the package llama-cpp-py-sync")
    from smidgen.quant.runtimes.llamacpp import LlamaCpp, library

    try:
        library()
    except UserError as error:
        pytest.skip(str(error))
    return LlamaCpp.open(folder, length=128, threads=1)


@torch.no_grad()
def compared(model, folder: Path, tokens: torch.Tensor) -> tuple[float, float]:
    """Largest difference of log-probabilities, as a share of the float ones' spread, and top-1 agreement."""
    llama = runtime(folder)
    ours = torch.stack([model(t[None], use_cache=False).logits[0] for t in tokens])
    theirs = torch.from_numpy(np.stack([llama.logits(t.numpy()) for t in tokens]))
    llama.close()
    return ((ours - theirs).abs().max() / ours.std()).item(), (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()


@pytest.mark.parametrize("name", GRIDS)
def test_the_file_holds_the_solvers_integers(name, wide_llama, tmp_path):
    solved, _ = written(wide_llama, tmp_path / "out", GRIDS[name])
    back = read(tmp_path / "out" / FILE)
    assert back.keys() == solved.keys()
    for layer, q in solved.items():
        assert back[layer].grid == q.grid
        for part in ("codes", "scale", "zero"):
            assert torch.equal(getattr(back[layer], part), getattr(q, part)), (layer, part)


@pytest.mark.parametrize("name", GRIDS)
def test_llama_cpp_computes_what_torch_does(name, wide_llama, test_tokens, tmp_path):
    _, model = written(wide_llama, tmp_path / "out", GRIDS[name])
    difference, agreement = compared(model, tmp_path / "out", test_tokens[:16])
    print(name, difference, agreement)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen3", "tiny_gpt2"])
def test_trained_families(family, request, test_tokens, tmp_path):
    _, model = written(request.getfixturevalue(family), tmp_path / "out", GRIDS["q8_0"])
    print(family, compared(model, tmp_path / "out", test_tokens[:16]))
