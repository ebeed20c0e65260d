"""Nearest neighbours among embeddings, in blocks: n x n is never held."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

ENTRIES = 2**24  # similarities held at once


def nearest(x: Float[Tensor, "n d"], k: int, groups: Int[Tensor, "n"] | None = None) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Cosine similarities and places of the k nearest others, the nearest first; with groups none of the image's own group.

    Fewer than k columns where there are fewer others; places of own-group images that had to be taken have similarity -inf.
    """
    x = F.normalize(x, dim=1)
    n, k = len(x), min(k, len(x) - 1)
    similarities, places = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=x.device)
    for rows in torch.arange(n, device=x.device).split(max(1, ENTRIES // n)):
        s = x[rows] @ x.mT
        if groups is not None:
            s.masked_fill_(groups[rows, None] == groups, -torch.inf)
        s.scatter_(1, rows[:, None], -torch.inf)
        similarities[rows], places[rows] = s.topk(k)
    return similarities, places
