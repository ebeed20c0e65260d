"""Neighbour votes: do the images that look most like this one bear its label?

    after Zhu, Dong and Liu, Detecting Corrupted Labels Without Training a Model to Predict (SimiFeat), ICML 2022, arXiv 2110.06283

The share of the k nearest others (cosine) that have the given label, each weighted by exp((similarity - largest) / temperature); with the
image's own duplicates left out, which would vouch for each other. Another kind of mistake than a linear head's: classes in many clusters,
and images at the border of one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.refine.evidence import Evidence, Need, Scores
from smidgen.refine.neighbours import nearest


@dataclass(frozen=True)
class Votes:
    """Training-free; as good as the embedding."""

    k: int = 20
    temperature: float = 0.1
    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, evidence: Evidence) -> Scores:
        """The given label's share, its own score."""
        share = self.shares(evidence, F.one_hot(evidence.y, evidence.classes).to(evidence.x.dtype))
        own = share.gather(1, evidence.y[:, None])[:, 0]
        return Scores(own, own)

    def shares(self, evidence: Evidence, labels: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
        """Of all classes; `labels` may be soft."""
        if self.k < 1 or self.temperature <= 0:
            raise UserError(f"votes need a neighbour and a positive temperature, got {self.k} and {self.temperature}")
        centred = evidence.x - evidence.x.mean(0)  # features of a ReLU network all point the same way
        similarities, places = nearest(centred, self.k, evidence.groups)
        weights = torch.softmax(similarities.clamp(min=-2.0) / self.temperature, 1)
        return (weights[..., None] * labels[places]).sum(1).clamp(max=1)
