"""EL2N: how far from its label an image is early in training.

    Paul et al., Deep Learning on a Data Diet: Finding Important Examples Early in Training, NeurIPS 2021, arXiv 2107.07075

    EL2N_i = E || p_i - onehot(y_i) ||_2          p: softmax output after a few epochs; the mean over several trainings

In [0, sqrt 2]. The largest are hard, rare or wrong. The paper drops the smallest, when data are plentiful; with scarce data the easy images
are those to keep, so here a large distance is a low value.
"""

from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.refine.dynamics import epochs
from smidgen.refine.evidence import Evidence, Need, Scores


@dataclass(frozen=True)
class EL2N:
    """Of the training that was watched, or of linear heads'."""

    epoch: int = 10
    trainings: int = 5
    "Of linear heads; a watched training is one."
    needs: ClassVar[tuple[Need, ...]] = ("dynamics",)

    def __call__(self, evidence: Evidence) -> Scores:
        """Minus EL2N; the score is 1 - EL2N / sqrt 2."""
        if self.epoch < 1 or self.trainings < 1:
            raise UserError(f"EL2N needs an epoch and a number of trainings from 1 on, got {self.epoch} and {self.trainings}")
        if evidence.dynamics is None:
            labels = evidence.y.repeat(self.trainings, 1)
            runs = epochs(evidence.components, labels, evidence.classes, self.epoch, evidence.seed)
            logits = next(islice(runs, self.epoch - 1, None))
        else:
            if len(evidence.dynamics) < self.epoch:
                raise UserError(f"EL2N looks at epoch {self.epoch}, but only {len(evidence.dynamics)} were recorded; choose an earlier one")
            logits = evidence.dynamics[self.epoch - 1][None]
        distance = error_norm(logits.softmax(-1), evidence.y).mean(0)
        return Scores(-distance, 1 - distance / 2**0.5)


def error_norm(p: Float[Tensor, "*shape classes"], y: Tensor) -> Float[Tensor, "*shape"]:
    """|| p - onehot(y) ||_2."""
    return torch.linalg.vector_norm(p - F.one_hot(y, p.shape[-1]).to(p.dtype), dim=-1)
