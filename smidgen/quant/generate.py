"""An artifact at work in its own runtime: `smidgen run` continues a prompt, `smidgen bench` measures.

Neither needs torch, unless the runtime is one that does.
"""

import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from jaxtyping import Float32, Int

from smidgen.errors import UserError, check_seed
from smidgen.process import peak_bytes, reset_peak
from smidgen.quant.runtimes import Runtime, find
from smidgen.run import Run
from smidgen.texts import read_text

CONTEXT = 2048  # tokens of prompt and answer together


@Parameter(name="*")
@dataclass(frozen=True)
class Prompt:
    """Options of `smidgen run`."""

    artifact: Path
    "A .gguf file, the folder of an artifact, or the folder of a run."
    prompt: str
    "The text to continue."
    _: KW_ONLY
    tokens: int = 100
    "Tokens to write at most."
    temperature: float = 0.0
    "0 takes the likeliest token; higher draws more freely."
    seed: int = 0
    "Of the drawing."
    threads: int | None = None
    "Threads; by default the runtime's own choice."


@Parameter(name="*")
@dataclass(frozen=True)
class Bench:
    """Options of `smidgen bench`."""

    artifact: Path
    "A .gguf file, the folder of an artifact, or the folder of a run."
    _: KW_ONLY
    prompt_tokens: int = 512
    "Tokens of the prompt."
    new_tokens: int = 64
    "Tokens written after it."
    repeats: int = 3
    "Medians of so many."
    text: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()
    "Texts for perplexity in the runtime: text file, file.jsonl:field, docstrings:PACKAGE, hf:NAME[:CONFIG[:SPLIT[:FIELD]]]."
    length: int = 1024
    "Tokens in a window of these texts."
    windows: int | None = 24
    "Windows of each text, from its start; none: all."
    threads: int | None = None
    "Threads; by default the runtime's own choice."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/bench."


def run_command(config: Prompt) -> dict[str, Any]:
    """Continue a prompt in the artifact's own runtime."""
    if config.tokens < 1 or config.temperature < 0:
        raise UserError("--tokens must be at least 1 and --temperature not negative")
    check_seed(config.seed)
    tokens: list[int] = []
    artifact, opened = find(config.artifact)
    with closing(opened(artifact, min(CONTEXT, len(config.prompt.encode()) + config.tokens), config.threads)) as runtime:
        prompt = np.array(runtime.encode(config.prompt))
        if not 0 < len(prompt) <= CONTEXT - config.tokens:
            raise UserError(f"the prompt has {len(prompt)} tokens; with {config.tokens} more it must have 1 to {CONTEXT}")
        started, shown = time.monotonic(), ""
        for token in continued(runtime, prompt, config.tokens, config.temperature, config.seed):
            tokens.append(token)
            text = runtime.decode(tokens)
            if not text.endswith("\ufffd"):  # a character is complete
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text
        seconds, text = time.monotonic() - started, runtime.decode(tokens)
        sys.stdout.write(text[len(shown) :] + "\n")  # a character may have stayed incomplete
        return {"runtime": runtime.name, "prompt": config.prompt, "text": text, "tokens": len(tokens), "seconds": seconds}


def continued(runtime: Runtime, prompt: Int[np.ndarray, "n"], count: int, temperature: float, seed: int) -> Iterator[int]:
    """Tokens after a prompt, until one ends the text."""
    generator = np.random.default_rng(seed)
    logits = runtime.start(prompt)
    for i in range(count):
        token = drawn(logits, temperature, generator)
        if runtime.ends(token):
            return
        yield token
        if i + 1 < count:
            logits = runtime.step(token)


def drawn(logits: Float32[np.ndarray, "vocab"], temperature: float, generator: np.random.Generator) -> int:
    """The likeliest token, or one drawn from the softmax."""
    if temperature == 0:
        return int(logits.argmax())
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return int(generator.choice(len(p), p=p / p.sum()))


def bench_command(config: Bench) -> dict[str, Any]:
    """Measure an artifact in its own runtime: speed, memory, perplexity."""
    if min(config.prompt_tokens, config.new_tokens, config.repeats) < 1:
        raise UserError("--prompt-tokens, --new-tokens and --repeats must be at least 1")
    if config.length < 2 or (config.windows is not None and config.windows < 1):
        raise UserError(f"--length must be at least 2 and --windows at least 1 or none, got {config.length} and {config.windows}")
    with Run("bench", config, config.output, config.artifact.stem) as run:
        return bench(config, run)


def bench(config: Bench, run: Run) -> dict[str, Any]:
    """Load, read a prompt, write, read texts."""
    artifact, opened = find(config.artifact)
    reset_peak()
    before, started = peak_bytes(), time.monotonic()
    with closing(opened(artifact, max(config.length, config.prompt_tokens + config.new_tokens), config.threads)) as runtime:
        loaded = time.monotonic() - started
        texts = {text: windows(runtime, text, config) for text in config.text}
        tokens = np.array(runtime.encode(read_text("docstrings:numpy"))[: config.prompt_tokens])
        times = [timed(runtime, tokens, config.new_tokens) for _ in run.track(range(config.repeats), "generating", config.repeats)]
        first, rest = (statistics.median(t) for t in zip(*times, strict=True))
        peak = peak_bytes()
        perplexities = {text: perplexity(runtime, tokens, run, text) for text, tokens in texts.items()}
        return run.finish(
            runtime=runtime.name,
            artifact=str(artifact),
            size_bytes=size(artifact),
            load_seconds=loaded,
            first_token_ms=1000 * first,
            prefill_tokens_per_second=len(tokens) / first,
            decode_tokens_per_second=config.new_tokens / rest,
            peak_memory_bytes=peak,
            memory_before_bytes=before,
            perplexity=perplexities,
        )


def timed(runtime: Runtime, prompt: Int[np.ndarray, "n"], count: int) -> tuple[float, float]:
    """Seconds to the first token after a prompt, and for `count` more."""
    started = time.monotonic()
    token = int(runtime.start(prompt).argmax())
    first = time.monotonic() - started
    for _ in range(count):
        token = int(runtime.step(token).argmax())
    return first, time.monotonic() - started - first


def windows(runtime: Runtime, text: str, config: Bench) -> Int[np.ndarray, "windows length"]:
    """A text's first windows of tokens, as `smidgen.texts.windows` has them, which needs torch."""
    tokens = np.array(runtime.encode(read_text(text)))
    count = len(tokens) // config.length
    if count == 0:
        raise UserError(
            f"{text}: {len(tokens)} tokens are less than one window of {config.length}; use a longer text or a smaller --length"
        )
    return tokens[: count * config.length].reshape(count, -1)[: config.windows]


def perplexity(runtime: Runtime, tokens: Int[np.ndarray, "windows length"], run: Run, text: str) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window, as `smidgen evaluate` has it."""
    total = 0.0
    for window in run.track(tokens, f"perplexity on {text}", len(tokens)):
        logits = runtime.logits(window)[:-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        likelihood = logits[np.arange(len(logits)), window[1:]] - top[:, 0] - np.log(np.exp(logits - top).sum(-1))
        total -= float(likelihood.sum())
    if not math.isfinite(total):
        raise UserError(f"perplexity on {text} is not finite in {runtime.name}")
    return math.exp(total / tokens[:, 1:].size)


def size(artifact: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return artifact.stat().st_size if artifact.is_file() else sum(f.stat().st_size for f in artifact.rglob("*") if f.is_file())
