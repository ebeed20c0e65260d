"""Simulated layers as a runtime stores them: codes, scales and zero points, geometry."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.quant.linear import Kernel, kernel_of
from smidgen.quant.simulate import Activation, QuantLinear


@dataclass(frozen=True)
class Codes:
    """How a tensor is rounded: value = scale (code - zero)."""

    scale: float
    zero: int
    bits: int


@dataclass(frozen=True)
class StaticLayer:
    """One layer as a runtime stores it: value = scale (code - zero)."""

    codes: Int8[Tensor, "out *in"]
    "Symmetric and narrow: -(2^(bits-1) - 1) .. 2^(bits-1) - 1; of a convolution (out, in / groups, height, width)."
    scale: Float[Tensor, "out"]
    bias: Float[Tensor, "out"] | None
    weight_bits: int
    input_scale: float
    input_zero: int
    "0 .. 2^input_bits - 1, as the input's codes."
    input_bits: int
    kernel: Kernel | None = None
    "Of a convolution,"
    output: Codes | None = None
    "which returns codes."


@torch.no_grad()
def static_layer(quant: QuantLinear) -> StaticLayer:
    """A layer whose activations have learned ranges, as a runtime stores it; alpha must have been folded."""
    if quant.alpha is not None or quant.scheme.group is not None or quant.activation.range is None:
        raise UserError("only folded layers with a scale per row and static input ranges can be exported as integers")
    w = quant.weight.float()
    range_ = quant.weight_range(w[:, None])
    scale, zero = range_.scale_zero()
    codes = (range_.codes(w[:, None]) - zero.int())[:, 0].to(torch.int8)
    taken = codes_of(quant.activation)
    layer = quant.layer
    return StaticLayer(
        codes=codes.view_as(layer.weight) if isinstance(layer, nn.Conv2d) else codes,
        scale=scale.flatten(),
        bias=layer.bias.detach() if layer.bias is not None else None,  # pyright: ignore
        weight_bits=quant.scheme.weights,
        input_scale=taken.scale,
        input_zero=taken.zero,
        input_bits=taken.bits,
        kernel=kernel_of(layer) if isinstance(layer, nn.Conv2d) else None,
        output=None if quant.output is None else codes_of(quant.output),
    )


def codes_of(activation: Activation) -> Codes:
    """A quantizer with a learned range, as a runtime stores it."""
    assert activation.range is not None
    scale, zero = activation.range.scale_zero()
    return Codes(float(scale), int(zero), activation.bits)
