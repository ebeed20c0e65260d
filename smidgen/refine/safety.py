"""Which transforms keep the label: learnt from the images, per class.

For an operator t at strength s and trusted images of class c, judged by networks that saw neither them nor their duplicates:

    keep(c, t, s)   share of t_s(images of c) judged to be of c
    a_c             the same of the images as they are

    allowed         every strength up to s has keep(c, t, .) >= a_c - TOLERANCE; the largest such s is c's limit, 0 refuses t
    label map       a flip that takes c to one other class d, and d to c: at least CERTAIN of what networks get right anyway. It makes new
                    images of d out of c (a mirrored IV is a VI).

Of a class that networks know too badly (a_c < KNOWN) nothing can be said. It is allowed what all classes allow that they do know, and never
a flip: without new images it would drown among classes that have them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from smidgen.refine.classifier import Judge
from smidgen.refine.folder import Copy, View
from smidgen.refine.operators import FLIPS, OPERATORS, Transform
from smidgen.run import Run

EACH = 60  # images of a class a transform is tried on
TOLERANCE, CERTAIN, KNOWN = 0.05, 0.9, 0.5
Table = Float[np.ndarray, "classes classes"]


@dataclass(frozen=True)
class Policy:
    """What may be done to images of every class."""

    limits: dict[str, tuple[float, ...]]
    "Operator -> the largest strength, by class; 0: none."
    maps: dict[str, tuple[int, ...]]
    "Flip -> the class an image of a class becomes; -1: none."
    accuracy: Float[np.ndarray, "classes"]
    "Of the judges on trusted images."

    def allowed(self, label: int) -> list[str]:
        """Operators for a class, flips left out."""
        return [name for name in OPERATORS if name not in FLIPS and self.limits[name][label] > 0]

    def flips(self, label: int) -> list[str]:
        """Flips that keep a class."""
        return [name for name in FLIPS if self.limits[name][label] > 0]


def learn(judge: Judge, view: View, trusted: Sequence[Copy], classes: int, run: Run, seed: int) -> Policy:
    """Tries every operator at every strength on some trusted originals of every class."""
    tried = sample(trusted, classes, seed)
    accuracy = np.diag(shares(judge, view, tried, None, 0.0, classes, seed)).copy()
    known = accuracy >= KNOWN
    limits, maps = {}, {}
    for name in run.track(OPERATORS, "trying transforms", len(OPERATORS)):
        strengths = OPERATORS[name].strengths
        tables = [shares(judge, view, tried, name, s, classes, seed) for s in strengths]
        keep = np.stack([np.diag(table) for table in tables])  # (strengths, classes)
        safe = np.logical_and.accumulate(keep >= accuracy - TOLERANCE) & known
        largest = (np.array(strengths)[:, None] * safe).max(0)
        if known.any() and name not in FLIPS:
            largest[~known] = largest[known].min()
        limits[name] = tuple(largest.tolist())
        if name in FLIPS:
            maps[name] = label_map(tables[0], accuracy, known & ~safe[0])
        run.log(transform=name, keep=keep.round(4).tolist(), limit=limits[name], largest=max(strengths), becomes=maps.get(name))
    return Policy(limits, maps, accuracy)


def sample(trusted: Sequence[Copy], classes: int, seed: int) -> list[Copy]:
    """At most EACH of every class."""
    generator = np.random.default_rng(seed)
    labels = np.array([copy.label for copy in trusted], dtype=int)
    chosen = [generator.permutation(np.flatnonzero(labels == c))[:EACH] for c in range(classes)]
    return [trusted[i] for of_class in chosen for i in sorted(of_class)]


def shares(judge: Judge, view: View, tried: Sequence[Copy], name: str | None, strength: float, classes: int, seed: int) -> Table:
    """Of the images of a class (rows), the share judged to be of each one after the transform; signs alternate."""
    signs = [-1 if name is not None and OPERATORS[name].signed and i % 2 else 1 for i in range(len(tried))]
    transforms = [Transform(((name, sign * strength),) if name else (), seed + i) for i, sign in enumerate(signs)]
    x = view([Copy(copy.row, copy.label, transform) for copy, transform in zip(tried, transforms, strict=True)])
    found = judge.probabilities(x, [copy.row for copy in tried]).argmax(1).numpy()
    table = np.zeros((classes, classes))
    np.add.at(table, (np.array([copy.label for copy in tried], dtype=int), found), 1)
    return table / np.maximum(1, table.sum(1, keepdims=True))


def label_map(table: Table, accuracy: Float[np.ndarray, "classes"], among: Bool[np.ndarray, "classes"]) -> tuple[int, ...]:
    """The class that images of every class become under an involution; -1: none, or not surely.

    >>> mirrored = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]])
    >>> label_map(mirrored, np.ones(3), np.array([False, True, True]))
    (-1, 2, 1)
    """
    goes = table.argmax(1)
    sure = (table.max(1) >= CERTAIN * accuracy[goes]) & among & among[goes]
    return tuple(int(d) if d != c and goes[d] == c and sure[c] and sure[d] else -1 for c, d in enumerate(goes))
