"""Images unlike all others, whatever their label: pictures of something else.

The value is minus the mean cosine distance d to the k nearest others; the score exp(-d / median d). Distances of a clean set are about
log-normal, so an outsider is one whose log d lies further above the median than any of n normal numbers would be expected to: a cut that
knows how many images there are, and takes none out of most sets without outsiders. The deviation is read off the quartiles, which outsiders
leave alone.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smidgen.refine.evidence import Evidence, Need, Scores
from smidgen.refine.neighbours import nearest

EXPECTED = 0.01  # images of a clean set beyond the cut


@dataclass(frozen=True)
class Outliers:
    """Distance to neighbours."""

    k: int = 10
    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, evidence: Evidence) -> Scores:
        """Value and score as above."""
        d = self._distances(evidence)
        return Scores(-d, torch.exp(-d / d.median().clamp(min=torch.finfo(d.dtype).tiny)))

    def flagged(self, evidence: Evidence) -> Bool[Tensor, "n"]:
        """The outsiders."""
        logs = self._distances(evidence).double().clamp(min=1e-9).log()
        low, middle, high = torch.quantile(logs, logs.new_tensor([0.25, 0.5, 0.75]))
        deviation = max(float(high - low) / 1.349, 1e-9)  # quartiles of the normal distribution lie 1.349 deviations apart
        beyond = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * EXPECTED / len(logs), dtype=torch.float64)))
        return logs > middle + beyond * deviation

    def _distances(self, evidence: Evidence) -> Float[Tensor, "n"]:
        similarities, _ = nearest(evidence.x - evidence.x.mean(0), self.k, evidence.groups)
        return 1 - similarities.clamp(min=-1, max=1).mean(1)
