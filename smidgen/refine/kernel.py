"""A Gaussian kernel machine on embeddings, and what it says of every image when trained without it: in closed form.

    Rifkin and Lippert, Notes on Regularized Least-Squares, MIT 2007        Williams and Seeger, Using the Nystroem Method, NIPS 2000

    minimise over W:   ||Phi W - T||^2 + ridge ||W||^2          Phi Phi' ~ K,  K_ij = exp(-||x_i - x_j||^2 / median)

T: one-hot or soft targets. With Phi = P after turning Phi'Phi to its eigenvalues e, H = P diag(1 / (e + ridge)) P' and f = H T, the machine
trained without image i says of it

    f_i' = (f_i - H_ii t_i) / (1 - H_ii),      of duplicates G together   (I - H_GG)^-1 (f_G - H_GG T_G)

Probabilities are softmax(scale f'); ridge and scale are those with the least cross-entropy. One eigendecomposition serves all targets and
all ridges, where folds train anew. n x n is never built: `LANDMARKS` images span the rest. Rows of x are brought to length 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smidgen.errors import UserError

LANDMARKS = 1500
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # tried
SCALES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # tried
JITTERS = (1e-6, 1e-5, 1e-4, 1e-3)  # on the landmarks' kernel, which duplicates make singular; the least that does


@dataclass(frozen=True)
class Fit:
    """How the machine is used for some labels."""

    ridge: float
    scale: float


class KernelMachine:
    """Of some embeddings; labels come later."""

    def __init__(self, x: Float[Tensor, "n k"], groups: Int[Tensor, "n"] | None = None, seed: int = 0) -> None:
        x = F.normalize(x.float(), dim=1)
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:LANDMARKS].sort().values.to(x.device)
        squared = torch.cdist(x, x[chosen]).square_()
        kernel = torch.exp(-squared / squared[chosen].median().clamp(min=1e-6))
        phi = torch.linalg.solve_triangular(_factor(kernel[chosen].double()).to(x.dtype), kernel.mT, upper=False)  # (m, n)
        values, vectors = torch.linalg.eigh(phi @ phi.mT)
        self.values = values.clamp(min=0)
        self.p = phi.mT @ vectors
        self.groups = [] if groups is None else _shared(groups)

    def without(self, targets: Float[Tensor, "n classes"], ridge: float) -> Float[Tensor, "n classes"]:
        """f': what is said of every image by the machine trained without it and its duplicates."""
        p, inverse = self.p, 1 / (self.values + ridge)
        f = p @ ((p.mT @ targets) * inverse[:, None])
        h = (p.square() @ inverse)[:, None]
        said = (f - h * targets) / (1 - h).clamp(min=1e-6)
        for group in self.groups:
            block = (p[group] * inverse) @ p[group].mT
            left = torch.eye(len(group), dtype=p.dtype, device=p.device) - block
            said[group] = torch.linalg.solve(left, f[group] - block @ targets[group])
        return said

    def best(self, targets: Float[Tensor, "n classes"]) -> Fit:
        """The ridge and scale with the least cross-entropy between targets and what is said of images left out."""
        losses = {}
        for ridge in RIDGES:
            said = self.without(targets, ridge)
            losses |= {Fit(ridge, s): float(-(targets * (s * said).log_softmax(1)).sum(1).mean()) for s in SCALES}
        return min(losses, key=lambda fit: losses[fit])

    def probabilities(self, targets: Float[Tensor, "n classes"], fit: Fit) -> Float[Tensor, "n classes"]:
        """Of every image, by the machine trained without it."""
        return (fit.scale * self.without(targets, fit.ridge)).softmax(1)


def _factor(corner: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
    """Cholesky's; distances were rounded, so that of images almost alike the kernel is not quite positive."""
    for jitter in JITTERS:
        lower, failed = torch.linalg.cholesky_ex(corner + jitter * torch.eye(len(corner), dtype=corner.dtype, device=corner.device))
        if not bool(failed):
            return lower
    raise UserError("the features of many images are almost the same, so that they say nothing; choose another --embed")


def _shared(groups: Int[Tensor, "n"]) -> list[Int[Tensor, "_"]]:
    """Places of every group of two or more."""
    order = groups.argsort(stable=True)
    counts = groups.unique(return_counts=True)[1]
    return [part for part in order.split(counts.tolist()) if len(part) > 1]
