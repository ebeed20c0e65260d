"""`smidgen run` and `smidgen bench`, on a runtime that is the model itself."""

import json

import numpy as np
import pytest
import torch
import transformers

import smidgen.quant.generate as generate
from smidgen.cli import main
from smidgen.errors import UserError
from smidgen.quant.runtimes import find


class Plain:
    """The Runtime protocol, without a cache."""

    name = "plain"

    @classmethod
    def open(cls, artifact, length=1024, threads=None):
        self = cls()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(artifact).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(artifact)
        return self

    @torch.inference_mode()
    def logits(self, tokens):
        return self.model(torch.from_numpy(np.array(tokens))[None]).logits[0].numpy()

    def start(self, tokens):
        self.tokens = list(tokens)
        return self.logits(self.tokens)[-1]

    def step(self, token):
        return self.start([*self.tokens, token])

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, tokens):
        return self.tokenizer.decode(tokens)

    def ends(self, token):
        return token == self.tokenizer.eos_token_id

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(generate, "find", lambda artifact: (artifact, Plain.open))


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_run_writes_what_the_model_would(tiny_llama, tokenizer, capsys):
    prompt = "Return a new array"
    assert main(["run", str(tiny_llama), prompt, "--tokens", "12"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=[0])[0, ids.shape[1] :]
    assert found["text"] == tokenizer.decode(expected) and out.startswith(found["text"])


def test_temperature_draws_and_a_seed_repeats(tiny_llama, capsys):
    def text(*options: str) -> str:
        assert main(["run", str(tiny_llama), "The", "--tokens", "16", *options]) == 0
        return last(capsys)["text"]

    hot = [text("--temperature", "1", "--seed", str(seed)) for seed in (0, 1, 0)]
    assert hot[0] == hot[2] != hot[1]
    assert text("--temperature", "0.0001") == text()


def test_drawing_follows_the_softmax():
    generator = np.random.default_rng(0)
    logits = np.log(np.array([0.1, 0.2, 0.7], dtype=np.float32))
    counts = np.bincount([generate.drawn(logits, 1.0, generator) for _ in range(4000)], minlength=3) / 4000
    assert counts == pytest.approx([0.1, 0.2, 0.7], abs=0.03)


def test_bench_measures_speed_and_the_perplexity_evaluate_measures(tiny_llama, test_text, tmp_path, capsys):
    text = ["--text", str(test_text), "--length", "64", "--windows", "4"]
    assert main(["bench", str(tiny_llama), *text, "--prompt-tokens", "32", "--new-tokens", "4", "--output", str(tmp_path / "b")]) == 0
    bench = last(capsys)
    assert main(["evaluate", str(tiny_llama), *text, "--output", str(tmp_path / "e")]) == 0
    assert bench["perplexity"][str(test_text)] == pytest.approx(last(capsys)["perplexity"][str(test_text)], rel=0.005)
    assert bench["prefill_tokens_per_second"] == pytest.approx(32_000 / bench["first_token_ms"])
    assert bench["decode_tokens_per_second"] > 0 and bench["peak_memory_bytes"] > bench["size_bytes"]


def test_bad_input_is_one_line(tiny_llama, tmp_path, capsys):
    for arguments, line in (
        (["run", str(tiny_llama), ""], "the prompt has 0 tokens"),
        (["run", str(tiny_llama), "a", "--tokens", "0"], "--tokens"),
        (["bench", str(tiny_llama), "--new-tokens", "0"], "--new-tokens"),
        (["bench", str(tiny_llama), "--windows", "0"], "--windows at least 1 or none, got 1024 and 0"),
        (["bench", str(tiny_llama), "--length", "1"], "--length must be at least 2"),
        (["run", str(tiny_llama), "a", "--seed", "-1"], "--seed must be"),
    ):
        assert main(arguments) == 2
        assert line in capsys.readouterr().err.splitlines()[-1]


def test_only_what_a_runtime_loads_is_opened(tmp_path):
    with pytest.raises(UserError, match="no such artifact"):
        find(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing a runtime here loads"):
        find(tmp_path)


def test_transformers_writes_with_its_cache_what_it_reads_whole(tiny_llama, test_tokens):
    folder, runtime = find(tiny_llama)
    opened = runtime(folder, 64)
    tokens = test_tokens[0, :24].numpy()
    whole = opened.logits(tokens)
    stepped = [opened.start(tokens[:16]), *(opened.step(int(t)) for t in tokens[16:])]
    np.testing.assert_allclose(np.stack(stepped), whole[15:], atol=1e-4)
    text = opened.decode(tokens.tolist())
    assert opened.decode(opened.encode(text)) == text
    opened.close()
