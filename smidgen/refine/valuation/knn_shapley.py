"""KNN-Shapley: what every image adds to a vote of nearest neighbours, exactly, without a training.

    Jia et al., Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms, VLDB 2019, arXiv 1908.08619
    Wang and Jia, A Note on "Efficient Task-Specific ...", 2023, arXiv 2304.04258 (soft labels)

The value of i is the Shapley value of the game U, averaged over validation points:

    hard   U(S) = matches among the min(K, |S|) nearest of S, divided by K
    soft   the same divided by min(K, |S|); U(empty) = 1/C, a guess among C classes

Sort the n training points by distance, 1 the nearest; m_i = 1 if point i has the validation point's label. Then

    hard   s_n = m_n / max(n, K),   s_i = s_{i+1} + (m_i - m_{i+1}) / max(i, K)

The papers print min(K, i) / (K i) for 1 / max(i, K), and 1/n in the first line, which is right for K <= n only. Sum_i s_i = U(all).

Worked by hand: three points, labels match 1, 0, 1 in order of distance, K = 1: s_3 = 1/3, s_2 = 1/3 - 1/2 = -1/6, s_1 = -1/6 + 1 = 5/6;
their sum is 1, since the nearest matches.

Without a validation set every training point is judged by the others: it takes the validation point's place and leaves its own list. A sort
per validation point is all the work, some of them at a time: n x n is never built.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smidgen.errors import UserError
from smidgen.refine.evidence import Evidence, Need, Scores, ranked

ENTRIES = 2**22  # distances held at once


@dataclass(frozen=True)
class KNNShapley:
    """Exact, O(n log n) per validation point."""

    k: int = 10
    form: Literal["hard", "soft"] = "hard"
    metric: Literal["cosine", "euclidean"] = "cosine"
    judges: int = 5000
    "Without a validation set: at most this many training images take its place, drawn by the seed."
    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, evidence: Evidence) -> Scores:
        """Mean Shapley value over validation points, (n,)."""
        if self.k < 1:
            raise UserError(f"a vote needs at least one neighbour, got {self.k}")
        n = len(evidence.y)
        if evidence.validation is not None:
            value = self.values(evidence.x, evidence.y, *evidence.validation, evidence.classes)
            return Scores(value, ranked(value))
        generator = torch.Generator().manual_seed(evidence.seed)
        judges = torch.randperm(n, generator=generator)[: self.judges].to(evidence.y.device)
        value = self.values(evidence.x, evidence.y, evidence.x[judges], evidence.y[judges], evidence.classes, judges)
        return Scores(value, ranked(value))

    def values(
        self,
        x: Float[Tensor, "n d"],
        y: Int[Tensor, "n"],
        x_val: Float[Tensor, "v d"],
        y_val: Int[Tensor, "v"],
        classes: int,
        own: Int[Tensor, "v"] | None = None,
    ) -> Float[Tensor, "n"]:
        """The same of arrays; `own` are the places in x of validation points that are training points, too."""
        if self.metric == "cosine":
            x, x_val = F.normalize(x, dim=1), F.normalize(x_val, dim=1)
        lengths = x.square().sum(1)
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        judged = total.new_full((), len(x_val)).expand(len(x)).clone()
        for rows in torch.arange(len(x_val), device=x.device).split(max(1, ENTRIES // len(x))):
            distances = torch.addmm(lengths, x_val[rows], x.mT, alpha=-2)  # squared, less the constant |x_val|^2
            if own is not None:
                distances.scatter_(1, own[rows, None], torch.inf)
            order = distances.argsort(dim=1, stable=True)
            order = order if own is None else order[:, :-1]  # its own place is the last
            s = self.game_values(y[order] == y_val[rows, None], classes)
            total.index_add_(0, order.flatten(), s.flatten())
        if own is not None:
            judged[own] -= 1
        return (total / judged.clamp(min=1)).to(x.dtype)

    def game_values(self, matches: Bool[Tensor, "v n"], classes: int) -> Float[Tensor, "v n"]:
        """Shapley values s of the points in order of distance, for every validation point."""
        m = matches.double()
        n = m.shape[1]
        i = torch.arange(1, n + 1, dtype=m.dtype, device=m.device)
        if self.form == "hard":
            last, factors = m[:, -1] / max(n, self.k), 1 / i[:-1].clamp(min=self.k)
        else:
            k = min(self.k, n)
            harmonic = float((1 / i[:k]).sum())
            last = (m[:, -1] - m[:, :-1].sum(1) / max(1, n - 1)) / n * (harmonic - 1) + (m[:, -1] - 1 / classes) / n
            factors = (harmonic + (i[:-1].clamp(max=k) * (n - 1) / i[:-1] - k) / k) / max(1, n - 1)
        steps = torch.cat([(m[:, :-1] - m[:, 1:]) * factors, last[:, None]], 1)
        return steps.flip(1).cumsum(1).flip(1)
