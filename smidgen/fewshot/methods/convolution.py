"""Convolutions of 3 x 3 whose weights differ from task to task, with gradients of every order that are as cheap.

    applied   y[o, s] = sum_{i,t} w[o, i, t] x[i, s + t]            t: the nine neighbours; what lies outside of an image is 0
    turned    x[i, s] = sum_{o,t} w[o, i, t] y[o, s - t]            its transpose, by the weight turned around
    matched   w[o, i, t] = sum_s y[o, s] x[i, s + t]                by the weight, over all places of all parts of a task

for every part, s over the places of its images. All three are linear in both arguments, and each one's gradients are the two others: the
second derivatives of an inner loop need nothing else. Neither stores windows, nine times the image; on a GPU none are ever cut out, each of
the three is one kernel (convolution_triton.py).
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smidgen.precision import has_triton

WIDEST = 64  # channels of a kernel: more would not fit into the memory that a program has
Maps = Float[Tensor, "parts channels part height width"]


class Owners(NamedTuple):
    """Whose part a part is."""

    member: Float[Tensor, "tasks parts"]
    "1 where a part is of a task."
    task: Int[Tensor, "parts"]
    "The same as numbers."


def convolved(x: Maps, weight: Float[Tensor, "tasks outs channels 3 3"], owners: Owners) -> Float[Tensor, "parts outs part height width"]:
    """By the weight of every part's task."""
    return Applied.apply(x, weight, False, *owners)


def by_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels compute maps like these, or convolve by weights like these."""
    return x.is_cuda and x.dtype == torch.float32 and x.shape[1] <= WIDEST and _capable(x.device)


@cache
def _capable(device: torch.device) -> bool:
    """The kernels' products are tensor cores'."""
    return has_triton() and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def columns(x: Maps) -> Float[Tensor, "parts nine_channels places"]:
    """The windows of 3 x 3 as columns."""
    windows = F.pad(x, (1, 1, 1, 1)).unfold(3, 3, 1).unfold(4, 3, 1)  # (parts, channels, part, height, width, 3, 3)
    return windows.permute(0, 1, 5, 6, 2, 3, 4).flatten(1, 3).flatten(2)


class Applied(torch.autograd.Function):
    """`applied` above, or `turned`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turned: bool, member: Tensor, task: Tensor) -> Tensor:
        """A product of matrices with the windows of x."""
        ctx.save_for_backward(x, weight, member, task)
        ctx.turned = turned
        if by_kernels(x):
            from smidgen.fewshot.methods.convolution_triton import apply

            return apply(x, weight, turned, task)
        by = weight.flip(3, 4).transpose(1, 2) if turned else weight
        return (by.index_select(0, task).flatten(2) @ columns(x)).unflatten(2, x.shape[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By x and the weight."""
        x, weight, *owners = ctx.saved_tensors
        of_x, of_weight, *_ = ctx.needs_input_grad
        pair = (x, gradient) if ctx.turned else (gradient, x)
        by_x = Applied.apply(gradient, weight, not ctx.turned, *owners) if of_x else None
        return by_x, Matched.apply(*pair, *owners) if of_weight else None, None, None, None


class Matched(torch.autograd.Function):
    """`matched` above."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, member: Tensor, task: Tensor) -> Tensor:
        """A product of matrices over all places, added up over a task's parts."""
        ctx.save_for_backward(y, x, member, task)
        if by_kernels(x):
            from smidgen.fewshot.methods.convolution_triton import match

            of_parts = match(y, x)
        else:
            of_parts = (y.flatten(2) @ columns(x).mT).unflatten(2, (x.shape[1], 3, 3))
        return (member @ of_parts.flatten(1)).unflatten(1, of_parts.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By y and x."""
        y, x, *owners = ctx.saved_tensors
        of_y, of_x, *_ = ctx.needs_input_grad
        by_y = Applied.apply(x, gradient, False, *owners) if of_y else None
        return by_y, Applied.apply(y, gradient, True, *owners) if of_x else None, None, None
