"""Pictures that are there twice: the same bytes, the same picture saved again, or the same picture moved a little.

    exact        equal size and pixels
    perceptual   64 bits of the low frequencies (pHash: 32 x 32, cosine transform, the 8 x 8 lowest against their median) differ in 6
                 at most, and the two 32 x 32 pictures correlate; sparse drawings share bits with strangers, so these prove nothing alone
    embedding    much nearer to each other than images of this set usually are to their nearest, and correlated after a small shift

Two pictures correlate if their grey values do (.98), and their edges too (.8): photographs with one smooth background agree in the first
alone. Groups are what pairs connect. A group with images on both sides, training and validation, is a leak: validation would praise what
was learnt by heart. Leaks come first, and lose their training side. Where labels differ a person has to look; else one image is kept, that
of the best label.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from smidgen.refine.detectors.quality import BLANK, grey_values
from smidgen.refine.neighbours import nearest

Kind = Literal["exact", "perceptual", "embedding"]
SIDE, LOW = 32, 8  # of the small pictures; of the frequencies kept
BITS = 6  # that may differ
GREY, EDGES = 0.98, 0.8  # least correlations
NEAR = 0.3  # of the median distance to the nearest
SHIFT = 3  # pixels of 32, each way
ENTRIES = 2**24  # comparisons held at once


@dataclass(frozen=True)
class Group:
    """Images that are the same picture."""

    members: tuple[int, ...]
    kind: Kind
    "The weakest evidence that holds the group together."
    keep: int
    surplus: tuple[int, ...]
    "To be left out; none where a person has to look."
    leak: bool
    "In training and in validation."
    disagree: bool
    "Under different labels."


def digest(pixels: UInt8[np.ndarray, "height width channels"]) -> bytes:
    """Equal for equal pictures."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).digest()


def find_duplicates(
    pixels: UInt8[Tensor, "n height width channels"],
    y: Int[Tensor, "n"],
    x: Float[Tensor, "n d"] | None = None,
    digests: Sequence[bytes] | None = None,
    validation: Bool[Tensor, "n"] | None = None,
    quality: Float[Tensor, "n"] | None = None,
) -> list[Group]:
    """Groups of duplicates, leaks first, then by their first image.

    `pixels` are the images brought to one size; `digests` those of the originals, else of `pixels`; `x` their embeddings, without which the
    third kind is not looked for; `validation` marks that side; of a group the image of highest `quality` is kept, else the first.
    """
    keys = [digest(p) for p in pixels.cpu().numpy()] if digests is None else digests
    if len(keys) != len(pixels):
        raise ValueError(f"{len(keys)} digests for {len(pixels)} images")
    links: list[tuple[Kind, Iterable[tuple[int, int]]]] = [("exact", _equal(keys)), ("perceptual", perceptual_pairs(pixels))]
    if x is not None:
        links.append(("embedding", embedding_pairs(pixels, x)))
    kinds: dict[int, Kind] = {}
    parent = list(range(len(keys)))
    for kind, pairs in links:
        for a, b in pairs:
            a, b = _root(parent, a), _root(parent, b)
            if a != b:
                parent[max(a, b)] = min(a, b)
                kinds[min(a, b)] = kind  # links come strongest first
    members: dict[int, list[int]] = {}
    for i in range(len(keys)):
        members.setdefault(_root(parent, i), []).append(i)
    sides = torch.zeros_like(y, dtype=torch.bool) if validation is None else validation
    order = torch.arange(len(y), 0, -1, dtype=torch.float32) if quality is None else quality
    groups = [_group(m, kinds[root], y.tolist(), sides.tolist(), order.tolist()) for root, m in members.items() if len(m) > 1]
    return sorted(groups, key=lambda g: (not g.leak, g.members))


def group_numbers(groups: Iterable[Group], n: int) -> Int[Tensor, "n"]:
    """A number per image, shared by duplicates: what Evidence.groups wants."""
    numbers = torch.arange(n)
    for group in groups:
        numbers[list(group.members)] = group.members[0]
    return numbers


def _group(members: list[int], kind: Kind, y: list[int], validation: list[bool], quality: list[float]) -> Group:
    held, train = ([i for i in members if validation[i] is side] for side in (True, False))
    leak, disagree = bool(held and train), len({y[i] for i in members}) > 1
    keep = max(held or train, key=lambda i: quality[i])
    surplus = train if leak else [] if disagree else [i for i in members if i != keep]
    return Group(tuple(members), kind, keep, tuple(surplus), leak, disagree)


def _root(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = i = parent[parent[i]]
    return i


# --- pairs -----------------------------------------------------------------------------------------------------------


def _equal(keys: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    first: dict[bytes, int] = {}
    for i, key in enumerate(keys):
        if first.setdefault(key, i) != i:
            yield first[key], i


def perceptual_pairs(pixels: UInt8[Tensor, "n height width channels"]) -> list[tuple[int, int]]:
    """Pairs whose low frequencies agree and whose pictures correlate; blank pictures are nobody's likeness."""
    small = small_pictures(pixels)
    signs = perceptual_signs(small)
    places = (small.flatten(1).std(1) > BLANK).nonzero()[:, 0]
    found = []
    for rows in places.split(max(1, ENTRIES // max(1, len(places)))):
        agreeing = signs[rows] @ signs[places].mT >= LOW * LOW - 2 * BITS  # a bit that differs takes 2 off
        a, b = agreeing.nonzero().unbind(1)
        a, b = rows[a], places[b]
        found.append(torch.stack([a, b], 1)[a < b])
    return _confirmed(small, torch.cat(found), 0) if found else []


def embedding_pairs(pixels: UInt8[Tensor, "n height width channels"], x: Float[Tensor, "n d"]) -> list[tuple[int, int]]:
    """Pairs that a network takes for nearly the same, confirmed by the pictures."""
    similarities, places = nearest(x - x.mean(0), 5)
    distances = 1 - similarities
    near = (distances < NEAR * distances[:, 0].median()).nonzero()
    a, b = near[:, 0], places[near[:, 0], near[:, 1]]
    pairs = torch.stack([torch.minimum(a, b), torch.maximum(a, b)], 1).unique(dim=0)
    return _confirmed(small_pictures(pixels), pairs.to(pixels.device), SHIFT)


def small_pictures(pixels: UInt8[Tensor, "n height width channels"]) -> Float[Tensor, "n 32 32"]:
    """Grey, in [0, 1]."""
    parts = [F.interpolate(grey_values(p)[:, None], (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0] for p in pixels.split(1024)]
    return torch.cat(parts)


def perceptual_signs(small: Float[Tensor, "n 32 32"]) -> Float[Tensor, "n 64"]:
    """pHash with bits -1 and 1."""
    i = torch.arange(SIDE, device=small.device)
    cosines = torch.cos(torch.pi / SIDE * (i + 0.5) * i[:LOW, None])  # (low, side)
    frequencies = (cosines @ small @ cosines.mT).flatten(1)
    middle = frequencies[:, 1:].median(1, keepdim=True).values  # the mean brightness says nothing
    return torch.where(frequencies > middle, 1.0, -1.0)


def _confirmed(small: Float[Tensor, "n 32 32"], pairs: Int[Tensor, "m 2"], shift: int) -> list[tuple[int, int]]:
    kept = []
    for part in pairs.split(4096):
        kept += part[correlated(small[part[:, 0]], small[part[:, 1]], shift)].tolist()
    return [(a, b) for a, b in kept]


def correlated(a: Float[Tensor, "m h w"], b: Float[Tensor, "m h w"], shift: int = 0) -> Bool[Tensor, "m"]:
    """Whether pictures and their edges correlate, where they overlap, for some shift up to so many pixels each way."""
    inner = slice(shift, a.shape[1] - shift)
    middle, found = a[:, inner, inner], torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for down in range(2 * shift + 1):
        for right in range(2 * shift + 1):
            moved = b[:, down : down + middle.shape[1], right : right + middle.shape[2]]
            found |= (_correlation(middle, moved) > GREY) & (_correlation(_edges(middle), _edges(moved)) > EDGES)
    return found


def _correlation(a: Tensor, b: Tensor) -> Float[Tensor, "m"]:
    a, b = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (a, b))
    return F.cosine_similarity(a, b)


def _edges(a: Float[Tensor, "m h w"]) -> Float[Tensor, "m h_ w_"]:
    return 4 * a[:, 1:-1, 1:-1] - a[:, :-2, 1:-1] - a[:, 2:, 1:-1] - a[:, 1:-1, :-2] - a[:, 1:-1, 2:]
