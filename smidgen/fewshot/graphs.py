"""A method as `fit` trains it: a module whose forward pass is its loss, by CUDA graphs if they are made."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.fewshot.episodes import Episode


class Training(nn.Module):
    """A method whose forward pass is its loss: what spreads a model over processes hears of forward passes only."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method
        self.graphs: tuple[Callable[..., Tensor], ...] = ()  # in a tuple, or its parameters would be there twice

    def forward(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean over tasks."""
        if self.graphs and self.training:
            return self.graphs[0](episode.support_x, episode.support_y, episode.query_x, episode.query_y)
        return self.method.loss(episode)  # pyright: ignore  a Method

    def capture(self, episode: Episode) -> None:
        """Makes CUDA graphs of the loss and its gradient, for tasks of just this size and without padding.

        A small network starts a thousand kernels per update, which takes longer than they run; two graphs start them all.
        """
        example = episode.support_x, episode.support_y, episode.query_x, episode.query_y
        self.graphs = (torch.cuda.make_graphed_callables(_Plain(self.method, episode.ways), example),)  # pyright: ignore  a module


class _Plain(nn.Module):
    """The loss as a function of tensors alone."""

    def __init__(self, method: nn.Module, ways: int) -> None:
        super().__init__()
        self.method, self.ways = method, ways

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Float[Tensor, ""]:
        return self.method.loss(Episode(support_x, support_y, query_x, query_y, self.ways))  # pyright: ignore  a Method
