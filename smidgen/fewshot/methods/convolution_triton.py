"""The kernels of convolution.py. float32; products by three of the tensor cores' tf32 each, as exact as float32's own.

A program computes all channels of some places: nine products of a weight's slice with neighbours read where they lie, the windows overlapping
in the cache. The gradient by a weight is a program per part and neighbour.
"""

import torch
import triton  # pyright: ignore  comes with torch for CUDA
import triton.language as tl  # pyright: ignore
from torch import Tensor

PLACES, MATCHED = 128, 64  # of a program at a time
LEAST = 16  # rows of a product of the tensor cores
OUTPUTS = 1024  # of a program that pools


@triton.jit
def _there(s, tap, places, height, width):
    """Whether the neighbour of place s is inside its image, and how far off it lies."""
    down, right = tap // 3 - 1, tap % 3 - 1
    row, column = (s // width) % height + down, s % width + right
    return (s < places) & (row >= 0) & (row < height) & (column >= 0) & (column < width), down * width + right


@triton.jit
def _apply(
    x, weight, y, places, height, width, ins, outs, in_step, out_step,
    TURNED: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """y[o, s] = sum_{i,t} weight[o, i, t] x[i, s + t] of one part; turned: of the last neighbour first."""
    part = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * PLACES + tl.arange(0, PLACES)[None, :]
    i, across, o = tl.arange(0, INS)[:, None], tl.arange(0, INS)[None, :], tl.arange(0, OUTS)[:, None]
    x += part * ins * places
    weight += part * ins * outs * 9
    total = tl.zeros((OUTS, PLACES), tl.float32)
    for tap in range(9):
        inside, off = _there(s, tap, places, height, width)
        seen = tl.load(x + i * places + s + off, mask=inside & (i < ins), other=0.0)
        at = 8 - tap if TURNED else tap
        by = tl.load(weight + o * out_step + across * in_step + at, mask=(o < outs) & (across < ins), other=0.0)
        total = tl.dot(by, seen, total, input_precision="tf32x3")
    tl.store(y + part * outs * places + o * places + s, total, mask=(o < outs) & (s < places))


@triton.jit
def _match(y, x, weight, places, height, width, ins, outs, INS: tl.constexpr, OUTS: tl.constexpr, PLACES: tl.constexpr):
    """weight[o, i, t] = sum_s y[o, s] x[i, s + t] of one part and neighbour."""
    part, tap = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, across, o = tl.arange(0, INS)[:, None], tl.arange(0, INS)[None, :], tl.arange(0, OUTS)[:, None]
    x += part * ins * places
    y += part * outs * places
    total = tl.zeros((OUTS, INS), tl.float32)
    for start in range(0, places, PLACES):
        s = start + tl.arange(0, PLACES)[None, :]
        inside, off = _there(s, tap, places, height, width)
        seen = tl.load(x + i * places + s + off, mask=inside & (i < ins), other=0.0)
        given = tl.load(y + o * places + s, mask=(s < places) & (o < outs), other=0.0)
        total = tl.dot(given, tl.trans(seen), total, input_precision="tf32x3")
    tl.store(weight + ((part * outs + o) * ins + across) * 9 + tap, total, mask=(o < outs) & (across < ins))


@triton.jit
def _corner(at, height, width, half_height, half_width):
    """The first of the four places behind an output."""
    column, rows = at % half_width, at // half_width
    return ((rows // half_height).to(tl.int64) * height + 2 * (rows % half_height)) * width + 2 * column


@triton.jit
def _largest(x, y, which, count, height, width, half_height, half_width, OUTPUTS: tl.constexpr):
    """The largest of four, the first among equals, and its number."""
    at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    corner, real = x + _corner(at, height, width, half_height, half_width), at < count
    most = tl.load(corner, mask=real)
    number = tl.zeros((OUTPUTS,), tl.int8)
    for k in tl.static_range(1, 4):
        value = tl.load(corner + (k // 2) * width + k % 2, mask=real)
        more = value > most
        most, number = tl.where(more, value, most), tl.where(more, k, number).to(tl.int8)
    tl.store(y + at, most, mask=real)
    tl.store(which + at, number, mask=real)


@triton.jit
def _spread(y, which, x, count, height, width, half_height, half_width, OUTPUTS: tl.constexpr):
    """All four places."""
    at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    corner, real = x + _corner(at, height, width, half_height, half_width), at < count
    value, number = tl.load(y + at, mask=real), tl.load(which + at, mask=real)
    for k in tl.static_range(4):
        tl.store(corner + (k // 2) * width + k % 2, tl.where(number == k, value, 0.0), mask=real)


@triton.jit
def _taken(x, which, y, count, height, width, half_height, half_width, OUTPUTS: tl.constexpr):
    """One of four places."""
    at = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    real = at < count
    number = tl.load(which + at, mask=real, other=0).to(tl.int32)
    corner = x + _corner(at, height, width, half_height, half_width)
    tl.store(y + at, tl.load(corner + (number // 2) * width + number % 2, mask=real), mask=real)


def apply(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
    """x (parts, ins, part, height, width), weight (parts, outs, ins, 3, 3); turned: (parts, ins, outs, 3, 3)."""
    x, weight = x.contiguous(), weight.contiguous()
    parts, ins, part, height, width = x.shape
    outs, places = weight.shape[2 if turned else 1], part * height * width
    y = x.new_empty(parts, outs, part, height, width)
    steps = (outs * 9, 9) if turned else (9, ins * 9)
    grid = (parts, triton.cdiv(places, PLACES))
    if parts:
        sizes = {"INS": _room(ins), "OUTS": _room(outs), "PLACES": PLACES}
        _apply[grid](x, weight, y, places, height, width, ins, outs, *steps, TURNED=turned, **sizes)  # pyright: ignore
    return y


def match(y: Tensor, x: Tensor) -> Tensor:
    """y (parts, outs, part, height, width), x (parts, ins, ...) -> (parts, outs, ins, 3, 3)."""
    y, x = y.contiguous(), x.contiguous()
    (parts, ins, part, height, width), outs = x.shape, y.shape[1]
    weight = x.new_empty(parts, outs, ins, 3, 3)
    if parts:
        sizes = {"INS": _room(ins), "OUTS": _room(outs), "PLACES": MATCHED}
        _match[parts, 9](y, x, weight, part * height * width, height, width, ins, outs, **sizes)  # pyright: ignore
    return weight


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima over 2 x 2 of the last two axes, and which of the four they were."""
    *rest, height, width = x.shape
    y = x.new_empty(*rest, height // 2, width // 2)
    which = torch.empty_like(y, dtype=torch.int8)
    _pooling(_largest, (x.contiguous(), y, which), y, x.shape)
    return y, which


def spread(y: Tensor, which: Tensor, shape: torch.Size) -> Tensor:
    """Values where they were taken from."""
    odd = shape[-1] % 2 or shape[-2] % 2
    x = y.new_zeros(shape) if odd else y.new_empty(shape)
    _pooling(_spread, (y.contiguous(), which, x), y, shape)
    return x


def taken(x: Tensor, which: Tensor) -> Tensor:
    """Values from there."""
    y = torch.empty_like(which, dtype=x.dtype)
    _pooling(_taken, (x.contiguous(), which, y), y, x.shape)
    return y


def _pooling(kernel, tensors: tuple[Tensor, ...], y: Tensor, shape: torch.Size) -> None:
    if y.numel():
        sizes = y.numel(), shape[-2], shape[-1], y.shape[-2], y.shape[-1]
        kernel[(triton.cdiv(y.numel(), OUTPUTS),)](*tensors, *sizes, OUTPUTS=OUTPUTS)


def _room(channels: int) -> int:
    return max(LEAST, triton.next_power_of_2(channels))
