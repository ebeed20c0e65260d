"""Language models in training: the loss of the next token, what is followed meanwhile, and which parameters an optimizer is given.

Quantization-aware training (qat.py) and Quadapter's second phase (integers.py) differ in the groups of parameters alone. With a teacher
the loss is, averaged over all predicted tokens and with p, q the teacher's and the model's probabilities,

    (1 - share) (-log q[next token]) + share KL(p || q)

A simulated model starts ten thousand kernels per update, for a fifth of the time on a GPU: there the loss and its gradients are graphs.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.cuda_graphs import captured
from smidgen.errors import UserError
from smidgen.fit import Evaluate, FitConfig, FitResult, Loss, fit, shuffled
from smidgen.quant.evaluate import exponential, mean, window_loss
from smidgen.quant.ranges import Range
from smidgen.quant.simulate import QuantLinear, activations_of
from smidgen.run import Run

FEW_BITS = 4  # up to which scale-offset trains well
EXACT = torch.float32  # of products where quantized models are measured: bfloat16 rounds as coarsely as the quantizers


def train(
    model: nn.Module,
    groups: list[dict[str, Any]],
    tokens: Int[Tensor, "n length"],
    config: FitConfig,
    run: Run,
    batch: int = 8,
    teacher: nn.Module | None = None,
    share: float = 0.5,
    evaluate: Evaluate | None = None,
) -> FitResult:
    """Trains the parameters in `groups` to predict `tokens`; all others are frozen. Weights and ranges: QAT; without weights: Quadapter.

    Dropout is off. Of `evaluate`, see `fit`. On one CUDA device without accumulation, the loss and its gradients are two CUDA graphs.
    """
    check_ranges(model, run)
    model.eval()
    loss, batches = prediction_loss(teacher, share), shuffled(tokens, batch, config.seed)
    device = next(model.parameters()).device
    if device.type == "cuda" and config.accumulation == 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        try:
            loss = graphed(loss, model, groups, batches(0).to(device), config.products(device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch has no narrower one for what a capture does not permit
            reason = str(error).partition("\n")[0]
            run.say(f"warning: not recorded as CUDA graphs, hence slower: {reason}")
    return fit(model, loss, batches, config, run, groups=groups, evaluate=evaluate)


def graphed(
    loss: Loss, model: nn.Module, groups: list[dict[str, Any]], example: Int[Tensor, "batch length"], precision: torch.dtype
) -> Loss:
    """`loss` for batches like the example: a simulated model starts ten thousand kernels per update, which takes longer than they run.

    A second backward pass before the gradients are cleared would overwrite them, so no batches can be accumulated.
    """
    model.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    with torch.autocast(example.device.type, precision, enabled=precision != torch.float32):
        recorded = captured(_Loss(loss, model), (example,))
    return lambda model, batch: recorded(batch)


class _Loss(nn.Module):
    """The loss as a function of the batch alone."""

    def __init__(self, loss: Loss, model: nn.Module) -> None:
        super().__init__()
        self.loss, self.model = loss, model
        self.eval()

    def forward(self, batch: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        return self.loss(self.model, batch)


def prediction_loss(teacher: nn.Module | None = None, share: float = 0.5) -> Loss:
    """Cross entropy of the next token; `share` of it replaced by the divergence from a teacher, where there is one."""

    def loss(model: nn.Module, batch: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        logits = model(batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)  # (batch * (length - 1), vocabulary)
        entropy = F.cross_entropy(logits, batch[:, 1:].flatten())
        if teacher is None:
            return entropy
        with torch.no_grad():
            target = teacher(batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        divergence = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
        return (1 - share) * entropy + share * divergence

    return loss


def split(tokens: Int[Tensor, "n length"], held_out: float) -> tuple[Int[Tensor, "a length"], Int[Tensor, "b length"]]:
    """The windows trained on, and at least one, the last ones, held out."""
    count = max(1, round(held_out * len(tokens)))
    if count >= len(tokens):
        raise UserError(
            f"the training text makes {len(tokens)} windows, of which {count} would be held out and none is left; "
            "use a longer text, a smaller --length or a smaller --held-out"
        )
    return tokens[:-count], tokens[-count:]


def check_ranges(model: nn.Module, run: Run) -> None:
    """Scale and offset unscaled cannot share a learning rate: the offset travels codes, the scale fractions of a unit."""
    ranges = [m for m in model.modules() if isinstance(m, Range) and m.kind == "scale-offset"]
    if any(not r.normalised for r in ranges):
        raise UserError("ranges by raw scale and offset do not train: use normalised scale-offset, min-max or beta-gamma")
    if any(r.bits > FEW_BITS for r in ranges):
        run.say(f"warning: scale-offset trains poorly above {FEW_BITS} bits; min-max and beta-gamma do not")


def weight_groups(model: nn.Module, layers: dict[str, QuantLinear], decay: float = 0.0) -> list[dict[str, Any]]:
    """All parameters but the ranges and adapters, for the optimizer; only matrices decay."""
    others = {p for quant in layers.values() if quant.alpha is not None for p in (quant.alpha,)}
    others |= {p for m in model.modules() if isinstance(m, Range) for p in m.parameters()}
    own = [p for p in model.parameters() if p not in others]
    groups = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def range_groups(layers: dict[str, QuantLinear], learning_rate: float) -> list[dict[str, Any]]:
    """The ranges of activations and weights, for the optimizer: no decay, and steps relative to the range in every parameterisation."""
    ranges = [a.range for _, a in activations_of(layers)] + [quant.range for quant in layers.values()]
    relative, groups = [], []
    for r in ranges:
        if r is None:
            continue
        for name, p in r.named_parameters():
            if r.kind == "scale-offset" and name == "scale":
                groups.append({"params": [p], "lr": learning_rate * float(p.detach().abs().mean()), "weight_decay": 0.0})
            else:
                relative.append(p)
    return groups + ([{"params": relative, "lr": learning_rate, "weight_decay": 0.0}] if relative else [])


def measuring(
    model: PreTrainedModel, held_out: Int[Tensor, "n length"], texts: dict[str, Int[Tensor, "m length"]]
) -> Callable[[nn.Module], dict[str, Any]]:
    """What is followed while a model trains: the loss on held-out text, and perplexities."""
    loss = window_loss(model, EXACT, recorded=True)

    def measure(_: nn.Module) -> dict[str, Any]:
        return {"held_out": mean(loss, held_out), "perplexity": {text: exponential(mean(loss, t)) for text, t in texts.items()}}

    return measure
