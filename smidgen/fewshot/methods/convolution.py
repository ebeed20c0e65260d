"""Convolutions of 3 x 3 whose weights differ from part to part, and pooling, with gradients of every order that are as cheap.

    applied   y[o, s] = sum_{i,t} w[o, i, t] x[i, s + t]            t: the nine neighbours; what lies outside of an image is 0
    turned    x[i, s] = sum_{o,t} w[o, i, t] y[o, s - t]            its transpose, by the weight turned around
    matched   w[o, i, t] = sum_s y[o, s] x[i, s + t]                by the weight

for every part, s over the places of its images. All three are linear in both arguments, and each one's gradients are the two others: the
second derivatives of an inner loop need nothing else. Neither stores windows, nine times the image; on a GPU none are ever cut out, each of
the three is one kernel (convolution_triton.py), as is pooling and both of its gradients. Torch's own convolution by groups, and its
pooling's gradient, are several times as slow there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smidgen.precision import has_triton

Maps = Float[Tensor, "parts channels part height width"]


def convolved(x: Maps, weight: Float[Tensor, "parts outs channels 3 3"]) -> Float[Tensor, "parts outs part height width"]:
    """By a weight of its own in every part."""
    return Applied.apply(x, weight, False)


def halved(x: Maps) -> Float[Tensor, "parts channels part half_height half_width"]:
    """Maximum over 2 x 2; an odd last row or column is left out."""
    return Largest.apply(x) if by_kernels(x) else F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])


def by_kernels(x: Tensor) -> bool:
    """Whether those of convolution_triton.py compute it."""
    return x.is_cuda and x.dtype == torch.float32 and has_triton()


def columns(x: Maps) -> Float[Tensor, "parts nine_channels places"]:
    """The windows of 3 x 3 as columns."""
    windows = F.pad(x, (1, 1, 1, 1)).unfold(3, 3, 1).unfold(4, 3, 1)  # (parts, channels, part, height, width, 3, 3)
    return windows.permute(0, 1, 5, 6, 2, 3, 4).flatten(1, 3).flatten(2)


class Applied(torch.autograd.Function):
    """`applied` above, or `turned`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turned: bool) -> Tensor:
        """A product of matrices with the windows of x."""
        ctx.save_for_backward(x, weight)
        ctx.turned = turned
        if by_kernels(x):
            from smidgen.fewshot.methods.convolution_triton import apply

            return apply(x, weight, turned)
        by = weight.flip(3, 4).transpose(1, 2) if turned else weight
        return (by.flatten(2) @ columns(x)).unflatten(2, x.shape[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By x and the weight."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        pair = (x, gradient) if ctx.turned else (gradient, x)
        return Applied.apply(gradient, weight, not ctx.turned) if of_x else None, Matched.apply(*pair) if of_weight else None, None


class Matched(torch.autograd.Function):
    """`matched` above."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        """A product of matrices over all places."""
        ctx.save_for_backward(y, x)
        if by_kernels(x):
            from smidgen.fewshot.methods.convolution_triton import match

            return match(y, x)
        return (y.flatten(2) @ columns(x).mT).unflatten(2, (x.shape[1], 3, 3))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By y and x."""
        y, x = ctx.saved_tensors
        of_y, of_x = ctx.needs_input_grad
        return Applied.apply(x, gradient, False) if of_y else None, Applied.apply(y, gradient, True) if of_x else None


class Largest(torch.autograd.Function):
    """Maximum over 2 x 2, by kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Which of the four it was is kept in a byte."""
        from smidgen.fewshot.methods.convolution_triton import largest

        y, which = largest(x)
        ctx.save_for_backward(which)
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """To the largest."""
        return Spread.apply(gradient, *ctx.saved_tensors, ctx.shape)


class Spread(torch.autograd.Function):
    """Values to the places they were taken from, zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, which: Tensor, shape: torch.Size) -> Tensor:
        """The transpose of `Taken`."""
        from smidgen.fewshot.methods.convolution_triton import spread

        ctx.save_for_backward(which)
        ctx.shape = shape
        return spread(y, which, shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """From there again."""
        return Taken.apply(gradient, *ctx.saved_tensors), None, None


class Taken(torch.autograd.Function):
    """Values of the places that were largest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, which: Tensor) -> Tensor:
        """The transpose of `Spread`."""
        from smidgen.fewshot.methods.convolution_triton import taken

        ctx.save_for_backward(which)
        ctx.shape = x.shape
        return taken(x, which)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """To there again."""
        return Spread.apply(gradient, *ctx.saved_tensors, ctx.shape), None
