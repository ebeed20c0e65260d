"""New images under a budget: how many of what, made how, and which of them stay.

    how many    class c of C gets B_c proportional to 1 + GAMMA e_c, sum B_c = B          e_c: out-of-fold error on trusted images
                originals are never thrown away: a class that has more keeps them, and the others share the rest
    of what     an original is drawn in proportion to how rare it is: its distance to the NEAR nearest images of its class, as multiple of
                the class's median, between 1/2 and 2
    how         an allowed flip by a coin's toss, then up to STEPS other operators that are allowed (safety.py), each at a drawn strength
    which       half as many again are made as are needed. The judges, none of which saw the original, give each p(its class); the lowest
                POOR of them go. Edge cases come first: the EDGE nearest of every trusted image that the judges got wrong, up to SHARE of
                what is needed. The others follow as drawn.

The same seed makes the same images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from smidgen.refine.classifier import Judge
from smidgen.refine.folder import Copy, View, untouched
from smidgen.refine.operators import OPERATORS, Transform
from smidgen.refine.safety import Policy
from smidgen.run import Run

GAMMA = 1.0
NEAR = 5
STEPS = 3
WEAKEST = 0.3  # drawn strength, as share of the limit
POOL = 1.5
POOR, EDGE, SHARE = 0.15, 5, 0.3


@dataclass(frozen=True)
class Originals:
    """The set that is added to."""

    rows: Int[np.ndarray, "m"]
    "Of the source."
    labels: Int[np.ndarray, "m"]
    trusted: Bool[np.ndarray, "m"]
    "Whether nothing speaks against the label; only these are copied and learnt from."
    wrong: Bool[np.ndarray, "m"]
    "Whether the judges say another class."
    features: Float[Tensor, "m width"]

    def errors(self, classes: int) -> Float[np.ndarray, "classes"]:
        """Share of a class's trusted images that the judges get wrong."""
        total = np.bincount(self.labels[self.trusted], minlength=classes)
        return np.bincount(self.labels[self.trusted & self.wrong], minlength=classes) / np.maximum(1, total)

    def copies(self, chosen: Bool[np.ndarray, "m"]) -> list[Copy]:
        """Some of them, as they are."""
        return untouched(self.rows[chosen].tolist(), self.labels[chosen].tolist())


def augment(originals: Originals, policy: Policy, judge: Judge, view: View, budget: int, run: Run, seed: int) -> list[Copy]:
    """Copies that fill the budget, class by class."""
    classes = len(policy.accuracy)
    counts = np.bincount(originals.labels, minlength=classes)
    usable = np.array([bool(sources(originals, policy, c)) for c in range(classes)])
    needs = allocate(counts, originals.errors(classes), budget, usable) - counts
    weights = rarity(originals)
    copies: list[Copy] = []
    for c in run.track(range(classes), "augmenting classes", classes):
        if needs[c] > 0:
            generator = np.random.default_rng((seed, c))
            pool = candidates(originals, weights, policy, c, int(np.ceil(POOL * needs[c])), generator)
            copies += select(originals, judge, view, pool, int(needs[c]), c)
    return copies


def allocate(
    counts: Int[np.ndarray, "classes"], error: Float[np.ndarray, "classes"], budget: int, usable: Bool[np.ndarray, "classes"] | None = None
) -> Int[np.ndarray, "classes"]:
    """Images of every class, at least those it has, that sum to the budget, or to the images there are if these are more.

    Classes that are not usable stay as they are. Of what whole numbers leave over, the classes with the largest fractions get one each.

    >>> allocate(np.array([10, 50, 10]), np.array([0.0, 0.0, 1.0]), 140)
    array([30, 50, 60])
    """
    growing = np.ones(len(counts), bool) if usable is None else usable.copy()
    weight = 1 + GAMMA * error
    share = counts.astype(float)
    while growing.any():
        share[growing] = (budget - counts[~growing].sum()) * weight[growing] / weight[growing].sum()
        full = growing & (share < counts)
        if not full.any():
            break
        share[full], growing = counts[full], growing & ~full
    whole = np.floor(share + 1e-9).astype(int)
    over = budget - whole.sum() if growing.any() else 0
    whole[np.argsort(np.where(growing, whole - share, 1.0), kind="stable")[:over]] += 1
    return whole


def rarity(originals: Originals) -> Float[np.ndarray, "m"]:
    """Distance to the nearest of the same class over the class's median of it, between 1/2 and 2."""
    weights = np.ones(len(originals.rows))
    for c in np.unique(originals.labels):
        mine = np.flatnonzero(originals.labels == c)
        x = F.normalize(originals.features[mine].float(), dim=1)
        k = min(NEAR, len(mine) - 1)
        if k > 0:
            distance = torch.cdist(x, x).topk(k + 1, largest=False).values[:, 1:].mean(1).numpy()
            weights[mine] = np.clip(distance / max(float(np.median(distance)), 1e-12), 0.5, 2.0)
    return weights


def sources(originals: Originals, policy: Policy, label: int) -> list[tuple[int, str | None]]:
    """(index, flip) of trusted originals that become images of a class: its own, and those a label map takes there."""
    own = originals.trusted & (originals.labels == label)
    can = policy.allowed(label) or policy.flips(label)
    found: list[tuple[int, str | None]] = [(int(i), None) for i in np.flatnonzero(own)] if can else []
    for flip, becomes in policy.maps.items():
        others = [c for c, d in enumerate(becomes) if d == label]
        found += [(int(i), flip) for i in np.flatnonzero(originals.trusted & np.isin(originals.labels, others))]
    return found


def candidates(
    originals: Originals, weights: Float[np.ndarray, "m"], policy: Policy, label: int, count: int, generator: np.random.Generator
) -> list[Copy]:
    """New images of a class; every original comes in proportion to its weight, to within one."""
    offered = sources(originals, policy, label)
    ends = np.cumsum(weights[[i for i, _ in offered]])
    drawn = np.searchsorted(ends / ends[-1], (np.arange(count) + generator.uniform()) / count).clip(max=len(offered) - 1)
    made = []
    for number in generator.permutation(drawn):
        index, flip = offered[number]
        made.append(Copy(int(originals.rows[index]), label, propose(policy, label, flip, generator)))
    return made


def propose(policy: Policy, label: int, flip: str | None, generator: np.random.Generator) -> Transform:
    """A random transform within the limits of a class; `flip` is a label map that comes first."""
    steps = [(flip, 1.0)] if flip is not None else []
    steps += [(name, 1.0) for name in policy.flips(label) if generator.random() < 0.5]
    allowed = policy.allowed(label)
    for i in generator.permutation(len(allowed))[: 1 + generator.integers(STEPS)]:
        strength = policy.limits[allowed[i]][label] * generator.uniform(WEAKEST, 1.0)
        sign = generator.choice((-1.0, 1.0)) if OPERATORS[allowed[i]].signed else 1.0
        steps.append((allowed[i], round(float(sign * strength), 4)))
    return Transform(tuple(steps), int(generator.integers(2**31)))


def select(originals: Originals, judge: Judge, view: View, pool: Sequence[Copy], need: int, label: int) -> list[Copy]:
    """The candidates that stay, in the order of the pool."""
    x = view(pool)
    p = judge.probabilities(x, [copy.row for copy in pool])[:, label]
    good = p.argsort(descending=True, stable=True)[: max(need, len(pool) - int(POOR * len(pool)))].sort().values
    mistakes = originals.copies((originals.labels == label) & originals.trusted & originals.wrong)
    chosen = set(good[nearest(judge, view(mistakes), x[good])][: int(SHARE * need)].tolist()) if mistakes else set()
    for i in good.tolist():
        if len(chosen) == need:
            break
        chosen.add(i)
    return [pool[i] for i in sorted(chosen)]


def nearest(judge: Judge, wanted: UInt8[Tensor, "w c h h2"], x: UInt8[Tensor, "n c h h2"]) -> Int[Tensor, "k"]:
    """Indices of the EDGE images nearest to each wanted one, those of the nearest pairs first, each once."""
    a, b = (F.normalize(judge.features(images), dim=1) for images in (wanted, x))
    distance, place = torch.cdist(a, b).topk(min(EDGE, len(b)), largest=False)
    order = distance.flatten().argsort(stable=True)
    return torch.tensor(list(dict.fromkeys(place.flatten()[order].tolist())), dtype=torch.int64)
