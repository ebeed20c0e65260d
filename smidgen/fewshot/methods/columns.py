"""Convolutions of 3 x 3 as products of matrices: their windows as columns, with gradients of every order that are as plain."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Columns(torch.autograd.Function):
    """Windows of 3 x 3, zeros around, as columns: (parts, channels, part, height, width) -> (parts, 9 channels, part height width).

    Its gradient adds up, and its gradient's gradient cuts out again. Torch has one for `unfold`, which is slow on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Copies nine times."""
        windows = F.pad(x, (1, 1, 1, 1)).unfold(3, 3, 1).unfold(4, 3, 1)  # (parts, channels, part, height, width, 3, 3)
        ctx.shape = x.shape
        return windows.permute(0, 1, 5, 6, 2, 3, 4).flatten(1, 3).flatten(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nine times added."""
        return Overlaid.apply(gradient, ctx.shape)


class Overlaid(torch.autograd.Function):
    """The transpose of `Columns`."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, shape: torch.Size) -> Tensor:
        """Adds every window where it was cut out."""
        parts, channels, *places = shape
        shifted = columns.reshape(parts, channels, 3, 3, *places)
        out = shifted[:, :, 1, 1].clone()
        for i, j in ((i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)):
            (to_i, from_i), (to_j, from_j) = _overlap(i - 1), _overlap(j - 1)
            out[..., to_i, to_j] += shifted[:, :, i, j, :, from_i, from_j]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Cuts out again."""
        return Columns.apply(gradient), None


def _overlap(by: int) -> tuple[slice, slice]:
    """Where a row lies when moved by -1, 0 or 1, and the part of it that is still inside."""
    return slice(max(by, 0), by or None if by < 0 else None), slice(max(-by, 0), -by or None if by > 0 else None)
