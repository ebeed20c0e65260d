"""Static ranges that clip, found block by block: by what the layers that read a tensor return, not by the tensor itself.

    min_(p, q)  sum_t |W (Q(u_t; p low, q high) - u_t)|^2             u = alpha x,  W: the layers that read u, divided by alpha

with low, high the mean extremes of the batches and p, q <= 1 searched in turn, the farther end first: by halves of octaves down to 1/64,
then finer. A row of W gets the scale of least squared error, each column weighed by the mean of u^2. Errors of all tokens count alike:
decoders carry a few huge activations (Sun et al., arXiv 2402.17762), of a text's first token above all, on which attention rests. Counted
relative to the token's size they would be clipped, and the model lost (docs/activations.md). The search is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.grid import Narrow
from smidgen.quant.ranges import fake_quantize
from smidgen.quant.simulate import Activation, QuantLinear
from smidgen.quant.transforms.alpha import Adapted
from smidgen.quant.transforms.samples import sampled

COARSE = [2 ** (-i / 2) for i in range(13)]
FINE = [2 ** (i / 8) for i in (3, 2, 1, 0, -1, -2, -3)]  # times the best of them


@dataclass(frozen=True)
class Clip:
    """Ranges alone, or after another method's factors."""

    first: Callable[[Adapted], dict[str, float]] | None = None

    def __call__(self, block: Adapted) -> dict[str, float]:
        """Sets the reach of every activation and weight; returns the error before."""
        row = {"error_before": block.error()} if self.first is None else self.first(block)
        clip(block)
        return row


@torch.no_grad()
def clip(block: Adapted) -> None:
    """Sets the reach of every activation and weight of a block, or of one kind alone, or of none if that makes the least error."""
    samples = sampled(block)
    reaches: dict[Activation, nn.Parameter] = {}
    shrinks: dict[QuantLinear, nn.Parameter] = {}
    for activation, sample in samples.items():
        readers = [quant for quant in block.layers.values() if quant.activation is activation]
        w = torch.cat([quant.scaled_weight().float() for quant in readers])
        p, q = searched(sample.rows, w, sample.stands, sample.low, sample.high, activation.bits)
        reaches[activation] = nn.Parameter(w.new_tensor([p, q]).log())
        shrinks |= {quant: nn.Parameter(shrink(quant, sample.stands @ sample.rows.square())) for quant in readers}

    def put(inputs: bool, weights: bool, few: bool) -> float:
        for activation, reach in reaches.items():
            activation.reach = reach if inputs else nn.Parameter(torch.zeros_like(reach))
        for quant, ratio in shrinks.items():
            quant.shrink = ratio if weights else nn.Parameter(torch.zeros_like(ratio))
        return block.error(few)

    best = min(product((True, False), repeat=2), key=lambda kinds: put(*kinds, few=True))
    if any(best) and put(False, False, few=False) >= put(*best, few=False):
        return
    put(False, False, few=True)


def searched(
    u: Float[Tensor, "n in"], w: Float[Tensor, "out in"], stands: Float[Tensor, "n"], low: Tensor, high: Tensor, bits: int
) -> tuple[float, float]:
    """p and q with the least sum over tokens, one for `stands` of them, of |W (Q(u_t) - u_t)|^2."""
    w = torch.linalg.qr(w, mode="r").R if len(w) > w.shape[1] else w  # as long, and smaller
    top = 2**bits - 1

    def error(p: float, q: float) -> float:
        ends = p * low.clamp(max=0), q * high.clamp(min=0)
        scale = ((ends[1] - ends[0]) / top).clamp(min=torch.finfo(torch.float32).tiny)
        e = fake_quantize(u, scale, (-ends[0] / scale).round(), top) - u
        return float((e @ w.T).square().sum(1) @ stands)

    return best_ends(error, bool(high >= -low))


def best_ends(error: Callable[[float, float], float], upper_first: bool) -> tuple[float, float]:
    """p and q <= 1 of least error, searched in turn."""
    best = [1.0, 1.0]
    for ratios in (COARSE, FINE):
        for end in (1, 0) if upper_first else (0, 1):
            tried = [[r, best[1]] if end == 0 else [best[0], r] for r in (min(1.0, best[end] * ratio) for ratio in ratios)]
            best = min(tried, key=lambda ends: error(*ends))
    return best[0], best[1]


def shrink(quant: QuantLinear, cost: Float[Tensor, "in"]) -> Float[Tensor, "out groups 1"]:
    """Logarithm of the best clip ratio of every row, given what an error in a column costs."""
    w = quant.scaled_weight().float()
    largest = quant.grouped().float().abs().amax(-1)
    grid = Narrow(quant.scheme.weights, quant.scheme.group, symmetric=True)
    scale, _ = grid.fit(w, cost)
    return torch.where(largest > 0, scale * grid.middle / largest, 1.0).log()[..., None]
