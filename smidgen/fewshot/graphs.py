"""A method as `fit` trains it: a module whose forward pass is its loss, by CUDA graphs if they are made."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.cuda_graphs import captured
from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, Tasks
from smidgen.fewshot.methods.inner import PART, Classifier, Parts

SIZES = 8  # of a batch of tasks of any size, each with a graph of its own


class Training(nn.Module):
    """A method whose forward pass is its loss: what spreads a model over processes hears of forward passes only."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method
        self.graphs: Graphs | None = None

    def forward(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean over tasks."""
        if self.graphs is not None and self.training:
            return self.graphs(episode)
        return self.method.loss(episode)  # pyright: ignore  a Method

    def capture(self, tasks: Tasks) -> None:
        """By CUDA graphs from now on."""
        self.graphs = Graphs(self.method, tasks)


class Graphs:
    """The loss of a method and its gradient as CUDA graphs.

    A small network starts a thousand kernels per update, an inner loop five thousand, which takes longer than they run; two graphs start
    them all. A graph has one size. Tasks of the same number of shots, without padding, have one. Inner loops, whose tasks may have any,
    are given a few: supports padded to the most there can be, which only the encoder computes, and room for 1/8, 2/8, .. of their parts. A
    graph is made when its size first comes.
    """

    def __init__(self, method: nn.Module, tasks: Tasks) -> None:
        """For tasks as these."""
        self.method = method
        self.classifier = next((module for module in method.modules() if isinstance(module, Classifier)), None)
        self.width = tasks.ways * tasks.most, tasks.ways * tasks.queries
        self.made: dict[tuple, Callable[..., Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if tasks.device.type == "cuda" else None
        if self.classifier is None and (not isinstance(tasks.shots, int) or tasks.balance != "balanced"):
            raise UserError("CUDA graphs of this method need tasks of one size: a number of shots, and balanced queries")
        if self.classifier is not None and self.classifier.inner.faithful_padding:
            raise UserError("CUDA graphs need padding that changes nothing: leave out faithful_padding")

    def __call__(self, episode: Episode) -> Float[Tensor, ""]:
        """The loss, whose gradient is a graph as well."""
        if self.classifier is not None:
            episode = sized(episode, self.width, self.classifier)
        elif not episode.full:  # which a graph could not see
            raise UserError("CUDA graphs of this method need tasks without padding; a class has too few images for its queries")
        tensors = episode.support_x, episode.support_y, episode.query_x, episode.query_y
        size = (*(x.shape for x in tensors), episode.room)
        if size not in self.made:
            self.made[size] = captured(_Plain(self.method, episode), tensors, self.pool)
        return self.made[size](*tensors)


def sized(episode: Episode, width: tuple[int, int], classifier: Classifier) -> Episode:
    """The same tasks in one of few sizes, `width` for supports and queries; what is added is padding."""
    (support_x, support_y), (query_x, query_y) = (
        (F.pad(x, (*[0, 0] * (x.ndim - 2), 0, wide - x.shape[1])), F.pad(y, (0, wide - y.shape[1]), value=-1))
        for (x, y), wide in zip(((episode.support_x, episode.support_y), (episode.query_x, episode.query_y)), width, strict=True)
    )
    shown, asked = (len(support_y) * -(-wide // PART) for wide in width)
    step = -(-shown // SIZES)
    room = min(shown, -(-Parts.least(classifier.counted(support_y)) // step) * step)
    return replace(episode, support_x=support_x, support_y=support_y, query_x=query_x, query_y=query_y, room=(room, asked))


class _Plain(nn.Module):
    """The loss as a function of tensors alone."""

    def __init__(self, method: nn.Module, episode: Episode) -> None:
        super().__init__()
        self.method, self.ways, self.room = method, episode.ways, episode.room

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Float[Tensor, ""]:
        return self.method.loss(Episode(support_x, support_y, query_x, query_y, self.ways, room=self.room))  # pyright: ignore
