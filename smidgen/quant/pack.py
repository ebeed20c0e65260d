"""Codes to packed integers and back.

Codes of b bits follow each other without gaps, low bit first, and fill 32-bit words from the low end. At 3 bits:

    word 0, bit 31                                          bit 0
    [c10 lo 2 bits][c9][c8][c7][c6][c5][c4][c3][c2][c1][c0]        the high bit of c10 is bit 0 of word 1

This is the dense layout of compressed-tensors >= 0.15 (at 2, 4 and 8 bits also of all earlier ones).
"""

import numpy as np
from jaxtyping import Int32, UInt8


def pack(codes: UInt8[np.ndarray, "rows n"], bits: int) -> Int32[np.ndarray, "rows words"]:
    """Packs along the last axis.

    >>> pack(np.array([[1, 2, 3, 0, 1]], dtype=np.uint8), 2)      # 01 00 11 10 01
    array([[313]], dtype=int32)
    """
    rows, n = codes.shape
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(rows, n * bits)
    stream = np.pad(stream, ((0, 0), (0, -n * bits % 32)))
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4").astype(np.int32)


def unpack(words: Int32[np.ndarray, "rows words"], bits: int, n: int) -> UInt8[np.ndarray, "rows n"]:
    """The first `n` codes of every row."""
    stream = np.unpackbits(np.ascontiguousarray(words.astype("<i4")).view(np.uint8), axis=-1, count=n * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (stream.reshape(len(words), n, bits) * weights).sum(-1, dtype=np.uint8)
