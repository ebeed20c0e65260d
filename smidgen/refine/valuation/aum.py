"""AUM: the area under an image's margin while a model is trained on it.

    Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking, NeurIPS 2020, arXiv 2001.10528

    AUM_i = mean over epochs t of z_i,y_i(t) - max_{k != y_i} z_i,k(t)          z: logits

A wrongly labelled image is pulled to its label only by itself, and away from it by its class's others: its margin is small or negative.
How small is suspicious is learned: n / (C + 1) images are given a class C + 1 that does not exist, whose margins are those of wrong labels;
images below the 99th percentile of these are suspects. Two runs, with two sets of images, cover everybody.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smidgen.refine.dynamics import EPOCHS, dynamics_of, epochs, margins
from smidgen.refine.evidence import Evidence, Need, Scores, ranked


@dataclass(frozen=True)
class AUM:
    """Of the training that was watched, or of a linear head's."""

    percentile: float = 0.99
    "Of the false class's margins: where suspects end."
    needs: ClassVar[tuple[Need, ...]] = ("dynamics",)

    def __call__(self, evidence: Evidence) -> Scores:
        """AUM, in logits."""
        logits = dynamics_of(evidence)
        value = margins(logits, evidence.y.expand(len(logits), -1)).mean(0)
        return Scores(value, ranked(value))

    def suspects(self, evidence: Evidence) -> Bool[Tensor, "n"]:
        """Images below the threshold that a false class sets, by two trainings of linear heads."""
        x, y, n, false = evidence.components, evidence.y, len(evidence.y), evidence.classes
        order = torch.randperm(n, generator=torch.Generator().manual_seed(evidence.seed)).to(y.device)
        sets = order[: 2 * (n // (false + 1))].view(2, -1)
        labels = y.repeat(2, 1).scatter_(1, sets, false)
        areas = area_under_margin(x, labels, false + 1, evidence.seed)
        thresholds = areas.gather(1, sets).quantile(self.percentile, dim=1)
        is_false = labels == false
        return ((areas < thresholds[:, None]) & ~is_false).any(0)


def area_under_margin(
    x: Float[Tensor, "n k"], labels: Tensor, classes: int, seed: int = 0, count: int = EPOCHS
) -> Float[Tensor, "heads n"]:
    """AUM in each of several trainings with labels of its own."""
    total = x.new_zeros(labels.shape)
    for logits in epochs(x, labels, classes, count, seed):
        total += margins(logits, labels)
    return total / count
