"""Layers that are one product with a weight, whichever way they store it, and their geometry.

nn.Linear    (out, in)                              Conv1D     (in, out): GPT-2
nn.Conv2d    (out, in / groups, height, width)      a product with every patch, one row of weights per output channel
"""

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
LAYERS = (*LINEAR, nn.Conv2d)


class Kernel(NamedTuple):
    """How a convolution walks over its input, as ONNX names it."""

    strides: tuple[int, ...]
    pads: tuple[int, ...]
    "Top, left, bottom, right."
    dilations: tuple[int, ...]
    group: int


def weight_of(layer: nn.Module) -> Float[Tensor, "out in"]:
    """A layer's weight as (out, in), a view; GPT-2 stores it the other way round, of a convolution `in` is a patch."""
    w = layer.get_parameter("weight")
    return w.T if isinstance(layer, Conv1D) else w.flatten(1)


def product(layer: nn.Module, x: Tensor, w: Float[Tensor, "out in"], bias: Tensor | None) -> Tensor:
    """What the layer computes, with this weight and bias in the place of its own."""
    if not isinstance(layer, nn.Conv2d):
        return F.linear(x, w, bias)
    return F.conv2d(x, w.view_as(layer.weight), bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def is_product(module: nn.Module) -> bool:
    """Whether a module is such a layer; convolutions that pad with anything but zeros, or have a forward pass of their own, are not."""
    if isinstance(module, nn.Conv2d):
        return type(module).forward is nn.Conv2d.forward and module.padding_mode == "zeros"
    return isinstance(module, LINEAR)


def kernel_of(layer: nn.Conv2d) -> Kernel:
    """Its geometry.

    >>> kernel_of(nn.Conv2d(4, 4, 3, padding="same", groups=2))
    Kernel(strides=(1, 1), pads=(1, 1, 1, 1), dilations=(1, 1), group=2)
    """
    if layer.padding == "same":
        total = [d * (size - 1) for d, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        pads = (*(t // 2 for t in total), *(t - t // 2 for t in total))
    else:
        pads = (0, 0, 0, 0) if isinstance(layer.padding, str) else (*layer.padding, *layer.padding)
    return Kernel(tuple(layer.stride), pads, tuple(layer.dilation), layer.groups)
