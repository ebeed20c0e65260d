"""From scores to verdicts: fix, drop, or leave alone.

    duplicate    of pictures that are there several times under one label all but the surest; all that validation has too
    outlier      blank, or unlike all others
    relabel      P(the proposed class is right) >= RELABEL, and the judges, networks of another kind, prefer it too
    drop         P(the label is wrong) >= DROP, by the ensemble and by the hidden-label model, and no class to put instead; at most as many
                 of a class as are wrong in it, by the sum of P. Where two classes are plausible the second finds the label right: hard
                 pictures with right labels are worth more than wrong ones cost (dev/log.md)
    keep         everything else, also where one score alone is bad

`value` decides the drops, `clean` the lines above them; it may save with another label what `value` would drop.
Of no class fewer than LEAST stay. Same pictures under different labels are nobody's to decide but a person's: they are first in the review.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smidgen.refine.cache import Cache
from smidgen.refine.detectors import Ensemble, Outliers
from smidgen.refine.detectors.quality import picture_quality
from smidgen.refine.evidence import Evidence, Method
from smidgen.refine.folder import LEAST, Finding, Source, Verdict
from smidgen.refine.valuation import DataOOB, KNNShapley

Stage = Literal["value", "clean", "augment"]
VALUES: Mapping[str, Method] = {"data-oob": DataOOB(), "knn-shapley": KNNShapley()}  # told, beside what decides
STAGES: tuple[Stage, ...] = ("value", "clean", "augment")
RELABEL, DROP = 0.8, 0.5
TRUSTED = 0.3  # P(wrong) below which an image is learnt from and copied
SHOWN = 0.2  # P(wrong) from which a person should look at an image that is kept


@dataclass(frozen=True)
class Twins:
    """Duplicates, in rows of the source."""

    groups: tuple[tuple[int, ...], ...] = ()
    leaks: Mapping[int, str] = field(default_factory=dict)
    "Row -> the validation image it is the same picture as."


@dataclass(frozen=True)
class Judged:
    """What is known of some images of a source; an entry per row."""

    rows: Int[np.ndarray, "m"]
    labels: Int[np.ndarray, "m"]
    wrong: Float[np.ndarray, "m"]
    "P(the label is wrong)."
    hidden: Float[np.ndarray, "m"]
    "The same by the hidden-label model."
    proposed: Int[np.ndarray, "m"]
    confidence: Float[np.ndarray, "m"]
    "P(the proposed class is right)."
    guess: Int[np.ndarray, "m"]
    "The judges' class."
    agree: Bool[np.ndarray, "m"]
    "Whether the judges prefer the proposed class to the label."
    odd: Bool[np.ndarray, "m"]
    "Unlike all others."
    blank: Bool[np.ndarray, "m"]
    scores: Mapping[str, Float[np.ndarray, "m"]]
    share: float
    "Estimated part of the labels that is wrong."


@dataclass(frozen=True)
class Decision:
    """About one image."""

    verdict: Verdict
    label: int
    "It gets; of what is not kept, the one given."
    reason: str


def score(evidence: Evidence, squares: Tensor, cache: Cache) -> dict[str, Tensor]:
    """Scores and flags by name; `squares` are the pictures."""

    def make() -> dict[str, Tensor]:
        found = Ensemble()(evidence)
        values = {name: method(evidence).score for name, method in VALUES.items()}
        quality = picture_quality(squares)
        outliers = Outliers()
        scores = {**values, **found.scores, "outlier": outliers(evidence).score, "picture": quality.score()}
        return {f"score {name}": value.float() for name, value in scores.items()} | {
            "wrong": found.wrong,
            "hidden": found.hidden,
            "proposed": found.proposed,
            "confidence": found.confidence,
            "share": torch.tensor(found.share),
            "odd": outliers.flagged(evidence),
            "blank": quality.blank,
        }

    assert evidence.groups is not None and evidence.probabilities is not None
    made_of = (evidence.x, evidence.y, evidence.groups, evidence.probabilities, squares, str(evidence.seed))
    return cache.kept("judged", made_of, make)


def judged(rows: Int[np.ndarray, "m"], labels: Int[np.ndarray, "m"], scored: Mapping[str, Tensor], p: Float[Tensor, "m classes"]) -> Judged:
    """Scores and the judges' probabilities together."""
    arrays = {name: value.numpy() for name, value in scored.items()}
    index = np.arange(len(rows))
    agree = p.numpy()[index, arrays["proposed"]] > p.numpy()[index, labels]
    scores = {name.removeprefix("score "): value for name, value in arrays.items() if name.startswith("score ")}
    wrong, hidden, proposed, confidence, odd, blank = (arrays[n] for n in ("wrong", "hidden", "proposed", "confidence", "odd", "blank"))
    guess, share = p.argmax(1).numpy(), float(arrays["share"])
    return Judged(rows, labels, wrong, hidden, proposed, confidence, guess, agree, odd, blank, scores, share)


class Verdicts:
    """Decisions in the making: who is decided stays so, and no class is emptied."""

    def __init__(self, j: Judged, classes: int) -> None:
        self.made = {int(row): Decision("keep", int(label), "") for row, label in zip(j.rows, j.labels, strict=True)}
        self.left = np.bincount(j.labels, minlength=classes)

    def leave_out(self, row: int, verdict: Verdict, reason: str) -> None:
        """The image goes."""
        label = self.made[row].label
        if self.made[row].verdict == "keep" and self.left[label] > LEAST:
            self.left[label] -= 1
            self.made[row] = Decision(verdict, label, reason)

    def relabel(self, row: int, new: int, reason: str) -> None:
        """The image changes its class."""
        old = self.made[row].label
        if self.made[row].verdict == "keep" and self.left[old] > LEAST:
            self.left[[old, new]] += -1, 1
            self.made[row] = Decision("relabel", new, reason)


def decide(j: Judged, twins: Twins, stages: Sequence[Stage], source: Source) -> dict[int, Decision]:
    """Row -> decision, by the stages chosen."""
    verdicts = Verdicts(j, len(source.classes))
    if "clean" in stages:
        clean(verdicts, j, twins, source)
    if "value" in stages:
        for i in droppable(j):
            verdicts.leave_out(int(j.rows[i]), "drop", f"its label is wrong with probability {j.wrong[i]:.2f}")
    return verdicts.made


def clean(verdicts: Verdicts, j: Judged, twins: Twins, source: Source) -> None:
    """Duplicates, outsiders, other labels."""
    place = {int(row): i for i, row in enumerate(j.rows)}
    for row, name in twins.leaks.items():
        if row in place:
            verdicts.leave_out(row, "duplicate", f"validation has it too: {name}")
    for row, kept in surplus(twins, j, place).items():
        verdicts.leave_out(row, "duplicate", f"the same picture as {source.names[kept]}")
    for i in np.flatnonzero(j.odd | j.blank):
        verdicts.leave_out(int(j.rows[i]), "outlier", "blank" if j.blank[i] else "unlike all other images")
    for i in np.argsort(-j.confidence, kind="stable"):
        if j.confidence[i] >= RELABEL and j.agree[i]:
            name = source.classes[j.proposed[i]]
            verdicts.relabel(int(j.rows[i]), int(j.proposed[i]), f"{name} with probability {j.confidence[i]:.2f}; networks agree")


def surplus(twins: Twins, j: Judged, place: Mapping[int, int]) -> dict[int, int]:
    """Row -> the row that is kept in its stead, of the same pictures under one label."""
    found = {}
    for group in twins.groups:
        here = [row for row in group if row in place]
        for label in {int(j.labels[place[row]]) for row in here}:
            same = [row for row in here if j.labels[place[row]] == label]
            kept = min(same, key=lambda row: (j.wrong[place[row]], row))
            found |= {row: kept for row in same if row != kept}
    return found


def droppable(j: Judged) -> list[int]:
    """Indices of probably wrong labels, the surest first; of a class at most as many as are wrong in it."""
    bad = (j.wrong >= DROP) & (j.hidden >= DROP)
    chosen: list[int] = []
    for c in np.unique(j.labels):
        mine = np.flatnonzero(j.labels == c)
        order = mine[np.argsort(-j.wrong[mine], kind="stable")]
        chosen += [int(i) for i in order[: round(float(j.wrong[mine].sum()))] if bad[i]]
    return sorted(chosen, key=lambda i: -j.wrong[i])


def trusted(j: Judged, decisions: Mapping[int, Decision]) -> Bool[np.ndarray, "m"]:
    """Images to copy and to learn from: kept with a label that seems right, or put right."""
    verdicts = np.array([decisions[int(row)].verdict for row in j.rows])
    return (verdicts == "relabel") | ((verdicts == "keep") & (j.wrong < TRUSTED) & ~j.odd & ~j.blank)


def findings(j: Judged, decisions: Mapping[int, Decision], twins: Twins, source: Source) -> list[Finding]:
    """Every image, the most suspicious first: same pictures under different labels, then what changes, then by score."""
    torn = {row for group in twins.groups if len({int(source.labels[r]) for r in group}) > 1 for row in group}
    found = []
    for i, row in enumerate(j.rows.tolist()):
        decision = decisions[row]
        scores = {name: float(value[i]) for name, value in j.scores.items()}
        proposed = source.classes[decision.label if decision.verdict == "relabel" else j.proposed[i]]
        asks = decision.verdict == "relabel" or j.wrong[i] >= SHOWN
        reason = decision.reason or ("the same picture is there under another label" if row in torn else "")
        rank = (row not in torn, decision.verdict == "keep", 1 - float(j.wrong[i]), row)
        label = source.classes[source.labels[row]]
        found.append((rank, Finding(source.names[row], decision.verdict, label, proposed if asks else "", reason, scores)))
    return [finding for _, finding in sorted(found, key=lambda pair: pair[0])]
