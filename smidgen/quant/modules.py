"""Any module on integers: batch norms folded, layers simulated, ranges from a few calls, ONNX.

    min-max    every range reaches from the least to the largest value seen
    mse        ends of least squared error of the values
    clip       ends of tensors and rows of weights by what the layers return (transforms/clip_layers.py)

The graph that will be written says which layers share a quantizer and where convolutions meet a ReLU (export/onnx_module.py).
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.quant.activations import fix_ranges
from smidgen.quant.codes import StaticLayer, static_layer
from smidgen.quant.export.onnx_module import Traced, trace, write
from smidgen.quant.export.onnx_qdq import check
from smidgen.quant.linear import is_product
from smidgen.quant.simulate import SMALLEST, Activation, QuantLinear, Scheme, activations_of, install, unquantized
from smidgen.quant.transforms import batch_norm
from smidgen.quant.transforms.clip_layers import clip

Method = Literal["min-max", "mse", "clip"]
W8A8 = Scheme()
DEAD = 1e-6  # what a ReLU reaches at least, be it 0 in all calls: its zero point must be 0
LARGEST = 2**30  # of a bias in units of its layer's products, which are added in 32 bits


@dataclass(frozen=True)
class Integer:
    """A module as its artifact computes it, and that artifact's graph."""

    module: nn.Module
    "Simulated; a copy."
    layers: dict[str, QuantLinear]
    traced: Traced
    seen: dict[str, tuple[float, float]]
    "Extremes of every quantizer's values in the calls, by its first layer."

    @torch.no_grad()
    def ends(self) -> dict[str, tuple[float, float]]:
        """Its range, likewise."""
        found = {}
        for name, activation in activations_of(self.layers):
            assert activation.range is not None
            low, high = activation.range.ends()
            found[name] = (float(low), float(high))
        return found

    def static(self) -> dict[str, StaticLayer]:
        """The layers as they are stored."""
        return {name: static_layer(quant) for name, quant in self.layers.items()}

    def write(self, folder: Path, tokenizer: Any = None) -> None:
        """model.onnx and its data; once, for it draws into the graph."""
        static = self.static()
        check(self.module, static)
        write(folder, self.traced, static, tokenizer)


@torch.no_grad()
def quantized(
    module: nn.Module,
    calls: Iterable[dict[str, Any]],
    outputs: Sequence[str],
    scheme: Scheme = W8A8,
    method: Method = "mse",
    skip: tuple[str, ...] = (),
    dynamic: dict[str, dict[int, str]] | None = None,
    example: dict[str, Any] | None = None,
) -> Integer:
    """Simulates a copy of `module` with static ranges in every linear layer and convolution but those in `skip`.

    `calls` are calls of the module by argument name, some typical ones; `example`, by default the first of them, is what torch traces: it
    needs two or more entries along each free axis (see `trace`, which says what `outputs` and `dynamic` are). Convolutions with a forward
    pass of their own or padding other than zeros, embeddings, norms, sums and attention scores stay float32.
    """
    if example is None:
        calls = list(calls)
        example = next(iter(calls), None)
    if example is None:
        raise UserError("calibration needs a batch or more")
    names = [name for name, m in module.named_modules() if name and is_product(m) and name not in skip]
    if not names:
        raise UserError(f"{type(module).__name__} has no linear layers and no convolutions in it to quantize")
    folded = batch_norm.fold(copy.deepcopy(module).eval(), example)
    traced = trace(folded, used(folded, names, example), example, outputs, dynamic)
    layers = simulated(folded, traced, scheme)
    shown = []
    with unquantized(layers, "observe"):
        for call in calls:
            folded(**call)
            shown.append(call)
    seen = {name: (float(activation.low), float(activation.high)) for name, activation in activations_of(layers)}
    for quant in layers.values():
        if quant.output is not None and quant.bounds is not None:
            quant.output.high.clamp_(min=DEAD)
    if method == "clip":
        clip(folded, layers, shown)
    fix_ranges(layers, "mse" if method == "mse" else "min-max")
    for quant in layers.values():
        make_room(quant)
    return Integer(folded, layers, traced, seen)


def used(module: nn.Module, names: list[str], call: dict[str, Any]) -> list[str]:
    """Refuses layers that the call does not reach, which torch would leave out of the graph."""
    reached: set[nn.Module] = set()
    handles = [module.get_submodule(name).register_forward_hook(lambda layer, *_: reached.add(layer)) for name in names]
    try:
        module(**call)
    finally:
        for handle in handles:
            handle.remove()
    unused = [name for name in names if module.get_submodule(name) not in reached]
    if unused:
        raise UserError(f"{unused[0]} is not used in the calls given; name it in `skip`")
    return names


def simulated(module: nn.Module, traced: Traced, scheme: Scheme) -> dict[str, QuantLinear]:
    """Puts a QuantLinear in the place of every layer of the graph; one quantizer for each tensor."""
    tensors: dict[Any, Activation] = {}
    layers: dict[str, QuantLinear] = {}
    for name, site in traced.sites.items():
        layer = module.get_submodule(name)
        source = tensors.setdefault(site.source, Activation(scheme.activations))
        convolution = isinstance(layer, nn.Conv2d)
        made = tensors.setdefault(site.made, Activation(scheme.activations)) if convolution else None
        layers[name] = QuantLinear(layer, scheme, source, made, site.bounds).to(next(layer.parameters()).device)
    install(module, layers)
    return layers


def make_room(quant: QuantLinear) -> None:
    """Widens rows of weights that are nothing beside their bias, which would not fit into 32 bits; batch norm makes such channels."""
    bias = quant.layer.bias
    if quant.output is None or bias is None or quant.activation.range is None:
        return
    scale = float(quant.activation.range.scale_zero()[0])
    grouped = quant.grouped()
    largest = quant.shrunk(grouped.abs().amax(-1, keepdim=True).float())
    top = 2 ** (quant.scheme.weights - 1) - 1
    least = (bias.abs()[:, None, None] * (top / scale / LARGEST)).clamp(min=SMALLEST * top)  # pyright: ignore
    wider = (least / largest).clamp(min=1).nan_to_num(1.0, 1.0, 1.0)  # a row of zeros has a range of its own
    if bool((wider > 1).any()):
        quant.shrink = nn.Parameter(wider.log() + (0 if quant.shrink is None else quant.shrink), requires_grad=False)
