"""Data-OOB: how often models that did not see an image agree with its label.

    Kwon and Zou, Data-OOB: Out-of-bag Estimate as a Simple and Efficient Data Value, ICML 2023, arXiv 2304.07718

    psi_i = sum_b [i not in bag b] T(y_i, f_b(x_i)) / sum_b [i not in bag b]

Bags b = 1 .. B are n draws with replacement, f_b a model trained on bag b, T whether it is right. The mean of psi over images is the bags'
out-of-bag score. An image is outside a bag with probability (1 - 1/n)^n, about .368, so with B = 200 the standard error of psi_i is .058 at
most. No validation set, and one set of trainings serves all images; of linear heads on frozen features all are trained at once (heads.py).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from smidgen.errors import UserError
from smidgen.refine.evidence import Evidence, Need, Scores
from smidgen.refine.heads import predictions


@dataclass(frozen=True)
class DataOOB:
    """Bagged linear heads."""

    bags: int = 200
    credit: Literal["correct", "probability"] = "correct"
    "T: 1 where the head's class is the given one, or the probability it gives that class."
    steps: int = 20
    "Of a head's training."
    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, evidence: Evidence) -> Scores:
        """psi, in [0, 1] by itself; 0.5 for an image that was in every bag."""
        if self.bags < 1:
            raise UserError(f"out-of-bag values need at least one bag, got {self.bags}")
        x, y = evidence.components, evidence.y
        counts = drawn(len(y), self.bags, evidence.seed).to(x.device)
        credit, outside = x.new_zeros(len(y)), (counts == 0).sum(1)
        for part, p in predictions(x, evidence.targets, counts.to(x.dtype), evidence.decay, self.steps):
            right = (
                (p.argmax(-1) == y[:, None]).to(x.dtype)
                if self.credit == "correct"
                else p.gather(2, y[:, None, None].expand(-1, p.shape[1], 1))[..., 0]
            )
            credit += (right * (counts[:, part] == 0)).sum(1)
        value = torch.where(outside > 0, credit / outside.clamp(min=1), 0.5)
        return Scores(value, value)


def drawn(n: int, bags: int, seed: int) -> Int[Tensor, "n bags"]:
    """How often every image is in every bag."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(n, (n,), generator=generator).bincount(minlength=n) for _ in range(bags)], 1)
