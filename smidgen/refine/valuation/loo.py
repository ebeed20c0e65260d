"""Leave-one-out: what is lost when one image is taken away.

    phi_i = U(all) - U(all but i)

The oldest value (Cook, Detection of Influential Observation in Linear Regression, Technometrics 1977) and the weakest here: a single image
seldom changes an accuracy, and beyond a few hundred images nearly every value is 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.refine.evidence import Evidence, Need, Scores, ranked
from smidgen.refine.spread import spread
from smidgen.refine.valuation.games import HeadGame, Utility

BLOCK = 64  # trainings asked for at once


@dataclass(frozen=True)
class LeaveOneOut:
    """Retrains once per image."""

    processes: int = 1
    needs: ClassVar[tuple[Need, ...]] = ("validation",)

    def __call__(self, evidence: Evidence) -> Scores:
        """phi, (n,); of accuracies on the validation set."""
        value = self.values(HeadGame(evidence), len(evidence.y), evidence.y.device)
        return Scores(value, ranked(value))

    def values(self, utility: Utility, n: int, device: torch.device | str = "cpu") -> Float[Tensor, "n"]:
        """phi of any game; `utility` is sent to other processes, if there are."""
        full = utility(torch.ones(1, n, dtype=torch.bool, device=device))
        starts = range(0, n, BLOCK)
        return full - torch.cat(spread(_Without(utility, n, device), starts, self.processes))


@dataclass(frozen=True)
class _Without:
    """Utilities without one image, for some images."""

    utility: Utility
    n: int
    device: torch.device | str

    def __call__(self, start: int) -> Float[Tensor, "m"]:
        images = torch.arange(self.n, device=self.device)
        return self.utility(images != images[start : start + BLOCK, None])
