"""Data Banzhaf: what an image adds to a coin-flipped subset of the others.

    Wang and Jia, Data Banzhaf: A Robust Data Valuation Framework for Machine Learning, AISTATS 2023, arXiv 2205.15466

    phi_i = mean over all S without i of U(S + i) - U(S)

by maximum sample reuse: draw every image with probability 1/2 and measure U, m times; phi_i is the mean U with i less the mean U without
it. All m measurements serve all n images; the error is about sqrt(ln(n) / m). Of all semivalues its ranking bears the most noise in U. The
values do not sum to U(all).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.refine.evidence import Evidence, Need, Scores, ranked
from smidgen.refine.spread import spread
from smidgen.refine.valuation.games import HeadGame, Utility

BLOCK = 64  # subsets asked for at once


@dataclass(frozen=True)
class Banzhaf:
    """Retrains `subsets` times, whatever the number of images."""

    subsets: int = 2000
    processes: int = 1
    needs: ClassVar[tuple[Need, ...]] = ("validation",)

    def __call__(self, evidence: Evidence) -> Scores:
        """phi, (n,); of accuracies on the validation set."""
        value = self.values(HeadGame(evidence), len(evidence.y), evidence.seed, evidence.y.device)
        return Scores(value, ranked(value))

    def values(self, utility: Utility, n: int, seed: int = 0, device: torch.device | str = "cpu") -> Float[Tensor, "n"]:
        """phi of any game; `utility` is sent to other processes, if there are."""
        if self.subsets < 2:
            raise UserError(f"Banzhaf values compare subsets and need at least 2, got {self.subsets}")
        generator = torch.Generator().manual_seed(seed)
        masks = torch.rand(self.subsets, n, generator=generator).to(device) < 0.5
        parts = masks.split(BLOCK)
        return reused(masks, torch.cat(spread(_Part(utility, parts), range(len(parts)), self.processes)))


@dataclass(frozen=True)
class _Part:
    """Utilities of the t-th subsets."""

    utility: Utility
    parts: tuple[Tensor, ...]

    def __call__(self, t: int) -> Float[Tensor, "m"]:
        return self.utility(self.parts[t])


def reused(masks: Bool[Tensor, "m n"], utilities: Float[Tensor, "m"]) -> Float[Tensor, "n"]:
    """Mean utility of the subsets with an image less that of those without it; 0 where one kind is missing."""
    inside = masks.to(utilities.dtype)
    outside = 1 - inside
    count, other = inside.sum(0), outside.sum(0)
    value = utilities @ inside / count.clamp(min=1) - utilities @ outside / other.clamp(min=1)
    return torch.where((count > 0) & (other > 0), value, 0.0)
