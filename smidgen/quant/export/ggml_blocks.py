"""Codes and scales to llama.cpp's blocks and back.

A row is a sequence of blocks of so many bytes; numbers are little-endian, d, dmin and m float16. Columns are counted within the
block, [hi lo] is one byte, c a code:

    q4_0    18 bytes for 32     d  qs[16]              qs[l] = [c(l+16) c(l)]                                  value d (c - 8)
    q4_1    20 bytes for 32     d  m  qs[16]           the same                                                value d c + m
    q8_0    34 bytes for 32     d  int8[32]            c - 128                                                 value d (c - 128)
    q2_k    84 bytes for 256    sc[16]  qs[64]  d  dmin
                                sc[g] = [m(g) sc(g)];  qs[32h + l] = [c(128h+96+l) c(128h+64+l) c(128h+32+l) c(128h+l)], h = 0, 1
    q3_k    110 bytes for 256   hmask[32]  qs[64]  sc[12]  d
                                bit i of hmask[l] is the high bit of c(32i + l); qs as in q2_k, of the low two bits
                                sc + 32 in 6 bits: the low four of 0..7 in low halves of bytes 0..7, of 8..15 in high halves,
                                the high two of i + 4j in bits 2j, 2j+1 of byte 8 + i
    q4_k    144 bytes for 256   d  dmin  sc[12]  qs[128]
                                qs[32h + l] = [c(64h+32+l) c(64h+l)], h = 0..3
                                sc and m of 0..3 in the low 6 bits of bytes 0..3 and 4..7; of 4..7 in byte 4 + g as [lo m, lo sc],
                                their high two bits on top of bytes 0..3 and 4..7

q4_1 stores m = -d zero, rounded to float16. For an integer zero that moves a value by less than 2^-11 |m|, and `unpack` finds
the integer again; other files' q4_1 blocks become the real zeros of the grid of that name.
"""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.formats import FORMATS, SuperGrid, units

GRIDS = {
    "q4_0": Grid(4, 32, True, "float16"),
    "q4_1": Grid(4, 32, False, "float16"),
    "q8_0": Grid(8, 32, True, "float16"),
}
SIZES = {"q4_0": (32, 18), "q4_1": (32, 20), "q8_0": (32, 34), "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144)}  # columns, bytes
SHIFTS = np.array([0, 2, 4, 6], np.uint8)


def type_of(grid: Grid) -> str:
    """The block type that holds a grid; a UserError names the nearest one that some type can hold."""
    if isinstance(grid, SuperGrid):
        return grid.name
    for name, held in GRIDS.items():
        if grid == held:
            return name
    if grid.bits in (4, 8) and grid.group == 32 and (grid.symmetric or grid.bits == 4):
        nearest = "--scale-dtype float16"
    elif grid.bits in (4, 8):
        nearest = f"--bits {grid.bits} --group 32{' --symmetric' if grid.symmetric or grid.bits == 8 else ''}"
    else:
        nearest = {2: "the format q2_k", 3: "the format q3_k"}.get(
            grid.bits, "--bits 4 --group 32" if grid.bits < 7 else "--bits 8 --group 32 --symmetric"
        )
    group = "one scale per row" if grid.group is None else f"groups of {grid.group}"
    held = f"{grid.bits} bits, {group}, {'symmetric' if grid.symmetric else 'asymmetric'}, {grid.scale_dtype} scales"
    raise UserError(f"gguf has no type for {held}; use {nearest}")


def pack(q: QWeight) -> UInt8[np.ndarray, "out bytes"]:
    """The rows of a layer."""
    kind = type_of(q.grid)
    columns = SIZES[kind][0]
    codes = q.codes.cpu().numpy().reshape(len(q.codes), -1, columns)  # (out, blocks, columns)
    scale, zero = (t.cpu().double().reshape(*codes.shape[:2], -1) for t in (q.scale, q.zero))  # (out, blocks, groups)
    if kind == "q8_0":
        parts = [half(scale), (codes ^ 128)]
    elif kind == "q4_0":
        parts = [half(scale), nibbles(codes, 16)]
    elif kind == "q4_1":
        parts = [half(scale), half(-scale * zero), nibbles(codes, 16)]
    else:
        steps = FORMATS[kind].steps
        d, sc = units(scale, steps)
        dmin, m = units(scale * zero, steps) if not q.grid.symmetric else (d, sc)
        sc, m, d, dmin = (byte(sc), byte(m), half(d[..., None]), half(dmin[..., None]))
        if kind == "q2_k":
            parts = [sc | m << 4, pairs(codes), d, dmin]
        elif kind == "q3_k":
            parts = [
                np.packbits((codes >> 2).reshape(*codes.shape[:2], 8, 32), -2, "little")[..., 0, :],
                pairs(codes & 3),
                split(sc + 32),
                d,
            ]
        else:
            parts = [d, dmin, interleaved(sc, m), nibbles(codes, 32)]
    return np.concatenate(parts, -1).reshape(len(codes), -1)


def unpack(data: UInt8[np.ndarray, "out bytes"], kind: str) -> QWeight:
    """The opposite; a UserError where a sub-scale is not positive, which our grids exclude."""
    columns, size = SIZES[kind]
    blocks = data.reshape(len(data), -1, size)
    if kind == "q8_0":
        return assembled(blocks[..., 2:] ^ 128, floats(blocks[..., :2]), None, GRIDS[kind])
    if kind == "q4_0":
        return assembled(unnibbled(blocks[..., 2:], 16), floats(blocks[..., :2]), None, GRIDS[kind])
    if kind == "q4_1":
        d, m = floats(blocks[..., :2]), floats(blocks[..., 2:4])
        zero = torch.round(-m / d)
        ours = bool(((-d * zero).half().float() == m).all() and ((zero >= 0) & (zero <= 15)).all())
        return assembled(unnibbled(blocks[..., 4:], 16), d, zero if ours else -m / d, GRIDS[kind] if ours else FORMATS[kind])
    if kind == "q2_k":
        sc, m = numbers(blocks[..., :16] & 15), numbers(blocks[..., :16] >> 4)
        codes, d, dmin = unpaired(blocks[..., 16:80]), floats(blocks[..., 80:82]), floats(blocks[..., 82:84])
    elif kind == "q3_k":
        high = np.unpackbits(blocks[..., None, :32], axis=-2, bitorder="little").reshape(*blocks.shape[:2], 256)
        codes, sc, d = unpaired(blocks[..., 32:96]) | high << 2, numbers(joined(blocks[..., 96:108])) - 32, floats(blocks[..., 108:110])
        m, dmin = None, None
    else:
        d, dmin, codes = floats(blocks[..., :2]), floats(blocks[..., 2:4]), unnibbled(blocks[..., 16:], 32)
        sc, m = (numbers(t) for t in deinterleaved(blocks[..., 4:16]))
    if not bool(((sc > 0) & (d > 0)).all()):
        raise UserError(f"{kind} blocks with scales of 0 or below, which smidgen does not write; it reads its own files only")
    zero = None if dmin is None or m is None else dmin.double() * m / (d * sc).double()
    return assembled(codes, d * sc, zero, FORMATS[kind])


def assembled(codes: np.ndarray, scale: Tensor, zero: Tensor | None, grid: Grid) -> QWeight:
    """A QWeight of (out, blocks, ...) parts."""
    scale = scale.flatten(1)
    zero = torch.full_like(scale, 2 ** (grid.bits - 1)) if zero is None else zero.flatten(1).float()
    return QWeight(torch.from_numpy(codes.reshape(len(codes), -1)), scale, zero, grid)


def half(x: Tensor) -> np.ndarray:
    """float16 as bytes: (..., n) -> (..., 2n)."""
    return x.numpy().astype("<f2").view(np.uint8)


def floats(data: np.ndarray) -> Tensor:
    """The opposite, as float32."""
    return torch.from_numpy(np.ascontiguousarray(data).view("<f2").astype(np.float32))


def byte(x: Tensor) -> np.ndarray:
    """Small integers in floats, as bytes."""
    return x.numpy().astype(np.uint8)


def numbers(x: np.ndarray) -> Tensor:
    """The opposite."""
    return torch.from_numpy(x.astype(np.float32))


def nibbles(codes: np.ndarray, n: int) -> np.ndarray:
    """The second `n` of every 2n codes above the first."""
    c = codes.reshape(*codes.shape[:2], -1, 2, n)
    return (c[..., 0, :] | c[..., 1, :] << 4).reshape(*codes.shape[:2], -1)


def unnibbled(data: np.ndarray, n: int) -> np.ndarray:
    """The opposite."""
    c = data.reshape(*data.shape[:2], -1, 1, n)
    return np.concatenate([c & 15, c >> 4], -2).reshape(*data.shape[:2], -1)


def pairs(codes: np.ndarray) -> np.ndarray:
    """Two-bit codes, four to a byte, 32 columns apart."""
    c = codes.reshape(*codes.shape[:2], 2, 4, 32) << SHIFTS[:, None]
    return np.bitwise_or.reduce(c, -2).reshape(*codes.shape[:2], 64)


def unpaired(data: np.ndarray) -> np.ndarray:
    """The opposite."""
    return (data.reshape(*data.shape[:2], 2, 1, 32) >> SHIFTS[:, None] & 3).reshape(*data.shape[:2], 256)


def split(sc: np.ndarray) -> np.ndarray:
    """q3_k's 16 numbers of 6 bits in 12 bytes."""
    low = sc[..., :8] & 15 | (sc[..., 8:] & 15) << 4
    high = (sc >> 4).reshape(*sc.shape[:-1], 4, 4) << SHIFTS[:, None]
    return np.concatenate([low, np.bitwise_or.reduce(high, -2)], -1)


def joined(data: np.ndarray) -> np.ndarray:
    """The opposite."""
    low = np.concatenate([data[..., :8] & 15, data[..., :8] >> 4], -1)
    high = data[..., None, 8:] >> SHIFTS[:, None] & 3
    return low | high.reshape(low.shape) << 4


def interleaved(sc: np.ndarray, m: np.ndarray) -> np.ndarray:
    """q4_k's eight sc and m of 6 bits in 12 bytes."""
    first = [x[..., :4] | (x[..., 4:] >> 4) << 6 for x in (sc, m)]
    return np.concatenate([*first, sc[..., 4:] & 15 | (m[..., 4:] & 15) << 4], -1)


def deinterleaved(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The opposite."""
    s, m, low = data[..., :4], data[..., 4:8], data[..., 8:]
    return np.concatenate([s & 63, low & 15 | s >> 6 << 4], -1), np.concatenate([m & 63, low >> 4 | m >> 6 << 4], -1)
