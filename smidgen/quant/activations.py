"""Static ranges of activations from what was observed: minimum and maximum, or the ends that round best.

    min-max    low, high of all values
    mse        (p low, q high), p, q <= 1, with the least mean (Q(x) - x)^2 over the observed sample

The mean squared error of a range is clipping at its ends plus rounding inside, s^2 / 12; a few outliers are better clipped than given the
scale. Both ends are searched together on a grid of ratios, twice: equal steps of the logarithm first, then finer ones around the best.
The sample leaves out most values and often the extremes; then these are added, with the weight they have among all values, lest a rare
but huge value be clipped as if it were not there. The search is ours: what the Quadapter paper's ranges start from is not known to us.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.quant.ranges import Kind, Link
from smidgen.quant.simulate import Activation, QuantLinear, activations_of

Search = Literal["min-max", "mse"]
VALUES = 2**15  # of the sample, at most
COARSE = torch.logspace(0, -6, 25, base=2, dtype=torch.float64)  # ratios to the observed end, 1 to 1/64
FINE = torch.logspace(0.2, -0.2, 9, base=2, dtype=torch.float64)  # of the best of them


def fix_ranges(layers: dict[str, QuantLinear], how: Search, kind: Kind = "min-max", link: Link = "exp") -> dict[str, tuple[float, float]]:
    """From mode observe to learned ranges, where they stand now; returns them by the name of the first layer that reads them."""
    found = {}
    for name, activation in activations_of(layers):
        if not bool(activation.low <= activation.high):
            raise UserError(f"{name}: its inputs were not observed, or are not numbers; run the model in mode observe first")
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
