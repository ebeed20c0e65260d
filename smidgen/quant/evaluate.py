"""Perplexity of a model or artifact: `smidgen evaluate`.

Protocol: no special tokens, non-overlapping windows, mean negative log-likelihood over all predicted tokens (a window
of L tokens predicts L - 1), exponentiated.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.precision import forward_precision, pick_device
from smidgen.quant.checkpoint import Checkpoint, check_length
from smidgen.quant.load import load_artifact
from smidgen.quant.replay import replayed
from smidgen.run import Run
from smidgen.texts import windows

PROMPTS = ("The history of the city began when", "To save energy, a small computer should", "Once upon a time there was a king who")
NEW_TOKENS = 40


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen evaluate`."""

    model: str
    "A model (folder, .gguf file, hub id or smollm2-135m), an artifact, or the folder of a run."
    _: KW_ONLY
    text: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("docstrings:numpy",)
    "Texts to evaluate on: text file, file.jsonl:field, docstrings:PACKAGE, hf:NAME[:CONFIG[:SPLIT[:FIELD]]]."
    length: int = 1024
    "Tokens in a window."
    windows: int | None = None
    "Windows per text, from its start; all of them if not given."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/evaluate."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."


def command(config: Config) -> dict[str, Any]:
    """Measure the perplexity of a model or artifact on texts."""
    with Run("evaluate", config, config.output, Path(config.model).name) as run:
        return main(config, run)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Loads the model as any user would, and reads every text once."""
    device = pick_device(config.device)
    folder = Path(config.model)
    folder = folder / "artifact" if (folder / "artifact" / "config.json").is_file() else folder
    if not (folder / "config.json").is_file():
        folder = Checkpoint.open(config.model).folder
    checkpoint = Checkpoint(folder, folder.name)
    check_length(checkpoint.config, config.length)
    tokenizer = checkpoint.tokenizer()
    texts = {source: windows(source, tokenizer, config.length, config.windows) for source in config.text}
    model = load_artifact(folder, torch.float32, device)
    perplexities = {source: perplexity(model, tokens, run, source) for source, tokens in texts.items()}
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return run.finish(model=config.model, perplexity=perplexities, tokens={s: t.numel() for s, t in texts.items()}, size_bytes=size)


def perplexity(
    model: PreTrainedModel,
    tokens: Int[Tensor, "windows length"],
    run: Run,
    label: str,
    precision: torch.dtype | None = None,
    recorded: bool = False,
) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window; of the options, see `mean_loss`."""
    lost = mean_loss(model, run.track(tokens, f"perplexity on {label}", len(tokens)), precision, recorded)
    if not math.isfinite(lost):
        raise UserError(f"perplexity on {label} is not finite: the model's weights or its type cannot represent its activations")
    return exponential(lost)


@torch.inference_mode()
def mean_loss(
    model: PreTrainedModel, tokens: Iterable[Int[Tensor, "length"]], precision: torch.dtype | None = None, recorded: bool = False
) -> float:
    """Mean negative log-likelihood, in nats, of every token but the first of each window; of the options, see `window_loss`."""
    return mean(window_loss(model, precision, recorded), tokens)


WindowLoss = Callable[[Int[Tensor, "length"]], Float[Tensor, ""]]


def window_loss(model: PreTrainedModel, precision: torch.dtype | None = None, recorded: bool = False) -> WindowLoss:
    """The sum over a window's tokens but the first; products by default in the fast type.

    `recorded`: on a CUDA device as a graph, which a model of many small kernels (simulate.py) needs to be fast.
    """
    device = next(model.parameters()).device
    precision = precision or forward_precision(device)

    def summed(window: Int[Tensor, "length"]) -> Float[Tensor, ""]:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(window[None], use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum")

    loss = replayed(summed) if recorded else summed
    return lambda window: loss(window.to(device))


@torch.inference_mode()
def mean(loss: WindowLoss, tokens: Iterable[Int[Tensor, "length"]]) -> float:
    """Over all predicted tokens, in nats."""
    total, count = 0.0, 0
    for window in tokens:
        total += float(loss(window))
        count += len(window) - 1
    return total / count


def exponential(lost: float) -> float:
    """exp, infinite where a float cannot hold it."""
    return math.exp(lost) if lost < math.log(sys.float_info.max) else math.inf


@torch.inference_mode()
def generate(model: Any, tokenizer: Any) -> dict[str, str]:
    """Greedy continuations of a few prompts."""
    device = next(model.parameters()).device
    samples = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device)
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        samples[prompt] = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return samples
