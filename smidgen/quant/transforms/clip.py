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
from smidgen.quant.simulate import Activation, QuantLinear, activations_of, set_mode, unquantized
from smidgen.quant.transforms.alpha import Adapted

ROWS = 512  # tokens that errors are measured on, about
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
    seen, stands = watched(block)
    reaches: dict[Activation, nn.Parameter] = {}
    shrinks: dict[QuantLinear, nn.Parameter] = {}
    for activation, (u, low, high) in seen.items():
        readers = [quant for quant in block.layers.values() if quant.activation is activation]
        w = torch.cat([quant.scaled_weight().float() for quant in readers])
        p, q = searched(u, w, stands, low, high, activation.bits)
        reaches[activation] = nn.Parameter(u.new_tensor([p, q]).log())
        shrinks |= {quant: nn.Parameter(shrink(quant, stands @ u.square())) for quant in readers}

    def put(inputs: bool, weights: bool) -> float:
        for activation, reach in reaches.items():
            activation.reach = reach if inputs else nn.Parameter(torch.zeros_like(reach))
        for quant, ratio in shrinks.items():
            quant.shrink = ratio if weights else nn.Parameter(torch.zeros_like(ratio))
        return block.error()

    put(*min(product((True, False), repeat=2), key=lambda kinds: put(*kinds)))


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

    best = [1.0, 1.0]
    for ratios in (COARSE, FINE):
        for end in (1, 0) if high >= -low else (0, 1):
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


Seen = tuple[Float[Tensor, "n in"], Float[Tensor, ""], Float[Tensor, ""]]


def watched(block: Adapted) -> tuple[dict[Activation, Seen], Float[Tensor, "n"]]:
    """Some tokens of the float block: every activation's values and mean extremes; and how many tokens each stands for.

    The first token of a text is always among them, and stands for itself.
    """
    batches, windows, length = block.targets.shape[:3]
    chosen = torch.linspace(0, length - 1, min(length, max(2, ROWS // (batches * windows))), device=block.targets.device).long()
    stands = torch.full((len(chosen),), (length - 1) / max(1, len(chosen) - 1), device=block.targets.device)
    stands[0] = 1.0
    rows: dict[Activation, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def watch(quant: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(quant, QuantLinear)
        factors, x = quant.factors(), inputs[0].float()
        u = x if factors is None else x * factors
        rows.setdefault(quant.activation, []).append((u[..., chosen, :].flatten(0, -2), u.min(), u.max()))

    handles = [block.layers[name].register_forward_pre_hook(watch) for name, _ in activations_of(block.layers)]
    with unquantized(block.layers):
        for hidden in block.block.hidden:
            block.forward(hidden)
    set_mode(block.layers, block.mode)
    for handle in handles:
        handle.remove()
    parts = {activation: tuple(zip(*found, strict=True)) for activation, found in rows.items()}
    seen = {a: (torch.cat(u), torch.stack(low).mean(), torch.stack(high).mean()) for a, (u, low, high) in parts.items()}
    return seen, stands.repeat(batches * windows)
