"""GGUF files: integers read back from the bytes, and llama.cpp's logits against the dequantized model's."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight, expand
from smidgen.quant.blocks import decoder_list
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export import ggml_blocks
from smidgen.quant.export.gguf import FILE, Gguf, read, rope_order, write_float
from smidgen.quant.export.gguf_tokenizer import BYTE_TOKENS, add_tokenizer, parts, pre_tokenizer, scores
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
    model.tie_weights()
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    for p in embeddings:  # the file's, rounded to q8_0
        data = gguf.quants.quantize(p.numpy(), gguf.GGMLQuantizationType.Q8_0)
        p.copy_(torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0)))
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
    """Largest difference of logits, as a share of their standard deviation, and top-1 agreement."""
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
    """It rounds the inputs of every layer to 8 bits, which moves a random model's logits by up to 0.16 of their spread."""
    _, model = written(wide_llama, tmp_path / "out", GRIDS[name])
    difference, agreement = compared(model, tmp_path / "out", test_tokens[:16])
    assert difference < 0.25 and agreement > 0.93, (difference, agreement)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen3", "tiny_gpt2"])
def test_trained_families(family, request, test_tokens, tmp_path):
    _, model = written(request.getfixturevalue(family), tmp_path / "out", GRIDS["q8_0"])
    difference, agreement = compared(model, tmp_path / "out", test_tokens[:16])
    assert difference < 0.15 and agreement > 0.97, (difference, agreement)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
WINDOW, FULL = "sliding_attention", "full_attention"
GEMMA3 = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=16, layer_types=[WINDOW, FULL], tie_word_embeddings=True)
ROPES = {
    WINDOW: {"rope_type": "default", "rope_theta": 500.0},
    FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0},
}
VARIANTS = {
    "biased llama": (transformers.LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "llama3 rope": (transformers.LlamaConfig, dict(rope_scaling=LLAMA3, head_dim=32)),
    "linear rope": (transformers.LlamaConfig, dict(rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "mistral": (transformers.MistralConfig, dict(head_dim=32)),
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "phi3": (transformers.Phi3Config, {}),
    "gemma3": (transformers.Gemma3TextConfig, GEMMA3),
    "gemma3, linear rope": (transformers.Gemma3TextConfig, GEMMA3 | dict(rope_parameters=ROPES)),
    "gemma3, all windows": (transformers.Gemma3TextConfig, GEMMA3 | dict(layer_types=[WINDOW, WINDOW])),
    "gemma3, no windows": (transformers.Gemma3TextConfig, GEMMA3 | dict(layer_types=[FULL, FULL])),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, tokenizer, test_tokens, tmp_path):
    kind, changed = VARIANTS[variant]
    source = random(kind, tmp_path / "model", tokenizer, **changed)
    _, model = written(source, tmp_path / "out", GRIDS["q8_0"])
    difference, agreement = compared(model, tmp_path / "out", test_tokens[:16])
    assert difference < 0.25 and agreement > 0.93, (difference, agreement)


def test_a_step_continues_a_prompt(wide_llama, test_tokens, tmp_path):
    written(wide_llama, tmp_path / "out", GRIDS["q4_0"])
    llama = runtime(tmp_path / "out")
    text = test_tokens[0, :12].numpy()
    whole = llama.logits(text)
    stepped = [llama.start(text[:9])] + [llama.step(int(t)) for t in text[9:]]
    np.testing.assert_allclose(np.stack(stepped), whole[8:], atol=0.02 * whole.std())
    with pytest.raises(UserError, match="opened for 128 tokens"):
        llama.logits(np.zeros(200, np.int64))
    with pytest.raises(UserError, match="between 0 and 383"):
        llama.step(384)
    llama.close()
    llama.close()


SERVER = """
import json, sys
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_gpu_layers = sys.argv[1], 128, 0
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as in ours: it decides near ties
server = xllamacpp.Server(parameters)
asked = {"n_predict": 24, "temperature": 0, "logprobs": 1}
answers = [server.handle_completions(asked | {"prompt": prompt})["choices"][0] for prompt in json.loads(sys.argv[2])]
print(json.dumps([[[token["id"] for token in answer["logprobs"]["content"]], answer["text"]] for answer in answers]))
"""


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the package xllamacpp")
def test_a_server_writes_what_the_runtime_does(tiny_llama, test_tokens, test_text, tmp_path):
    """llama.cpp's own server, with its own sampler, on tokens and on a text it tokenizes itself."""
    from smidgen.quant.generate import continued

    written(tiny_llama, tmp_path / "out", GRIDS["q4_0"])
    llama = runtime(tmp_path / "out")
    text = test_text.read_text(encoding="utf-8")[1000:1100]
    prompts = [*test_tokens[:4, :20].tolist(), text]
    expected = [list(continued(llama, np.array(p if p is not text else llama.encode(text)), 24, 0.0, 0)) for p in prompts]
    command = [sys.executable, "-c", SERVER, str(tmp_path / "out" / FILE), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [tokens for tokens, _ in found] == expected
    assert [answer for _, answer in found] == [llama.decode(tokens) for tokens in expected]
    assert all(len(tokens) > 8 for tokens in expected) and len({tuple(tokens) for tokens in expected}) > 3
    llama.close()


def test_llama_cpp_tokenizes_as_transformers_does(wide_llama, tokenizer, test_text, tmp_path):
    written(wide_llama, tmp_path / "out", GRIDS["q4_0"])
    llama = runtime(tmp_path / "out")
    text = test_text.read_text(encoding="utf-8")[:3000] + "<|endoftext|> don't   3.14 \u00fc\U0001f999\n\n x"
    assert llama.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert llama.decode(llama.encode(text)) == text
    llama.close()


# --- tokenizers with byte fallback -----------------------------------------------------------------------------------

REPLACE = normalizers.Replace(" ", "\u2581")
STYLES = {  # normalizer, pre-tokenizer
    "llama2": (normalizers.Sequence([normalizers.Prepend("\u2581"), REPLACE]), None),
    "gemma": (REPLACE, pre_tokenizers.Split(" ", "merged_with_previous")),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "words": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
}
ODD = "caf\u00e9 e\u0301 \u4e2d\u6587\u200b \U0001f999\U0001f3fd  three   spaces\n\n\n\ttab a\u2581b <0x41> a </s x</s> \n 3.14\r\n   "


@pytest.fixture(scope="module")
def learnt(train_text) -> dict[str, tuple[dict[str, int], list[tuple[str, str]]]]:
    """Vocabulary and merges of 900 tokens, learnt with and without words; 60 characters are known, the others are bytes."""
    made = {}
    for words in (True, False):
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = REPLACE
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(split=True) if words else pre_tokenizers.Split(Regex("\n\n"), "merged_with_previous")
        special = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, limit_alphabet=60, show_progress=False)
        bpe.train_from_iterator([train_text.read_text(encoding="utf-8")[:60_000]], trainer)
        spec = json.loads(bpe.to_str())["model"]
        made["words" if words else "lines"] = (spec["vocab"], [tuple(m) for m in spec["merges"]])
    return made


@pytest.fixture(scope="module")
def fallback(learnt):
    """(style) -> a tokenizer as Llama 2, Gemma or later ones have it."""

    def make(style: str, extra=(), **options) -> transformers.PreTrainedTokenizerFast:
        vocab, merges = learnt["words" if style == "words" else "lines"]
        bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>", **options))
        bpe.normalizer, bpe.pre_tokenizer = STYLES[style]
        strip = [] if style == "gemma" else [decoders.Strip(" ", 1, 0)]
        bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
        bpe.add_tokens(list(extra))
        return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")

    return make


@pytest.mark.parametrize("style", STYLES)
def test_llama_cpp_falls_back_to_bytes_as_transformers_does(style, fallback, test_text, tmp_path):
    extra = [AddedToken("<|im|>", special=True, normalized=False)]
    if style in ("llama2", "gemma"):
        extra += [AddedToken("\n\n", normalized=False), AddedToken("\u2581\u2581", normalized=False)]
    if style == "gemma":
        extra += [AddedToken("\u2581\u2581\u2581", normalized=True)]
    tokenizer = fallback(style, extra)
    source = random(transformers.LlamaConfig, tmp_path / "model", tokenizer, vocab_size=960, num_hidden_layers=1)
    written(source, tmp_path / "out", GRIDS["q8_0"])
    llama = runtime(tmp_path / "out")
    rng = np.random.default_rng(0)  # no U+2581 in these texts: where added tokens begin with it, it is not taken for a blank
    letters = [*" \n\t.,aeinorst\u00e9<", "  ", "the", "\n\n", "of the", "\U0001f999", "\u4e2d", "<0x0A>"]
    texts = [test_text.read_text(encoding="utf-8"), *("".join(rng.choice(letters, 60)) for _ in range(300))]
    if style in ("llama2", "gemma"):  # the others treat blanks at the start and after special tokens in another way
        texts += [ODD, "  x", "", " ", "a<|im|>b <|im|> c"]
    else:
        texts = [t.lstrip() for t in texts]
    used = set()
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama.encode(text) == expected, text
        assert llama.decode(expected) == tokenizer.decode(expected), text
        used |= set(expected)
    assert len(used) > 500 and {*tokenizer.convert_tokens_to_ids(["<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"])} <= used
    llama.close()


@pytest.mark.parametrize(
    ("style", "change", "message"),
    [
        ("llama2", dict(dropout=0.1), "byte fallback and dropout"),
        ("llama2", dict(ignore_merges=True), "byte fallback and ignore_merges"),
        ("llama2", dict(extra=["word"]), "added token 'word': it is found in normalized text"),
    ],
)
def test_tokenizers_with_fallback_it_cannot_hold(style, change, message, fallback):
    with pytest.raises(UserError, match=message):
        add_tokenizer(None, fallback(style, **change), 960)


def test_other_steps_before_the_merges(fallback):
    tokenizer = fallback("llama2")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), REPLACE])
    with pytest.raises(UserError, match="only turn blanks into U.2581; this one does NFKC . Replace"):
        add_tokenizer(gguf.GGUFWriter(None, "llama"), tokenizer, 960)
    vocab = {t: i for i, t in enumerate(["<unk>", *BYTE_TOKENS[:65], *BYTE_TOKENS[66:]])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    with pytest.raises(UserError, match="no token for 1 of them, the first is <0x41>"):
        add_tokenizer(None, transformers.PreTrainedTokenizerFast(tokenizer_object=bpe), 960)
    with pytest.raises(UserError, match="knows BPE tokenizers; this one is WordLevel"):
        add_tokenizer(None, transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))), 960)


def test_scores_join_what_merges_do():
    merges = [("b", "c"), ("a", "b"), ("bc", "d"), ("b", "cd")]
    assert parts("bcd", lambda a, b: {m: i for i, m in enumerate(merges)}.get((a, b))) == ("bc", "d")
    assert scores(merges, ["a", "ab", "bc", "bcd"], [], split=False) == {"bc": 0, "ab": -1, "bcd": -2}
    with pytest.raises(UserError, match="the token 'abc' is made by no merge, but by 'a' . 'bc' in llama.cpp"):
        scores([*merges, ("ab", "c")], ["ab", "bc", "bcd", "abc"], [], split=False)
    scores([*merges, ("ab", "c")], ["ab", "bc", "bcd", "abc"], ["bc"], split=False)
    blanks = [("\u2581", "\u2581")]
    assert scores(blanks, ["\u2581", "\u2581\u2581"], [], split=False) == {"\u2581\u2581": 0}
    with pytest.raises(UserError, match="no merge"):
        scores(blanks, ["\u2581", "\u2581\u2581"], [], split=True)


# --- llama.cpp's own quantization, and formats -----------------------------------------------------------------------


def test_llama_cpp_quantizes_a_float_file(wide_llama, test_tokens, tmp_path):
    """Its q4_0 of our float file, with and without an importance matrix, is another valid file of ours."""
    float_file = write_float(tmp_path, Checkpoint(wide_llama, "wide"))
    runtime(float_file).close()
    from smidgen.quant.runtimes.llamacpp import llamacpp_quantize

    try:
        llamacpp_quantize(float_file, tmp_path / "plain.gguf", "q4_0")
    except UserError as error:
        pytest.skip(str(error))
    weighted = {f"blk.{i}.{n}.weight": np.linspace(1, 1e4, 256) for i in range(2) for n in ("attn_q", "ffn_up")}
    llamacpp_quantize(float_file, tmp_path / "weighted.gguf", "q4_0", weighted)
    plain, other = read(tmp_path / "plain.gguf"), read(tmp_path / "weighted.gguf")
    changed = {n for n, q in plain.items() if not torch.equal(q.codes, other[n].codes)}
    assert changed == {f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.up_proj")}
    model = transformers.AutoModelForCausalLM.from_pretrained(wide_llama, dtype=torch.float32)
    for name, q in plain.items():
        w = model.get_submodule(name).weight
        assert (q.dequantize() - w).norm() / w.norm() < 0.12  # which rows in a wrong order would not give
    with pytest.raises(UserError, match="recipe must be one of"):
        llamacpp_quantize(float_file, tmp_path / "x.gguf", "q9")


@pytest.mark.parametrize("name", [*FORMATS, "q4_0", "q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_decode_to_the_solvers_values(name, dtype, normal):
    """To float32 rounding of d sc q - dmin m, against that of (q - zero) scale: 3 units in the last place of the minimum."""
    grid = FORMATS.get(name) or GRIDS[name]
    w = (normal(24, 512) * 0.02).to(dtype)
    w[3], w[5, :16], w[:, 7] = 0, 0, w[:, 7] * 8
    scale, zero = grid.fit(w)
    q = QWeight(grid.encode(w, expand(scale, 512), expand(zero, 512)).to(torch.uint8), scale, zero, grid)
    data = ggml_blocks.pack(q)
    theirs = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()])).to(dtype)
    ours = grid.decode(q.codes.to(dtype), *q.expanded())
    assert (theirs - ours).abs().max() <= 4e-7 * (scale * (zero + grid.top)).max()
    back = ggml_blocks.unpack(data, name)
    assert back.grid == grid and torch.equal(back.codes, q.codes) and torch.equal(back.scale, scale.float())
    torch.testing.assert_close(back.zero.to(dtype), zero, rtol=3e-7, atol=0)
    assert data.size * 8 == q.bits()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_better_than_one_with_fewer_bits_and_groups_of_zeros_cost_nothing(name, normal):
    grid = FORMATS[name]
    w = normal(16, 512)
    quiet = w.clone()
    quiet[:, 256:272] = 0
    error = [(QWeight_of(x, grid).dequantize() - x)[:, 272:].pow(2).mean() for x in (w, quiet)]
    assert error[1] <= 1.05 * error[0]
    assert error[0] < {2: 0.09, 3: 0.04, 4: 0.01}[grid.bits]


def QWeight_of(w, grid) -> QWeight:  # noqa: N802
    return RTN()(w, None, grid)


@pytest.mark.parametrize(
    "solver", [GPTQ(passes=2), GPTQ(static_groups=False, act_order=False, passes=1), BOA(passes=1), AESPA(steps=20, passes=1)], ids=str
)
@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k"])
def test_solvers_stay_on_the_format_and_win(solver, name, normal, moments):
    from smidgen.quant.stats import Stats

    w, h = normal(8, 512), moments(1, 512)
    stats = Stats(h, None, 4096)
    q = solver(w, stats, FORMATS[name])
    back = ggml_blocks.unpack(ggml_blocks.pack(q), name)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scale, q.scale.float())
    assert stats.loss(q.dequantize() - w) < stats.loss(RTN()(w, None, FORMATS[name]).dequantize() - w)


def test_units_find_the_number_they_are_multiples_of():
    d, k = units(torch.tensor([[0.75, 0.25, 1.0, 2.0]]), steps=15)
    assert d.tolist() == [0.25] and k.tolist() == [[3.0, 1.0, 4.0, 8.0]]
    with pytest.raises(UserError, match="no float16 times integers"):
        units(torch.tensor([[1.0, torch.pi]]), steps=15)


def test_rope_order_is_llamas():
    assert rope_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(4, None, True, "float16"), "one scale per row.*--bits 4 --group 32 --symmetric"),
        (Grid(4, 64, False, "float16"), "groups of 64.*--bits 4 --group 32$"),
        (Grid(8, 32, False, "float16"), "--bits 8 --group 32 --symmetric"),
        (Grid(4, 32, True, "bfloat16"), "--scale-dtype float16"),
        (Grid(3, 32, False, "float16"), "q3_k"),
        (FORMATS["q2_k"], "model.layers.0.self_attn.q_proj: q2_k needs rows that are multiples of 256.*q4_0"),
    ],
)
def test_grids_it_cannot_hold(grid, message, tiny_llama):
    model = Checkpoint(tiny_llama, "tiny").skeleton(CPU)
    with pytest.raises(UserError, match=message):
        Gguf.check(model, list(layers_of(model)), grid)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(query_pre_attn_scalar=16), "takes query_pre_attn_scalar for 32 in this gemma3 model, not 16"),
        (dict(final_logit_softcapping=30.0), "without final_logit_softcapping, this one has 30.0"),
        (dict(attn_logit_softcapping=50.0), "without attn_logit_softcapping, this one has 50.0"),
        (dict(attention_bias=True), "without attention_bias"),
        (dict(use_bidirectional_attention=True), "without use_bidirectional_attention"),
        (dict(hidden_activation="silu"), "with gelu_pytorch_tanh, this one has silu"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "one layer in every 1 has no sliding window"),
        (dict(rope_parameters={WINDOW: ROPES[FULL], FULL: ROPES[FULL]}), "default rope in layers with a sliding window, not linear"),
    ],
)
def test_gemmas_llama_cpp_would_compute_otherwise(changed, message):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config(transformers.Gemma3TextConfig, **GEMMA3 | changed))
    with pytest.raises(UserError, match=message):
        Gguf.check(model, list(layers_of(model)), GRIDS["q4_0"])


def test_gemmas_integers_come_back(tokenizer, tmp_path):
    source = random(transformers.Gemma3TextConfig, tmp_path / "model", tokenizer, **GEMMA3)
    solved, _ = written(source, tmp_path / "out", GRIDS["q4_0"])
    back = read(tmp_path / "out" / FILE)
    assert back.keys() == solved.keys() and len(back) == 14
    assert all(torch.equal(back[n].codes, q.codes) and torch.equal(back[n].scale, q.scale) for n, q in solved.items())


def test_a_format_refuses_other_bits():
    with pytest.raises(UserError, match="q2_k has 2 bits per weight, not 3"):
        replace(FORMATS["q2_k"], bits=3)


def test_models_it_does_not_know(tiny_opt):
    model = Checkpoint(tiny_opt, "opt").skeleton(CPU)
    with pytest.raises(UserError, match="does not know 'opt' models"):
        Gguf.check(model, [], GRIDS["q4_0"])


def test_a_missing_tokenizer_stops_before_any_work(tiny_llama, tmp_path):
    for file in tiny_llama.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = Checkpoint(tmp_path, "bare")
    with pytest.raises(UserError, match="tokenizer"):
        Gguf(tmp_path, checkpoint, checkpoint.skeleton(CPU))
    assert not (tmp_path / FILE).exists()


def test_a_pre_tokenizer_llama_cpp_would_split_otherwise():
    with pytest.raises(UserError, match="splits by Whitespace"):
        pre_tokenizer({"pre_tokenizer": {"type": "Whitespace"}})


def test_damaged_files(tiny_llama, tmp_path):
    written(tiny_llama, tmp_path / "out", GRIDS["q4_0"])
    data = (tmp_path / "out" / FILE).read_bytes()
    bad = tmp_path / "bad.gguf"
    for content in (data[: len(data) // 2], data[:200], b"PK" + data[2:], b"GGUF"):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="not a GGUF file, or damaged"):
            read(bad)
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.gguf")
    runtime(tmp_path / "out").close()
    for content in (data[: len(data) // 2], b"GGUF"):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="cannot be loaded by llama.cpp"):
            runtime(bad)


def test_a_foreign_file(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "clip.gguf", "clip")
    writer.add_tensor("a", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture clip is not known"):
        read(tmp_path / "clip.gguf")
