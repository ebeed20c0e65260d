"""Stages applied to images, and proved: what `smidgen refine` does between reading and writing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smidgen.refine.augment import Originals, augment
from smidgen.refine.cache import Cache
from smidgen.refine.classifier import Judge, Recipe, judge
from smidgen.refine.decide import Decision, Judged, Stage, decide, judged, score, trusted
from smidgen.refine.evidence import Evidence
from smidgen.refine.folder import Copy, untouched
from smidgen.refine.gate import Gain, compare, right
from smidgen.refine.material import Material
from smidgen.refine.safety import learn
from smidgen.run import Run

LITTLE = 0.01  # of the images: when fewer change in a round, it was the last


@dataclass(frozen=True)
class Result:
    """A set as stages left it."""

    decisions: Mapping[int, Decision] = field(repr=False)
    copies: Sequence[Copy] = field(default=(), repr=False)

    def kept(self) -> dict[int, int]:
        """Row -> class."""
        return {row: d.label for row, d in self.decisions.items() if d.verdict in ("keep", "relabel")}

    def images(self) -> list[Copy]:
        """Originals and new ones."""
        kept = self.kept()
        return [*untouched(list(kept), list(kept.values())), *self.copies]


@dataclass(frozen=True)
class Proof:
    """What each stage was worth, in order."""

    gains: Mapping[Stage, Gain | None]
    "None: the stage changed nothing."
    total: Gain
    "Of those that stay, together."

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that stay."""
        return tuple(stage for stage, gain in self.gains.items() if gain is not None and gain.helps)


def repeated(
    first: Mapping[int, Decision], once_more: Callable[[Mapping[int, int]], Mapping[int, Decision]], rounds: int
) -> dict[int, Decision]:
    """Decisions about what earlier ones left, until fewer than LITTLE of them change anything."""
    decisions = dict(first)
    new: Mapping[int, Decision] = first
    for _ in range(rounds - 1):
        if sum(d.verdict != "keep" for d in new.values()) < LITTLE * len(new):
            break
        new = once_more(Result(decisions).kept())
        decisions |= {row: d for row, d in new.items() if d.verdict != "keep"}
    return decisions


@dataclass(frozen=True)
class Stages:
    """The stages over one material."""

    material: Material
    recipe: Recipe
    budget: int
    seeds: int
    device: torch.device
    cache: Cache
    run: Run
    seed: int
    rounds: int = 1

    def judges(self) -> Judge:
        """Networks that know the part."""
        m = self.material
        x, y = m.x.to(self.device), m.source.images.labels.to(self.device)
        return judge(x, y, m.folds(self.seed), m.classes, self.recipe, self.run, self.cache, self.seed)

    def known(self, rows: Int[np.ndarray, "m"], judges: Judge, labels: Int[np.ndarray, "m"] | None = None) -> Judged:
        """Scores of some images, compared with each other; with other labels than those given, if there are any.

        Opinions over the embedding and those of the judges are pooled: a frozen network that never met such images and a small one that
        knows nothing else miss different things.
        """
        m, index = self.material, torch.from_numpy(rows)
        labels = m.source.labels[rows] if labels is None else labels
        p = judges.probabilities(m.x[index], rows.tolist())
        y, groups = torch.from_numpy(labels), m.groups[index]
        evidence = Evidence(m.features[index], y, m.classes, probabilities=p, groups=groups, seed=self.seed)
        return judged(rows, labels, score(evidence, m.source.images.pixels[index], self.cache), p)

    def apply(self, stages: Sequence[Stage], known: Judged, judges: Judge) -> Result:
        """What becomes of these images."""
        return self.extended(self.decided(stages, known, judges), stages, known, judges)

    def decided(self, stages: Sequence[Stage], known: Judged, judges: Judge) -> dict[int, Decision]:
        """Decisions; what is left is judged again, round after round, until little changes."""
        m = self.material

        def once_more(kept: Mapping[int, int]) -> dict[int, Decision]:
            rows, labels = (np.array(list(part), dtype=int) for part in (kept.keys(), kept.values()))
            return decide(self.known(rows, judges, labels), m.twins, stages, m.source)

        return repeated(decide(known, m.twins, stages, m.source), once_more, self.rounds)

    def extended(self, decisions: Mapping[int, Decision], stages: Sequence[Stage], known: Judged, judges: Judge) -> Result:
        """Decided images with new ones; the budget is for all images of the source, a part gets its share."""
        budget = round(self.budget * len(known.rows) / len(self.material.source))
        return Result(decisions, self.copies(decisions, known, judges, budget) if "augment" in stages else ())

    def copies(self, decisions: Mapping[int, Decision], known: Judged, judges: Judge, budget: int) -> list[Copy]:
        """New images."""
        m = self.material
        kept = np.array([decisions[row].verdict in ("keep", "relabel") for row in known.rows.tolist()])
        rows = known.rows[kept]
        labels = np.array([decisions[row].label for row in rows.tolist()], dtype=int)
        sure = trusted(known, decisions)[kept]
        originals = Originals(rows, labels, sure, known.guess[kept] != labels, m.features[torch.from_numpy(rows)])
        policy = learn(judges, m.view, originals.copies(sure), m.classes, self.run, self.seed)
        return augment(originals, policy, judges, m.view, budget, self.run, self.seed)

    def prove(self, stages: Sequence[Stage], known: Judged, judges: Judge) -> Proof:
        """Adds stage after stage and keeps those that help."""
        gains: dict[Stage, Gain | None] = {}
        raw = now = Result(decide(known, self.material.twins, (), self.material.source))
        first = best = self.right(raw, "proof, before")
        for stage in stages:
            accepted: list[Stage] = [s for s, gain in gains.items() if gain is not None and gain.helps]
            then = self.apply([*accepted, stage], known, judges)
            gains[stage] = None
            if then.kept() != now.kept() or then.copies:
                after = self.right(then, f"proof, {stage}")
                gains[stage] = gain = compare(best, after)
                now, best = (then, after) if gain.helps else (now, best)
            self.log(stage, gains[stage], now if gains[stage] is None else then)
        return Proof(gains, compare(first, best))

    def right(self, result: Result, label: str) -> Float[Tensor, "seeds v"]:
        """Who of the held-out images networks are right about that learnt the result."""
        m, images = self.material, result.images()
        x = m.view(images).to(self.device)
        y = torch.tensor([image.label for image in images], device=self.device)
        seeds = self.run.track(range(self.seed, self.seed + self.seeds), label, self.seeds)
        return right(x, y, m.held_x, m.held_y, m.classes, self.recipe, seeds, self.cache)

    def log(self, stage: Stage, gain: Gain | None, then: Result) -> None:
        """A row of the run."""
        row = {"stage": stage, "images": len(then.images()), "changed": gain is not None, "stays": gain is not None and gain.helps}
        if gain is not None:
            row |= {"before": gain.before, "after": gain.after, "gain": gain.gain, "interval": list(gain.interval)}
        self.run.log(**row)
