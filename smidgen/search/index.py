"""The features of a device as one file, index.smi, mapped into memory and searched exactly; needs numpy alone.

A feature has several vectors, its views, of length 1 and kept in int8 with a scale each:

    v ~ a c,  a = max |v| / 127,  c = round(v / a)              |v - a c| <= a / 2 in every number
    s(u, feature) = max over its views of a (c . u)             u, the query, stays float: all that is lost is the rounding above

No nearest-neighbour graph: below 50,000 features a whole product costs less than cutting the query into pieces.

The file, little-endian, every array at a multiple of 64 bytes:

    0   8 bytes   89 53 4d 49 0d 0a 1a 0a    "SMI" between a byte no text has and line ends, as in PNG: a transfer as text shows
    8   uint32    1, the version
    12  uint32    width      numbers of a vector
    16  uint32    features
    20  uint32    vectors
    24  uint32    trigrams
    28  uint32    postings
    32  uint32    CRC-32 of all bytes from 64 on
    36  uint32    CRC-32 of bytes 0 to 35
    64  codes     int8 (vectors, width)
        scales    float32 (vectors)          a
        starts    uint32 (features + 1)      the vectors of feature i are starts[i] to starts[i + 1] - 1
        keys      uint64 (trigrams)          fusion.py's lexicon
        first     uint32 (trigrams + 1)
        members   uint32 (postings)

`smidgen search add` writes a new file and renames it over the old one: a reader has the one or the other, never half of it.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int8, UInt32

from smidgen.errors import UserError
from smidgen.search.folder import present, written
from smidgen.search.fusion import Lexicon

MAGIC = b"\x89SMI\r\n\x1a\n"
VERSION = 1
HEADER = struct.Struct("<8s7I")
HEAD, ALIGN = 64, 64  # bytes
BLOCK = 2048  # vectors turned into floats at once, into the same memory: 3 MB at width 384


@dataclass(frozen=True)
class Index:
    """Vectors and trigrams of features, by their number."""

    codes: Int8[np.ndarray, "vectors width"]
    scales: Float32[np.ndarray, "vectors"]
    starts: UInt32[np.ndarray, "features_and_one"]
    lexicon: Lexicon

    @staticmethod
    def of(views: Sequence[Float[np.ndarray, "_ width"]], texts: Sequence[str]) -> "Index":
        """Of the vectors of every feature, and the text whose trigrams it is found by."""
        if not views or len(views) != len(texts) or not all(map(len, views)):
            raise ValueError("an index needs features, each with a vector and a text")
        codes, scales = quantized(np.concatenate(views))
        starts = np.concatenate([[0], np.cumsum([len(v) for v in views])]).astype(np.uint32)
        return Index(codes, scales, starts, Lexicon.of(texts))

    @staticmethod
    def read(path: Path, mapped: bool = True) -> "Index":
        """The file; one that is cut short, changed or of another kind is refused by name.

        Mapped into memory it costs what is used of it, but must not be written to in place. Otherwise it is copied.
        """
        counts = _header(path)
        layout, size = _layout(counts)
        data = np.asarray(np.memmap(path, np.uint8, "r")) if mapped else np.fromfile(path, np.uint8)  # slices of a memmap are slow to make
        if len(data) != size:
            raise UserError(f"{path}: damaged, it has {len(data)} of {size} bytes; copy or distil it again")
        if zlib.crc32(data[HEAD:].data) != counts["crc"]:
            raise UserError(f"{path}: damaged, its checksum is wrong; copy or distil it again")
        found = {name: data[at : at + _bytes(shape, kind)].view(kind).reshape(shape) for name, (at, shape, kind) in layout.items()}
        index = Index(
            found["codes"],
            found["scales"],
            found["starts"],
            Lexicon(found["keys"], found["first"], found["members"], counts["features"]),
        )
        index.check(path)
        return index

    def write(self, path: Path) -> None:
        """The file; complete or not there."""
        layout, size = _layout(self._counts())
        data = bytearray(size)
        for name, (at, shape, kind) in layout.items():
            data[at : at + _bytes(shape, kind)] = np.ascontiguousarray(self._arrays()[name], kind).tobytes()
        counts = self._counts()
        head = HEADER.pack(MAGIC, VERSION, *counts.values(), zlib.crc32(memoryview(data)[HEAD:]))
        data[: len(head)] = head
        data[len(head) : len(head) + 4] = struct.pack("<I", zlib.crc32(head))
        with written(path) as file:
            file.write(data)

    def extended(self, views: Sequence[Float[np.ndarray, "_ width"]], texts: Sequence[str]) -> "Index":
        """With features more, numbered on."""
        new = Index.of(views, texts)
        return Index(
            np.concatenate([self.codes, new.codes]),
            np.concatenate([self.scales, new.scales]),
            np.concatenate([self.starts, new.starts[1:] + self.starts[-1]]),
            self.lexicon.extended(texts),
        )

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.codes.shape[1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def scores(self, *units: Float32[np.ndarray, "width"]) -> Float32[np.ndarray, "features"]:
        """s of every feature: its best view's cosine with u, a vector of length 1; of several, with whichever is nearest."""
        dots = np.empty(len(self.codes), np.float32)
        floats = np.empty((BLOCK, self.width), np.float32) if self._floats is None else self._floats
        for at in range(0, len(dots), BLOCK):
            block = self.codes[at : at + BLOCK]
            if self._floats is None:
                np.copyto(floats[: len(block)], block)
            found = dots[at : at + len(block)]
            np.dot(floats[: len(block)], units[0], out=found)
            for u in units[1:]:
                np.maximum(found, floats[: len(block)] @ u, out=found)
        dots *= self.scales
        if not self._views:
            return np.maximum.reduceat(dots, self.starts[:-1])
        return reduce(np.maximum, (dots[view :: self._views] for view in range(self._views)))

    @cached_property
    def _views(self) -> int:
        """Of every feature; 0 if they have not as many."""
        counts = np.diff(self.starts)
        return int(counts[0]) if (counts == counts[0]).all() else 0

    @cached_property
    def _floats(self) -> Float32[np.ndarray, "vectors width"] | None:
        """The codes of an index of one block, turned into floats once: no more memory than a query would take."""
        return self.codes.astype(np.float32) if len(self.codes) <= BLOCK else None

    def check(self, path: Path) -> None:
        """Refuses numbers that point outside of the arrays; the checksum is of what was written, whoever wrote it."""
        lexicon = self.lexicon
        ends = self.starts[0] == 0 and self.starts[-1] == len(self.codes) and lexicon.first[0] == 0
        inside = lexicon.first[-1] == len(lexicon.members) and (not len(lexicon.members) or lexicon.members.max() < len(self))
        ascending = (np.diff(self.starts.astype(np.int64)) > 0).all() and (np.diff(lexicon.first.astype(np.int64)) > 0).all()
        if not (ends and inside and ascending and np.isfinite(self.scales).all()):
            raise UserError(f"{path}: damaged, its numbers point outside of it; distil it again")

    def _arrays(self) -> dict[str, np.ndarray]:
        lexicon = self.lexicon
        return {
            "codes": self.codes, "scales": self.scales, "starts": self.starts,
            "keys": lexicon.keys, "first": lexicon.first, "members": lexicon.members,
        }  # fmt: skip

    def _counts(self) -> dict[str, int]:
        lexicon = self.lexicon
        return {
            "width": self.width, "features": len(self), "vectors": len(self.codes),
            "trigrams": len(lexicon.keys), "postings": len(lexicon.members),
        }  # fmt: skip


def quantized(v: Float[np.ndarray, "n width"]) -> tuple[Int8[np.ndarray, "n width"], Float32[np.ndarray, "n"]]:
    """Codes and scales of rows; rows of zeros stay zeros.

    >>> codes, scales = quantized(np.array([[1.27, -0.635, 0.0]]))
    >>> codes.tolist(), float(scales[0].round(6))
    ([[127, -64, 0]], 0.01)
    """
    scales = np.abs(v).max(1) / 127
    codes = np.rint(v / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    return codes, scales.astype(np.float32)


def best(scores: Float[np.ndarray, "n"], count: int) -> np.ndarray:
    """Numbers of the highest scores, the best first, equal ones in their order; all of them if there are fewer.

    As a stable sort has it, without sorting all.

    >>> best(np.array([0.1, 0.9, 0.5, 0.9], np.float32), 3).tolist()
    [1, 3, 2]
    """
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
    chosen = np.sort(np.concatenate([above, equal[: count - len(above)]]))
    return chosen[np.argsort(-scores[chosen], kind="stable")]


def _header(path: Path) -> dict[str, int]:
    present(path)
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path}: not an index of smidgen search, or changed on its way")
    if len(head) < HEAD:
        raise UserError(f"{path}: damaged, it has {len(head)} bytes, not even its header; copy or distil it again")
    _, version, *counts, crc = HEADER.unpack_from(head)
    if version != VERSION:
        raise UserError(f"{path}: an index of version {version}, this smidgen reads {VERSION}; distil it again")
    if zlib.crc32(head[: HEADER.size]) != struct.unpack_from("<I", head, HEADER.size)[0]:
        raise UserError(f"{path}: damaged, the checksum of its header is wrong; copy or distil it again")
    return dict(zip(("width", "features", "vectors", "trigrams", "postings"), counts, strict=True)) | {"crc": crc}


def _layout(counts: dict[str, int]) -> tuple[dict[str, tuple[int, tuple[int, ...], str]], int]:
    """Place, shape and type of every array, and the size of the file."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "codes": ((counts["vectors"], counts["width"]), "<i1"),
        "scales": ((counts["vectors"],), "<f4"),
        "starts": ((counts["features"] + 1,), "<u4"),
        "keys": ((counts["trigrams"],), "<u8"),
        "first": ((counts["trigrams"] + 1,), "<u4"),
        "members": ((counts["postings"],), "<u4"),
    }
    layout, at = {}, HEAD
    for name, (shape, kind) in shapes.items():
        layout[name] = at, shape, kind
        at += -(-_bytes(shape, kind) // ALIGN) * ALIGN
    return layout, at


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
