"""Influence functions: what the loss would become without an image, from one trained model.

    Koh and Liang, Understanding Black-box Predictions via Influence Functions, ICML 2017, arXiv 1703.04730

    I(i, t) = - g_t' H^-1 g_i          g: gradient of an image's loss, H: Hessian of the mean training loss with its decay

Removing image i raises the loss of t by -I(i, t) / n, to first order. For a linear softmax head on features h, with p its probabilities: g
= h (p - onehot(y))', H = mean of hh' x (diag p - pp') + decay; small enough to solve exactly. The value is the mean over validation images
of -I / n, what losing i would cost; without a validation set minus an image's influence on itself, -g_i' H^-1 g_i, which is large where
only the image itself speaks for its label.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smidgen.refine.evidence import Evidence, Need, Scores, ranked
from smidgen.refine.heads import Compression, Heads, penalties

PARAMETERS = 4096  # of the head, at most: its Hessian is solved exactly
STEPS = 300  # to the minimum, which influence functions assume


@dataclass(frozen=True)
class Influence:
    """Exact, on a linear head; `width` components of the features, fewer where there are many classes."""

    width: int = 64
    decay: float | None = None
    "Of the head; none: the one with the least out-of-fold loss."
    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, evidence: Evidence) -> Scores:
        """Rise of the mean validation loss if the image were removed; without a validation set minus self-influence."""
        width = max(1, min(self.width, PARAMETERS // evidence.classes - 1))
        compression = Compression(evidence.x, width)
        x = compression(evidence.x)
        targets = evidence.targets
        decay = evidence.decay if self.decay is None else self.decay
        w = Heads(x, x.new_ones(len(x), 1), decay).fit(targets, STEPS).w
        assert w is not None
        w = w[0]
        factor = torch.linalg.cholesky(hessian(x, w, decay))
        if evidence.validation is None:
            value = -self_influence(x, targets, w, factor)
        else:
            x_val, y_val = evidence.validation
            wanted = F.one_hot(y_val, evidence.classes).to(x.dtype)
            value = removal(x, targets, w, factor, compression(x_val), wanted)
        return Scores(value.to(evidence.x.dtype), ranked(value))


def hessian(x: Float[Tensor, "n k"], w: Float[Tensor, "k classes"], decay: float) -> Float[Tensor, "params params"]:
    """Of the mean loss, float64; parameters in the order of w.flatten()."""
    x, w = x.double(), w.double()
    p = (x @ w).softmax(1)
    k, classes = w.shape
    blocks = x.new_empty(k, classes, k, classes)
    for a in range(classes):
        for b in range(a, classes):
            curvature = p[:, a] * (float(a == b) - p[:, b])
            blocks[:, a, :, b] = blocks[:, b, :, a] = (x * curvature[:, None]).mT @ x / len(x)
    return blocks.view(k * classes, -1) + torch.diag(penalties(x, decay).repeat_interleave(classes))


def removal(
    x: Float[Tensor, "n k"],
    targets: Float[Tensor, "n classes"],
    w: Float[Tensor, "k classes"],
    factor: Float[Tensor, "params params"],
    x_val: Float[Tensor, "v k"],
    wanted: Float[Tensor, "v classes"],
) -> Float[Tensor, "n"]:
    """g_val' H^-1 g_i / n for the mean validation gradient: one solve for all images."""
    errors = (x_val @ w).softmax(1) - wanted
    towards = (x_val.mT @ errors / len(x_val)).double().view(-1, 1)
    direction = torch.cholesky_solve(towards, factor).view(w.shape)
    return ((x.double() @ direction) * ((x @ w).softmax(1) - targets)).sum(1) / len(x)


def self_influence(
    x: Float[Tensor, "n k"], targets: Float[Tensor, "n classes"], w: Float[Tensor, "k classes"], factor: Float[Tensor, "params params"]
) -> Float[Tensor, "n"]:
    """g_i' H^-1 g_i, not negative."""
    parts = []
    for rows in torch.arange(len(x), device=x.device).split(512):
        errors = ((x[rows] @ w).softmax(1) - targets[rows]).double()
        gradients = (x[rows].double()[:, :, None] * errors[:, None]).flatten(1)  # (rows, params)
        parts.append(torch.linalg.solve_triangular(factor, gradients.mT, upper=False).square().sum(0))
    return torch.cat(parts)
