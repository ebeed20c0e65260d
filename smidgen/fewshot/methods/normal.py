"""What follows a convolution of an inner loop, by kernels: the moments of batch norm, and pooling, normalisation and ReLU in one.

    sums      s[p, c] = sum_n counted[p, n] mean_hw x[p, c, n]          and the same of x^2
    affine    scale = (variance + epsilon)^(-1/2), moved = shift - mean scale
    pooled    y = max(0, scale max_{2 x 2} x + shift)                   scale and shift of every part's task, scale > 0

A kernel each, one for the gradient, and one for the gradient's gradient; there is no fourth. As torch's own operations they are forty
kernels, which take longer to start than to run (normal_triton.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Sums(torch.autograd.Function):
    """x (parts, channels, part, height, width), counted (parts, part) -> (parts, 2 channels)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counted: Tensor) -> Tensor:
        """Of x, then of its square."""
        from smidgen.fewshot.methods.normal_triton import sums

        ctx.save_for_backward(x, counted)
        return sums(x, counted)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By x."""
        return SumsBackward.apply(gradient, *ctx.saved_tensors), None


class SumsBackward(torch.autograd.Function):
    """counted (g_1 + 2 x g_2) / places."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, counted: Tensor) -> Tensor:
        """Like x."""
        from smidgen.fewshot.methods.normal_triton import sums_backward

        ctx.save_for_backward(gradient, x, counted)
        return sums_backward(gradient, x, counted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By the gradient and x."""
        from smidgen.fewshot.methods.normal_triton import sums_twice

        return *sums_twice(second, *ctx.saved_tensors), None


class Affine(torch.autograd.Function):
    """mean, variance, shift, all of one shape -> scale, moved."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor, shift: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Of that shape."""
        from smidgen.fewshot.methods.normal_triton import affine

        ctx.save_for_backward(mean, variance)
        ctx.epsilon = epsilon
        return affine(mean, variance, shift, epsilon)

    @staticmethod
    def backward(ctx: Any, of_scale: Tensor, of_moved: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By all three."""
        return *AffineBackward.apply(of_scale, of_moved, *ctx.saved_tensors, ctx.epsilon), of_moved, None


class AffineBackward(torch.autograd.Function):
    """By the mean, - g_moved scale; by the variance, - 1/2 (g_scale - g_moved mean) scale^3."""

    @staticmethod
    def forward(ctx: Any, of_scale: Tensor, of_moved: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Of one shape again."""
        from smidgen.fewshot.methods.normal_triton import affine_backward

        ctx.save_for_backward(of_scale, of_moved, mean, variance)
        ctx.epsilon = epsilon
        return affine_backward(of_scale, of_moved, mean, variance, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By both gradients, mean and variance."""
        from smidgen.fewshot.methods.normal_triton import affine_twice

        of_scale, of_moved, mean, variance = ctx.saved_tensors
        return *affine_twice(of_mean, of_variance, of_scale, of_moved, mean, variance, ctx.epsilon), None


class Pooled(torch.autograd.Function):
    """x (parts, channels, part, height, width), scale and shift (tasks, channels) -> half the height and width."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, member: Tensor, task: Tensor) -> Tensor:
        """Which of the four was largest, and whether it passed, is kept in a byte."""
        from smidgen.fewshot.methods.normal_triton import pooled

        y, which = pooled(x, scale, shift, task)
        ctx.save_for_backward(x, scale, which, member, task)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By x, scale and shift."""
        by_x, of_parts = PooledBackward.apply(gradient, *ctx.saved_tensors)
        by_scale, by_shift = (ctx.saved_tensors[3] @ of_parts).chunk(2, 1)
        return by_x, by_scale, by_shift, None, None


class PooledBackward(torch.autograd.Function):
    """scale g where x was largest and passed; of every part and channel sum g max x and sum g, (parts, 2 channels)."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, scale: Tensor, which: Tensor, member: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """Like x, and the sums."""
        from smidgen.fewshot.methods.normal_triton import pooled_backward

        ctx.save_for_backward(gradient, x, scale, which, member, task)
        return pooled_backward(gradient, x, scale, which, task)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, second: Tensor, of_parts: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """By the gradient, x and scale."""
        from smidgen.fewshot.methods.normal_triton import pooled_twice

        gradient, x, scale, which, member, task = ctx.saved_tensors
        by_gradient, by_x, by_scale = pooled_twice(second, of_parts, gradient, x, scale, which, task)
        return by_gradient, by_x, member @ by_scale, None, None, None
