"""Fixtures: offline text, and four tiny language models trained on it.

`tiny_llama`, `tiny_opt`, `tiny_gpt2` and `tiny_qwen3` are folders as `from_pretrained` reads them: float32 safetensors,
config and a byte-level tokenizer. 2 layers, width 64, 4 heads (2 key/value heads in Llama and Qwen3), 128 positions, about
5 s each, made when first asked for and shared by the session: read only. They are trained, so layers have correlated inputs and it means
something who wins. `train_text` is what they learnt from (take calibration text from it), `test_text` is held out.
"""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny matrices: a second thread only waits for the first, and sums stay in one order

VOCABULARY = 384
LENGTH = 64  # tokens in a training sequence
STEPS = 300
INIT = 0.06  # standard deviation of initial weights; the usual 0.02 wastes the first hundred steps at this width


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The processor always, a CUDA device under `pytest -m gpu`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    from smidgen.texts import read_text

    prose = read_text("docstrings:numpy")
    folder = tmp_path_factory.mktemp("texts")
    train, test = folder / "train.txt", folder / "test.txt"
    train.write_text(prose[:500_000], encoding="utf-8")
    test.write_text(prose[500_000:540_000], encoding="utf-8")
    return train, test


@pytest.fixture(scope="session")
def train_text(texts) -> Path:
    """English the tiny models were trained on, about 200,000 of their tokens."""
    return texts[0]


@pytest.fixture(scope="session")
def test_text(texts) -> Path:
    """More of the same that they never saw, about 16,000 tokens."""
    return texts[1]


@pytest.fixture(scope="session")
def tokenizer(train_text) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with 384 entries; entry 0 is <|endoftext|>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([train_text.read_text(encoding="utf-8")[:100_000]], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end)


@pytest.fixture(scope="session")
def train_tokens(train_text, tokenizer) -> torch.Tensor:
    """Training sequences, (n, LENGTH)."""
    return sequences(train_text, tokenizer)


@pytest.fixture(scope="session")
def test_tokens(test_text, tokenizer) -> torch.Tensor:
    """Held-out sequences, (n, LENGTH)."""
    return sequences(test_text, tokenizer)


def sequences(text: Path, tokenizer) -> torch.Tensor:
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tokenizer, train_tokens):
    """Trains the model of a config and saves it with its tokenizer."""

    def train(name: str, config: transformers.PreTrainedConfig) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
            for _ in range(STEPS):
                batch = train_tokens[torch.randint(len(train_tokens), (16,))]
                logits = model(batch, use_cache=False).logits[:, :-1]
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return train


@pytest.fixture(scope="session")
def tiny_llama(trained) -> Path:
    """A trained Llama: rotary angles, RMSNorm, SwiGLU, two query heads per key/value head."""
    return trained("tiny-llama", transformers.LlamaConfig(num_key_value_heads=2, **decoder()))


@pytest.fixture(scope="session")
def tiny_qwen3(trained) -> Path:
    """A trained Qwen3: like Llama, with QK-norm and tied embeddings."""
    return trained("tiny-qwen3", transformers.Qwen3Config(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **decoder()))


@pytest.fixture(scope="session")
def tiny_opt(trained) -> Path:
    """A trained OPT: learned positions, LayerNorm, biases, ReLU, tied embeddings."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, dropout=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=1, init_std=INIT,
    )  # fmt: skip
    return trained("tiny-opt", config)


@pytest.fixture(scope="session")
def tiny_gpt2(trained) -> Path:
    """A trained GPT-2: one fused query-key-value layer, weights stored (in, out), tied embeddings."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=128,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0, initializer_range=INIT,
    )  # fmt: skip
    return trained("tiny-gpt2", config)


def decoder() -> dict:
    return dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0, initializer_range=INIT,
    )  # fmt: skip


@pytest.fixture(params=["tiny_llama", "tiny_opt", "tiny_gpt2", "tiny_qwen3"])
def tiny_model(request) -> Path:
    """Each of the trained models in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def blocks_of():
    """(folder, tokens) -> the blocks of a model in order, each with its inputs, run in float32."""
    from smidgen.quant.blocks import walk
    from smidgen.quant.checkpoint import Checkpoint

    def blocks(folder: Path, tokens: torch.Tensor | None, precision: torch.dtype = torch.float32):
        cpu = torch.device("cpu")
        checkpoint = Checkpoint(folder, folder.name)
        return walk(checkpoint, checkpoint.skeleton(cpu), tokens, cpu, precision)

    return blocks


@pytest.fixture(scope="session")
def quantized(blocks_of):
    """(folder, tokens, solver, grid) -> the model with its blocks quantized in order, as `smidgen quantize` does it."""
    from smidgen.quant.collect import collect

    @torch.no_grad()
    def quantize(folder: Path, tokens: torch.Tensor, solver, grid):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for block in blocks_of(folder, tokens):
            stats = collect(block, solver.needs)
            for matrix in block.matrices():
                w = matrix.weight()
                w.copy_(solver(w, stats.get(matrix.name), grid).dequantize())
            model.get_submodule(block.name).load_state_dict(block.module.state_dict())
        return model

    return quantize


@pytest.fixture(scope="session")
def perplexity():
    """(model, tokens) -> exp of the mean negative log-likelihood."""

    @torch.no_grad()
    def measure(model, tokens: torch.Tensor) -> float:
        logits = model(tokens, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).exp().item()

    return measure


@pytest.fixture
def generator() -> torch.Generator:
    """A generator seeded anew for every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def normal(generator):
    """(*shape) -> float64 numbers from the standard normal distribution."""
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def moments(normal):
    """(heads, d) -> second moments of correlated inputs with unequal variances, float64."""

    def draw(heads: int, d: int) -> torch.Tensor:
        x = normal(heads, 4 * d + 4, d) @ normal(heads, d, d)
        return x.mT @ x / x.shape[1]

    return draw
