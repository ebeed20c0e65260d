"""Linear softmax heads on frozen features, hundreds at once.

    minimise over W:   sum_i w_i CE(t_i, softmax(W' x_i)) / sum_i w_i  +  decay / 2 ||W||^2

A subset of the data, a bootstrap, the training side of a fold: each is a column w of row weights, and all columns are trained together, so
that every step is two large matrix products however many heads there are. This is what makes bagging and retraining affordable on two
cores.

Steps are Boehning's (1992), accelerated (Nesterov, restarted as O'Donoghue and Candes 2015): the Hessian of a head is at most A = 1/2 sum_i
w_i x_i x_i' / sum_i w_i + decay, whatever W is. So A is factored once, no step size has to be chosen, and a step never overshoots.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from smidgen.refine.evidence import Evidence

WIDTH = 256  # components kept of the features
DECAYS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # tried; of features with mean squared length 1
STEPS = 50
FLOOR = 1e-6  # decay of everything, so that separable data have a minimum
ENTRIES = 2**25  # logits held at once


@dataclass(frozen=True)
class Folds:
    """How to make out-of-fold probabilities."""

    count: int = 5
    repeats: int = 3
    "Of the division into folds; probabilities are averaged."
    seed: int = 0


def compressed(x: Float[Tensor, "n d"], width: int = WIDTH) -> Float[Tensor, "n k"]:
    """Principal components, k = min(width, d, n - 1) of them and a constant 1, scaled to mean squared length 1 (without the constant)."""
    return Compression(x, width)(x)


class Compression:
    """Principal components of some features, to apply to others, too."""

    def __init__(self, x: Float[Tensor, "n d"], width: int = WIDTH) -> None:
        x = x.float()
        self.mean = x.mean(0)
        centred = x - self.mean
        k = min(width, x.shape[1], max(1, len(x) - 1))
        if len(x) > x.shape[1]:
            directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -k:].flip(1)
        else:
            directions = torch.linalg.svd(centred, full_matrices=False).Vh[:k].mT
        length = (centred @ directions).square().sum(1).mean().sqrt()
        self.directions = directions / length.clamp(min=1e-12)

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Components, then the constant."""
        return F.pad((x.float() - self.mean) @ self.directions, (0, 1), value=1.0)


def train(
    x: Float[Tensor, "n k"],
    targets: Float[Tensor, "n classes"],
    weights: Float[Tensor, "n heads"],
    decay: float | Float[Tensor, "heads"],
    steps: int = STEPS,
) -> Float[Tensor, "heads k classes"]:
    """The minimisers W, one per column of weights; `x` as `compressed` makes it, `targets` rows of probabilities.

    A column of zeros gives W = 0, which knows nothing. The constant's row is not decayed.
    """
    heads, k, classes = weights.shape[1], x.shape[1], targets.shape[1]
    share = weights / weights.sum(0).clamp(min=1e-12)
    penalty = penalties(x, torch.as_tensor(decay, dtype=x.dtype, device=x.device).expand(heads))
    bound = torch.stack([(x * column[:, None]).mT @ x for column in share.mT]) / 2 + torch.diag_embed(penalty)
    factor = torch.linalg.cholesky(bound)
    w = previous = x.new_zeros(heads, k, classes)
    momentum = x.new_ones(heads)
    for _ in range(steps):
        grown = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        ahead = w + ((momentum - 1) / grown)[:, None, None] * (w - previous)
        errors = (_probabilities(x, ahead) - targets[:, None]) * share[..., None]
        gradient = (x.mT @ errors.flatten(1)).view(k, heads, classes).transpose(0, 1) + penalty[..., None] * ahead
        previous, w = w, ahead - torch.cholesky_solve(gradient, factor)
        uphill = (gradient * (w - previous)).sum((1, 2)) > 0
        momentum = torch.where(uphill, 1.0, grown)
    return w


def penalties(x: Float[Tensor, "n k"], decay: float | Float[Tensor, "heads"]) -> Float[Tensor, "*heads k"]:
    """What every row of W is decayed by: the constant's hardly."""
    rows = x.new_ones(x.shape[1])
    rows[-1] = 0
    return torch.as_tensor(decay, dtype=x.dtype, device=x.device)[..., None] * rows + FLOOR


def predictions(
    x: Float[Tensor, "n k"],
    targets: Float[Tensor, "n classes"],
    weights: Float[Tensor, "n heads"],
    decay: float | Float[Tensor, "heads"],
    steps: int = STEPS,
    queries: Float[Tensor, "m k"] | None = None,
) -> Iterator[tuple[slice, Float[Tensor, "m part classes"]]]:
    """Probabilities of all images, or of `queries`, by every head, some heads at a time: (which heads, probabilities)."""
    heads = weights.shape[1]
    decays = torch.as_tensor(decay, dtype=x.dtype, device=x.device).expand(heads)
    size = max(1, ENTRIES // (len(x) * targets.shape[1]))
    for start in range(0, heads, size):
        part = slice(start, min(start + size, heads))
        w = train(x, targets, weights[:, part], decays[part], steps)
        yield part, _probabilities(x if queries is None else queries, w)


def _probabilities(x: Tensor, w: Float[Tensor, "heads k classes"]) -> Float[Tensor, "n heads classes"]:
    heads, k, classes = w.shape
    return (x @ w.transpose(0, 1).reshape(k, heads * classes)).view(-1, heads, classes).softmax(-1)


# --- folds -----------------------------------------------------------------------------------------------------------


def out_of_fold(evidence: Evidence, folds: Folds = Folds()) -> Float[Tensor, "n classes"]:
    """Probabilities of every image by heads that saw neither it nor its duplicates (notes 4.1)."""
    x = compressed(evidence.x)
    targets = F.one_hot(evidence.y, evidence.classes).to(x.dtype)
    return fold_probabilities(x, targets, evidence, best_decay(x, targets, evidence, folds), folds)


def fold_probabilities(
    x: Float[Tensor, "n k"], targets: Float[Tensor, "n classes"], evidence: Evidence, decay: float, folds: Folds = Folds()
) -> Float[Tensor, "n classes"]:
    """The same for features already compressed and targets that may be soft."""
    numbers = torch.stack([assigned(evidence, folds.count, folds.seed + r) for r in range(folds.repeats)])  # (repeats, n)
    weights = torch.cat([(numbers[r] != f)[:, None] for r in range(folds.repeats) for f in range(folds.count)], 1)
    total = torch.zeros_like(targets)
    for part, p in predictions(x, targets, weights.to(x.dtype), decay):
        total += (p * ~weights[:, part, None]).sum(1)
    return total / folds.repeats


def best_decay(x: Float[Tensor, "n k"], targets: Float[Tensor, "n classes"], evidence: Evidence, folds: Folds = Folds()) -> float:
    """The decay with the least out-of-fold cross-entropy."""
    number = assigned(evidence, folds.count, folds.seed)
    outside = torch.stack([number != f for f in range(folds.count)], 1)
    weights = outside.repeat_interleave(len(DECAYS), 1)  # heads: fold by fold, every decay
    losses = x.new_zeros(folds.count * len(DECAYS))
    for part, p in predictions(x, targets, weights.to(x.dtype), x.new_tensor(DECAYS).repeat(folds.count)):
        entropy = -(targets[:, None] * p.clamp(min=1e-12).log()).sum(-1)
        losses[part] = (entropy * ~weights[:, part]).sum(0)
    return DECAYS[int(losses.view(folds.count, -1).sum(0).argmin())]


def assigned(evidence: Evidence, count: int, seed: int) -> Int[Tensor, "n"]:
    """A fold for every image: stratified by given label; duplicates share the fold of the first of them."""
    generator = torch.Generator().manual_seed((evidence.seed * 1_000_003 + seed) % 2**31)
    y = evidence.y.cpu()
    fold = torch.empty_like(y)
    start = 0
    for c in range(evidence.classes):
        members = (y == c).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        fold[members] = (torch.arange(len(members)) + start) % count
        start += len(members)
    if evidence.groups is not None:
        _, group = evidence.groups.cpu().unique(return_inverse=True)
        first = torch.full((int(group.max()) + 1,), len(y)).scatter_reduce(0, group, torch.arange(len(y)), "amin")
        fold = fold[first[group]]
    return fold.to(evidence.y.device)
