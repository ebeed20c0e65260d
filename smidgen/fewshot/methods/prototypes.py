"""Prototypical networks: a query belongs to the class whose mean it is nearest to.

    Snell, Swersky, Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017

    c_n = mean of f(x_i) over the support of class n         p(y = n | x) = softmax_n( -|f(x) - c_n|^2 )

Worked by hand: support features 0 and 2 of class 0, 5 of class 1; prototypes 1 and 5. A query at 2 has logits -1 and -9.

Over frozen features the backbone is `nn.Identity()` and episodes hold features (`Episode.with_features`). Also here is what all heads of
this kind need: embeddings of an episode, one-hot labels, and the loss and the choice of a hyper-parameter.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, accuracy
from smidgen.fewshot.methods import Method


class ProtoNet(nn.Module):
    """Nearest class mean of embeddings.

    A batch must hold at least one support image of each class; a class without any is never predicted.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """`backbone`: (images, *image) -> (images, *map)."""
        super().__init__()
        self.backbone = backbone

    def loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Cross-entropy of the queries."""
        return cross_entropy(self.logits(episode), episode.query_y)

    def predict(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities of the queries."""
        return self.logits(episode).softmax(-1)

    def logits(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Negative squared distances."""
        support, query = embedded(self.backbone, episode)
        with full_precision(query):
            return self.head(support.flatten(2), one_hot(episode.support_y, episode.ways), query.flatten(2))

    def head(
        self,
        support: Float[Tensor, "tasks support width"],
        y: Float[Tensor, "tasks support ways"],
        query: Float[Tensor, "tasks queries width"],
    ) -> Float[Tensor, "tasks queries ways"]:
        """Logits from features; what is exported behind the backbone."""
        return nearest_mean(support, y, query)


def nearest_mean(
    support: Float[Tensor, "tasks support width"], y: Float[Tensor, "tasks support ways"], query: Float[Tensor, "tasks queries width"]
) -> Float[Tensor, "tasks queries ways"]:
    """Negative squared distances to the class means; minus infinity for a class without support."""
    y = y.to(support.dtype)
    count = y.sum(1)  # (tasks, ways)
    means = y.mT @ support / count.clamp(min=1)[..., None]  # (tasks, ways, width)
    return (-squared_distances(query, means)).masked_fill((count == 0)[:, None], -torch.inf)


def squared_distances(a: Float[Tensor, "tasks n width"], b: Float[Tensor, "tasks m width"]) -> Float[Tensor, "tasks n m"]:
    """|a_i - b_j|^2 without the differences in memory; around the mean of b, since large norms would cancel badly."""
    centre = b.mean(1, keepdim=True)
    a, b = a - centre, b - centre
    return ((a * a).sum(-1)[..., None] + (b * b).sum(-1)[:, None] - 2 * a @ b.mT).clamp(min=0)


def embedded(backbone: nn.Module, episode: Episode) -> tuple[Float[Tensor, "tasks support *map"], Float[Tensor, "tasks queries *map"]]:
    """Support and query maps, in one batch as the papers' code has it; zeros where padded, float32 after mixed precision.

    Padding does not pass through the backbone: its zero images would enter the statistics of batch norm.
    """
    x = torch.cat([episode.support_x, episode.query_x], 1)
    real = real_nodes(episode)
    seen = backbone(x.flatten(0, 1) if episode.full else x[real])
    seen = seen.float() if seen.dtype in (torch.float16, torch.bfloat16) else seen
    maps = seen.unflatten(0, real.shape) if episode.full else seen.new_zeros(*real.shape, *seen.shape[1:]).index_put((real,), seen)
    support = episode.support_x.shape[1]
    return maps[:, :support], maps[:, support:]


def real_nodes(episode: Episode) -> Bool[Tensor, "tasks nodes"]:
    """Where support and query, in this order, are no padding."""
    return torch.cat([episode.support_y, episode.query_y], 1) >= 0


def one_hot(labels: Int[Tensor, "tasks n"], ways: int) -> Float[Tensor, "tasks n ways"]:
    """Rows of zeros for label -1."""
    return nn.functional.one_hot(labels + 1, ways + 1)[..., 1:].float()


def cross_entropy(logits: Float[Tensor, "tasks n ways"], labels: Int[Tensor, "tasks n"]) -> Float[Tensor, ""]:
    """Mean over each task's labelled rows, then over tasks."""
    losses = nn.functional.cross_entropy(logits.mT, labels, ignore_index=-1, reduction="none")  # (tasks, n), 0 where -1
    return (losses.sum(1) / (labels >= 0).sum(1)).mean()


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """No mixed precision: distances between near features, and linear systems, are lost in half of it."""
    with torch.autocast(x.device.type, enabled=False):
        yield


@torch.no_grad()
def choose(method: Callable[[float], Method], values: Sequence[float], episodes: Sequence[Episode]) -> float:
    """Of the values, the one whose method is the most accurate on validation episodes; the first of equals."""
    if not values or not episodes:
        raise UserError("to choose a value takes candidates and validation episodes; there are none")
    return max(values, key=lambda value: sum(accuracy(method(value).predict(e), e).mean().item() for e in episodes))
