"""Number sequence prediction: the next term of a third-order recurrence.

    a_k = 2 a_{k-1} - a_{k-2} + a_{k-3}

The first three terms are drawn, each with a random sign. `L` bounds their digits: "mixed" draws a digit count 1 .. L first, so that short
numbers are as frequent as long ones; else magnitudes are uniform in 1 .. 10^L - 1. Input: m terms with spaces between; target: term m + 1.

    split    L    m           magnitudes
    train    4    4 .. 6      mixed
    dev      4    4 .. 6      mixed
    id       4    4 .. 6      uniform
    ood      6    10 .. 12    uniform

Long sequences are the easier ones: after ten terms the last three nearly always share a sign, and no borrow between mixed signs is left
to do. Hence the two groups.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from smidgen.symbolic.tasks import Examples, Task, hashed
from smidgen.symbolic.vocabulary import Vocabulary

GROUPS = ("last three of one sign", "last three of mixed signs")


@dataclass(frozen=True)
class Sizes:
    """Of a split."""

    digits: int
    terms: tuple[int, int]
    "Fewest and most."
    mixed: bool


SPLITS = {"train": Sizes(4, (4, 6), True), "dev": Sizes(4, (4, 6), True), "id": Sizes(4, (4, 6), False), "ood": Sizes(6, (10, 12), False)}


def task() -> Task:
    """The task of all splits."""
    longest = [_longest(sizes) for sizes in SPLITS.values()]
    return Task(
        name="number-sequence",
        tokens=Vocabulary(tuple(" -0123456789")),
        answers=Vocabulary(tuple("-0123456789")),
        length=max(length for length, _ in longest),
        slots=max(slots for _, slots in longest),
        splits=dict.fromkeys(SPLITS),
        draw=draw,
        groups=GROUPS,
    )


def draw(split: str, n: int, rng: np.random.Generator) -> Examples:
    """`n` sequences."""
    return hashed(split, n, lambda count: sequences(SPLITS[split], count, rng))


def sequences(sizes: Sizes, n: int, rng: np.random.Generator) -> Examples:
    """`n` sequences of any part of the hash."""
    least, most = sizes.terms
    terms = np.empty((n, most + 1), np.int64)
    terms[:, :3] = magnitudes(sizes, (n, 3), rng) * rng.choice((-1, 1), (n, 3))
    for k in range(3, most + 1):
        terms[:, k] = 2 * terms[:, k - 1] - terms[:, k - 2] + terms[:, k - 3]
    m = rng.integers(least, most + 1, n)
    last = np.sign(np.take_along_axis(terms, m[:, None] - [3, 2, 1], 1))
    mixed = (last.min(1) < 0) & (last.max(1) > 0)
    rows = [(row[:count], row[count]) for row, count in zip(terms.tolist(), m.tolist(), strict=True)]
    return Examples([" ".join(map(str, row)) for row, _ in rows], [str(answer) for _, answer in rows], mixed.astype(int).tolist())


def magnitudes(sizes: Sizes, shape: tuple[int, int], rng: np.random.Generator) -> Int[np.ndarray, "n terms"]:
    """Of first terms."""
    if not sizes.mixed:
        return rng.integers(1, 10**sizes.digits, shape)
    digits = rng.integers(1, sizes.digits + 1, shape)
    return rng.integers(10 ** (digits - 1), 10**digits)


def _longest(sizes: Sizes) -> tuple[int, int]:
    """Bounds of the lengths of input and target with their ends: every term as large as its rule allows, and negative."""
    bounds = [10**sizes.digits - 1] * 3
    while len(bounds) <= sizes.terms[1]:
        bounds.append(2 * bounds[-1] + bounds[-2] + bounds[-3])
    characters = [1 + len(str(bound)) for bound in bounds]
    return sum(characters[:-1]) + sizes.terms[1], characters[-1] + 1
