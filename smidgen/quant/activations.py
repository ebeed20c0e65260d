"""Static ranges of activations from what was observed: minimum and maximum, or the ends that round best; and what they clip.

    min-max    low, high of all values
    mse        (p low, q high), p, q <= 1, with the least mean (Q(x) - x)^2 over the observed sample

The mean squared error of a range is clipping at its ends plus rounding inside, s^2 / 12; a few outliers are better clipped than given the
scale. Both ends are searched together on a grid of ratios, twice: equal steps of the logarithm first, then finer ones around the best.
The sample leaves out most values and often the extremes; then these are added, with the weight they have among all values, lest a rare
but huge value be clipped as if it were not there. The search is ours: what the Quadapter paper's ranges start from is not known to us.
Ranges found by what layers return, instead of by their inputs, are in transforms/clip.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant.ranges import Kind, Link
from smidgen.quant.simulate import Activation, QuantLinear, activations_of, unquantized

Search = Literal["min-max", "mse"]
VALUES = 2**15  # of the sample, at most
COARSE = torch.logspace(0, -6, 25, base=2, dtype=torch.float64)  # ratios to the observed end, 1 to 1/64
FINE = torch.logspace(0.2, -0.2, 9, base=2, dtype=torch.float64)  # of the best of them


@torch.no_grad()
def observe(model: PreTrainedModel, layers: dict[str, QuantLinear], tokens: Int[Tensor, "n length"]) -> None:
    """Shows the activations' values of the unquantized model to their quantizers."""
    for _, activation in activations_of(layers):
        activation.forget()
    with unquantized(layers, "observe"):
        for window in tokens:
            model(window[None].to(model.device), use_cache=False)


def fix_ranges(layers: dict[str, QuantLinear], how: Search, kind: Kind = "min-max", link: Link = "exp") -> dict[str, tuple[float, float]]:
    """From what is known of activations to learned ranges, where they stand now; returns them by the name of their first reader.

    `min-max` takes the ends as they are, be they observed or found with factors; `mse` searches the values observed.
    """
    found = {}
    for name, activation in activations_of(layers):
        if not bool(activation.low.isfinite() & activation.high.isfinite()):
            raise UserError(f"{name}: its inputs were not observed, or are not finite; are the model's weights damaged?")
        low, high = search(activation) if how == "mse" else (activation.low, activation.high)
        activation.fix(low, high, kind, link)
        found[name] = (float(low), float(high))
    return found


def search(activation: Activation) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The best ends of an observed activation."""
    sample = torch.cat(activation.sample).double()
    sample = sample[:: -(-len(sample) // VALUES)]
    ends = torch.stack([activation.low, activation.high]).double().cpu()
    missed = ends[~torch.isin(ends, sample)]
    values = torch.cat([sample, missed])
    weights = torch.cat([torch.ones_like(sample), torch.full_like(missed, len(sample) / activation.count)])
    low, high = ends[0].clamp(max=0), ends[1].clamp(min=0)
    p = q = torch.tensor(1.0, dtype=torch.float64)
    for ratios in (COARSE, FINE):
        below, above = (p * ratios).clamp(max=1), (q * ratios).clamp(max=1)
        errors = torch.stack([mean_squares(values, weights, low * r, high * above, activation.bits) for r in below])
        row, column = divmod(int(errors.argmin()), len(ratios))
        p, q = below[row], above[column]
    return (low * p).to(activation.low), (high * q).to(activation.high)


def mean_squares(
    values: Float[Tensor, "n"], weights: Float[Tensor, "n"], low: Float[Tensor, ""], highs: Float[Tensor, "candidates"], bits: int
) -> Float[Tensor, "candidates"]:
    """Mean (Q(x) - x)^2 of one lower end with each of several upper ends."""
    top = 2**bits - 1
    scale = ((highs - low) / top).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    zero = (-low / scale).round()
    rounded = scale * (((values / scale).round() + zero).clamp(0, top) - zero)
    return ((rounded - values).square() * weights).sum(1) / weights.sum()


@dataclass(frozen=True)
class Reach:
    """How far an activation's quantizer reaches."""

    low: float
    high: float
    clipped: float
    "The share of values whose code had to be clipped."


@torch.no_grad()
def clipping(model: PreTrainedModel, layers: dict[str, QuantLinear], tokens: Int[Tensor, "n length"]) -> dict[str, Reach]:
    """The range of every activation, and what it clips of its values on `tokens`."""
    with counting(layers) as counts:
        for window in tokens:
            model(window[None].to(model.device), use_cache=False)
    found = {}
    for name, activation in activations_of(layers):
        assert activation.range is not None
        low, high = activation.range.ends()
        found[name] = Reach(float(low), float(high), sum(counts[name]) / len(counts[name]))
    return found


@contextmanager
def counting(layers: dict[str, QuantLinear]) -> Iterator[dict[str, list[float]]]:
    """Name -> the share clipped, per call of the simulated model."""
    counts: dict[str, list[float]] = {}
    handles = []
    for name, activation in activations_of(layers):
        shares = counts.setdefault(name, [])

        def count(module: nn.Module, inputs: tuple[Tensor], shares: list[float] = shares) -> None:
            shares.append(module.range.clipped(inputs[0]))  # pyright: ignore  `fix` gave all of them one

        handles.append(activation.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
