"""One method, one file: a module with two verbs.

loss(episode) -> scalar to be minimised, over a batch of tasks
predict(episode) -> probabilities of every query, (tasks, queries, ways)
"""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from smidgen.fewshot.episodes import Episode


class Method(Protocol):
    """What training, evaluation and export need of a method; it is a torch module besides."""

    def loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean over tasks."""
        ...

    def predict(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities; rows of padding hold anything."""
        ...
