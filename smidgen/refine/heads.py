"""Linear softmax heads on frozen features, hundreds at once.

    minimise over W:   sum_i w_i CE(t_i, softmax(W' x_i)) / sum_i w_i  +  decay / 2 ||W||^2

A subset of the data, a bootstrap, the training side of a fold: each is a column w of row weights, and all columns are trained together,
so that every step is two large matrix products however many heads there are. This is what makes bagging and retraining affordable on two
cores.

Steps are Boehning's (1992), accelerated (Nesterov, restarted as O'Donoghue and Candes 2015): the Hessian of a head is at most
A = 1/2 sum_i w_i x_i x_i' / sum_i w_i + decay, whatever W is. So A is factored once, no step size has to be chosen, and no step overshoots.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

WIDTH = 256  # components kept of the features
DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # tried; of features with mean squared length 1
STEPS = 25
FLOOR = 1e-6  # decay of everything, so that separable data have a minimum
ENTRIES = 2**25  # logits held at once


class Compression:
    """Principal components, min(width, d, n - 1) of them, scaled to mean squared length 1; and a constant 1."""

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
        """Of these images, or of others."""
        return F.pad((x.float() - self.mean) @ self.directions, (0, 1), value=1.0)


class Heads:
    """Some heads, a column of row weights each; `x` as a Compression makes it. Training goes on from where it stopped.

    A column of zeros gives W = 0, which knows nothing.
    """

    def __init__(self, x: Float[Tensor, "n k"], weights: Float[Tensor, "n heads"], decay: float | Float[Tensor, "heads"]) -> None:
        self.x = x
        self.share = weights / weights.sum(0).clamp(min=1e-12)
        self.penalty = penalties(x, decay).expand(weights.shape[1], -1)
        bound = torch.stack([(x * column[:, None]).mT @ x for column in self.share.mT]) / 2 + torch.diag_embed(self.penalty)
        self.factor = torch.linalg.cholesky(bound)
        self.w: Float[Tensor, "heads k classes"] | None = None

    def fit(self, targets: Float[Tensor, "n classes"], steps: int = STEPS) -> "Heads":
        """Steps towards the minimisers; targets are rows of probabilities."""
        x, (heads, k), classes = self.x, self.penalty.shape, targets.shape[1]
        w = previous = x.new_zeros(heads, k, classes) if self.w is None else self.w
        momentum = x.new_ones(heads)
        for _ in range(steps):
            grown = (1 + (1 + 4 * momentum**2).sqrt()) / 2
            ahead = w + ((momentum - 1) / grown)[:, None, None] * (w - previous)
            errors = _probabilities(x, ahead).sub_(targets[:, None]).mul_(self.share[..., None])
            gradient = (x.mT @ errors.flatten(1)).view(k, heads, classes).transpose(0, 1) + self.penalty[..., None] * ahead
            previous, w = w, ahead - torch.cholesky_solve(gradient, self.factor)
            uphill = (gradient * (w - previous)).sum((1, 2)) > 0
            momentum = torch.where(uphill, 1.0, grown)
        self.w = w
        return self

    def probabilities(self, queries: Float[Tensor, "m k"]) -> Float[Tensor, "m heads classes"]:
        """Of images that the heads may or may not have seen."""
        assert self.w is not None
        return _probabilities(queries, self.w)


def penalties(x: Float[Tensor, "n k"], decay: float | Float[Tensor, "heads"]) -> Float[Tensor, "*heads k"]:
    """What every row of W is decayed by: the constant's hardly."""
    rows = x.new_ones(x.shape[1])
    rows[-1] = 0
    return torch.as_tensor(decay, dtype=x.dtype, device=x.device)[..., None] * rows + FLOOR


def _probabilities(x: Tensor, w: Float[Tensor, "heads k classes"]) -> Float[Tensor, "n heads classes"]:
    heads, k, classes = w.shape
    return (x @ w.transpose(0, 1).reshape(k, heads * classes)).view(-1, heads, classes).softmax(-1)


def in_parts(
    x: Float[Tensor, "n k"], weights: Float[Tensor, "n heads"], decay: float | Float[Tensor, "heads"], classes: int
) -> Iterator[tuple[slice, Heads]]:
    """All heads, so many at a time as memory allows: (which, they)."""
    heads = weights.shape[1]
    decays = torch.as_tensor(decay, dtype=x.dtype, device=x.device).expand(heads)
    size = max(1, ENTRIES // (len(x) * classes))
    for start in range(0, heads, size):
        part = slice(start, min(start + size, heads))
        yield part, Heads(x, weights[:, part], decays[part])


def predictions(
    x: Float[Tensor, "n k"],
    targets: Float[Tensor, "n classes"],
    weights: Float[Tensor, "n heads"],
    decay: float | Float[Tensor, "heads"],
    steps: int = STEPS,
    queries: Float[Tensor, "m k"] | None = None,
) -> Iterator[tuple[slice, Float[Tensor, "m part classes"]]]:
    """Probabilities of all images, or of `queries`, by every head, some heads at a time: (which heads, probabilities)."""
    for part, heads in in_parts(x, weights, decay, targets.shape[1]):
        yield part, heads.fit(targets, steps).probabilities(x if queries is None else queries)


# --- folds -----------------------------------------------------------------------------------------------------------


def best_decay(x: Float[Tensor, "n k"], targets: Float[Tensor, "n classes"], inside: Bool[Tensor, "n heads"]) -> float:
    """The decay with the least cross-entropy of what a head did not train on."""
    weights = inside.to(x.dtype).repeat_interleave(len(DECAYS), 1)  # head by head, every decay
    losses = x.new_zeros(weights.shape[1])
    for part, p in predictions(x, targets, weights, x.new_tensor(DECAYS).repeat(inside.shape[1])):
        entropy = -(targets[:, None] * p.clamp_(min=1e-12).log_()).sum(-1)
        losses[part] = (entropy * (weights[:, part] == 0)).sum(0)
    return DECAYS[int(losses.view(-1, len(DECAYS)).sum(0).argmin())]


def folds(
    y: Int[Tensor, "n"], count: int = 5, repeats: int = 1, seed: int = 0, groups: Int[Tensor, "n"] | None = None
) -> Bool[Tensor, "n heads"]:
    """A column per fold and repeat, marking what lies outside the fold: what its head trains on."""
    fold = torch.stack([assigned(y, count, seed * 1_000_003 + r, groups) for r in range(repeats)], 1)
    return (fold[..., None] != torch.arange(count, device=y.device)).flatten(1)


def assigned(y: Int[Tensor, "n"], count: int, seed: int = 0, groups: Int[Tensor, "n"] | None = None) -> Int[Tensor, "n"]:
    """A fold for every image: stratified by label; duplicates, which share a number in `groups`, share the fold of the first of them."""
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed % 2**31))
    fold = torch.empty(len(y), dtype=torch.int64)
    fold[shuffled[y.cpu()[shuffled].argsort(stable=True)]] = torch.arange(len(y)) % count
    if groups is not None:
        _, group = groups.cpu().unique(return_inverse=True)
        first = torch.full((int(group.max()) + 1,), len(y)).scatter_reduce(0, group, torch.arange(len(y)), "amin")
        fold = fold[first[group]]
    return fold.to(y.device)
