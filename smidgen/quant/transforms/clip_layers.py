"""Static ranges that clip, layer by layer, in any module: what clip.py does for the blocks of a decoder.

    min_(p, q)  sum over the layers that read u of |f(Q(u; p low, q high)) - f(u)|^2          f: the layer, without its bias

What no layer reads keeps the range of the values seen. A row of weights gets the scale of least squared error, each column weighed by the
mean square of its inputs. Layers are looked at one by one, on the inputs of the unquantized module.
"""

from collections.abc import Sequence
from itertools import product as pairs
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.quant.linear import product
from smidgen.quant.ranges import fake_quantize
from smidgen.quant.simulate import Activation, QuantLinear, unquantized
from smidgen.quant.transforms.clip import best_ends, shrink

VALUES = 2**26  # of inputs kept, at most, of all layers together: a quarter of a gigabyte; the first call always


@torch.no_grad()
def clip(module: nn.Module, layers: dict[str, QuantLinear], calls: list[dict[str, Any]]) -> None:
    """Moves the ends of observed activations and sets the reach of weights, where that makes the layers' errors less."""
    inputs = shown(module, layers, calls)
    readers: dict[Activation, list[QuantLinear]] = {}
    for quant in layers.values():
        readers.setdefault(quant.activation, []).append(quant)
    for activation, quants in readers.items():
        clip_tensor(activation, quants, inputs)


def clip_tensor(activation: Activation, quants: list[QuantLinear], inputs: dict[QuantLinear, list[Tensor]]) -> None:
    """One tensor and the weights of the layers that read it."""
    low, high = activation.low.clamp(max=0), activation.high.clamp(min=0)
    top = 2**activation.bits - 1

    def rounded(x: Tensor, p: float, q: float) -> Tensor:
        scale = ((q * high - p * low) / top).clamp(min=torch.finfo(torch.float32).tiny)
        return fake_quantize(x, scale, (-p * low / scale).round(), top)

    def error(p: float, q: float) -> float:
        return sum(float(product(u.layer, rounded(x, p, q) - x, u.weight, None).square().sum()) for u in quants for x in inputs[u])

    def whole(ends: tuple[float, float], shrinks: Sequence[nn.Parameter | None]) -> float:
        put(shrinks)
        total = 0.0
        for quant in quants:
            w = quant.fake_weight()
            for x in inputs[quant]:
                exact = product(quant.layer, x, quant.weight, None)
                total += float((product(quant.layer, rounded(x, *ends), w, None) - exact).square().sum())
        return total

    def put(shrinks: Sequence[nn.Parameter | None]) -> None:
        for quant, ratio in zip(quants, shrinks, strict=True):
            quant.shrink = ratio

    found = best_ends(error, bool(high >= -low))
    ratios = [nn.Parameter(shrink(quant, cost(quant, inputs[quant])), requires_grad=False) for quant in quants]
    tried = list(pairs((found, (1.0, 1.0)), (ratios, [None] * len(quants))))
    errors = [whole(*candidate) for candidate in tried]
    (p, q), chosen = tried[errors.index(min(errors))]
    put(chosen)
    activation.low.copy_(p * low)
    activation.high.copy_(q * high)


def cost(quant: QuantLinear, inputs: list[Tensor]) -> Float[Tensor, "in"]:
    """Mean square of every column's inputs; of grouped convolutions, whose rows read different channels, alike for all."""
    layer, (_, columns) = quant.layer, quant.weight.shape
    if not isinstance(layer, nn.Conv2d):
        return torch.cat([x.flatten(0, -2) for x in inputs]).square().mean(0)
    if layer.groups > 1:
        return quant.weight.new_ones(columns)
    squares = torch.stack([x.square().mean((0, 2, 3)) for x in inputs]).mean(0)
    return squares.repeat_interleave(columns // layer.in_channels)


def shown(module: nn.Module, layers: dict[str, QuantLinear], calls: list[dict[str, Any]]) -> dict[QuantLinear, list[Tensor]]:
    """What every layer reads in the first call, and in as many more as there is room for."""
    inputs: dict[QuantLinear, list[Tensor]] = {quant: [] for quant in layers.values()}

    def keep(quant: Any, arguments: tuple[Tensor, ...]) -> None:
        inputs[quant].append(arguments[0].detach().clone())

    handles = [quant.register_forward_pre_hook(keep) for quant in layers.values()]
    try:
        with unquantized(layers):
            for done, call in enumerate(calls, start=1):
                module(**call)
                kept = sum(x.numel() for found in inputs.values() for x in found)
                if kept * (done + 1) / done > VALUES:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return inputs
