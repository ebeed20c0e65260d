"""Losses over score lists: rows are queries, columns are all features, entries are cosines.

    InfoNCE        L = -1/n sum_i 1/|P_i| sum_{p in P_i} log( e^{s_ip/t} / sum_{j in J_i} e^{s_ij/t} )
                   P_i: features that answer query i ("out" form of SupCon, arXiv 2004.11362); J_i: all features but the masked ones.
                   With every feature in the row the softmax is exact; nothing is sampled
    list KL        KL( softmax(T/t) || softmax(S/t) ), mean over rows: order and margins of T, whatever their common level
    alignment      1 - u.v, mean: the direction of a vector itself (arXiv 2306.11550)

>>> float(info_nce(torch.zeros(1, 4), torch.tensor([[True, False, False, False]]), 0.05))  # all equal: ln 4
1.3862943649291992
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def info_nce(
    scores: Float[Tensor, "n features"],
    positive: Bool[Tensor, "n features"],
    temperature: float,
    masked: Bool[Tensor, "n features"] | None = None,
) -> Float[Tensor, ""]:
    """Every row needs a positive; `masked` entries, which may answer the query without being labelled, count on neither side."""
    logits = scores / temperature
    if masked is not None:
        logits = logits.masked_fill(masked & ~positive, -torch.inf)
    likelihood = torch.log_softmax(logits, -1)
    return -(torch.where(positive, likelihood, 0.0).sum(-1) / positive.sum(-1)).mean()


def list_kl(student: Float[Tensor, "n features"], teacher: Float[Tensor, "n features"], temperature: float) -> Float[Tensor, ""]:
    """Gradient of a row with respect to the student's scores: (p_S - p_T) / (t n). None flows to the teacher."""
    target = torch.log_softmax(teacher.detach() / temperature, -1)
    return (target.exp() * (target - torch.log_softmax(student / temperature, -1))).sum(-1).mean()


def alignment(student: Float[Tensor, "n width"], teacher: Float[Tensor, "n width"]) -> Float[Tensor, ""]:
    """Of vectors of length 1; 0 where they are the same, and half their squared distance."""
    return 1 - (student * teacher.detach()).sum(-1).mean()
