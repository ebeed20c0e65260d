"""The kernels of convolution.py. float32; products by three of the tensor cores' tf32 each, as exact as float32's own, unless
`torch.backends.cuda.matmul.allow_tf32` lets one do: then the gradient through ten inner steps is off by 4 % of its length.

A program computes all channels of some places: nine products of a slice of the weight with neighbours read where they lie, windows
overlapping in the cache; a single one with all nine neighbours of the few channels of an image. By the weight it is a program per part, row
of neighbours and stretch of places, whose sums are added up.
"""

import torch
import triton  # pyright: ignore  comes with torch for CUDA
import triton.language as tl  # pyright: ignore
from torch import Tensor

PLACES, MATCHED = 128, 64  # of a program at a time
STRETCH = 1024  # places of a program that sums over them
LEAST = 16  # rows of a product of the tensor cores
FEW = 3  # channels whose neighbours are one product
NARROW = 32  # channels of which the next places are read while these are computed


@triton.jit
def _seen(x, s, i, tap, places, ins, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The neighbours of places s in channels i, zeros outside of their image."""
    down, right = tap // 3 - 1, tap % 3 - 1
    row, column = (s // WIDTH) % HEIGHT + down, s % WIDTH + right
    there = (s < places) & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    return tl.load(x + i * places + s + down * WIDTH + right, mask=there & (i < ins), other=0.0)


@triton.jit
def _apply(
    x, weight, task, y, places, ins, outs, in_step, out_step, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TURNED: tl.constexpr, FLAT: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr, PLACES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """y[o, s] = sum_{i,t} weight[o, i, t] x[i, s + t] of one part by its task's weight; turned: of the last neighbour first."""
    part = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * PLACES + tl.arange(0, PLACES)[None, :]
    i, across, o = tl.arange(0, INS)[:, None], tl.arange(0, INS)[None, :], tl.arange(0, OUTS)[:, None]
    x += part * ins * places
    weight += tl.load(task + part) * ins * outs * 9
    total = tl.zeros((OUTS, PLACES), tl.float32)
    if FLAT:
        by = tl.load(weight + o * out_step + across, mask=(o < outs) & (across < ins * 9), other=0.0)
        total = tl.dot(by, _seen(x, s, i // 9, i % 9, places, ins, HEIGHT, WIDTH), total, input_precision=KIND)
    else:
        for tap in range(9):
            at = 8 - tap if TURNED else tap
            by = tl.load(weight + o * out_step + across * in_step + at, mask=(o < outs) & (across < ins), other=0.0)
            total = tl.dot(by, _seen(x, s, i, tap, places, ins, HEIGHT, WIDTH), total, input_precision=KIND)
    tl.store(y + part * outs * places + o * places + s, total, mask=(o < outs) & (s < places))


@triton.jit
def _match(
    y, x, weight, places, ins, outs, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    FLAT: tl.constexpr, STRETCH: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr, PLACES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """weight[o, i, t] = sum_s y[o, s] x[i, s + t] of one part, row of neighbours and stretch of places."""
    part, down, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i, across, o = tl.arange(0, INS)[:, None], tl.arange(0, INS)[None, :], tl.arange(0, OUTS)[:, None]
    x += part * ins * places
    y += part * outs * places
    left = tl.zeros((OUTS, INS), tl.float32)
    middle, right = left, left
    for start in range(stretch * STRETCH, min(places, (stretch + 1) * STRETCH), PLACES):
        s = start + tl.arange(0, PLACES)[None, :]
        given = tl.load(y + o * places + s, mask=(s < places) & (o < outs), other=0.0)
        if FLAT:
            left = tl.dot(given, tl.trans(_seen(x, s, i // 9, i % 9, places, ins, HEIGHT, WIDTH)), left, input_precision=KIND)
        else:
            left = tl.dot(given, tl.trans(_seen(x, s, i, 3 * down, places, ins, HEIGHT, WIDTH)), left, input_precision=KIND)
            middle = tl.dot(given, tl.trans(_seen(x, s, i, 3 * down + 1, places, ins, HEIGHT, WIDTH)), middle, input_precision=KIND)
            right = tl.dot(given, tl.trans(_seen(x, s, i, 3 * down + 2, places, ins, HEIGHT, WIDTH)), right, input_precision=KIND)
    weight += (part * tl.num_programs(2) + stretch) * outs * ins * 9 + o * ins * 9
    if FLAT:
        tl.store(weight + across, left, mask=(o < outs) & (across < ins * 9))
    else:
        real = (o < outs) & (across < ins)
        tl.store(weight + across * 9 + 3 * down, left, mask=real)
        tl.store(weight + across * 9 + 3 * down + 1, middle, mask=real)
        tl.store(weight + across * 9 + 3 * down + 2, right, mask=real)


def apply(x: Tensor, weight: Tensor, turned: bool, task: Tensor) -> Tensor:
    """x (parts, ins, part, height, width), weight (tasks, outs, ins, 3, 3), turned (tasks, ins, outs, 3, 3); task (parts,)."""
    x, weight = x.contiguous(), weight.contiguous()
    parts, ins, part, height, width = x.shape
    outs, places = weight.shape[2 if turned else 1], part * height * width
    y = x.new_empty(parts, outs, part, height, width)
    if parts:
        steps = (outs * 9, 9) if turned else (9, ins * 9)
        sizes = _sizes(ins, outs, flat=ins <= FEW and not turned)
        sizes |= {"HEIGHT": height, "WIDTH": width, "TURNED": turned, "PLACES": PLACES}
        _apply[parts, triton.cdiv(places, PLACES)](x, weight, task, y, places, ins, outs, *steps, **sizes)  # pyright: ignore
    return y


def match(y: Tensor, x: Tensor) -> Tensor:
    """y (parts, outs, part, height, width), x (parts, ins, ...) -> (parts, outs, ins, 3, 3)."""
    y, x = y.contiguous(), x.contiguous()
    (parts, ins, part, height, width), outs = x.shape, y.shape[1]
    places, sizes = part * height * width, _sizes(ins, outs, flat=ins <= FEW)
    stretches = triton.cdiv(places, STRETCH)
    weight = x.new_empty(parts, stretches, outs, ins, 3, 3)
    if parts:
        grid = parts, 1 if sizes["FLAT"] else 3, stretches
        sizes |= {"HEIGHT": height, "WIDTH": width, "STRETCH": STRETCH, "PLACES": MATCHED}
        _match[grid](y, x, weight, places, ins, outs, **sizes)  # pyright: ignore
    return weight.sum(1) if stretches > 1 else weight[:, 0]


def _sizes(ins: int, outs: int, flat: bool) -> dict[str, int | bool | str]:
    """How products are cut."""
    kind = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    ins, outs = _room(ins * 9 if flat else ins), _room(outs)
    return {"FLAT": flat, "INS": ins, "OUTS": outs, "KIND": kind, "num_stages": 2 if max(ins, outs) <= NARROW else 1}


def _room(channels: int) -> int:
    return max(LEAST, triton.next_power_of_2(channels))
