"""One method, one file: a module with two verbs.

loss(episode) -> scalar to be minimised, over a batch of tasks
predict(episode) -> probabilities of every query, (tasks, queries, ways)

and, where it has something to show, `insides`.
"""

from typing import Protocol, runtime_checkable

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


@runtime_checkable
class Shows(Protocol):
    """A method whose insides a report draws: by name, the tasks first."""

    def insides(self, episode: Episode) -> dict[str, Tensor]:
        """Of these, what it has.

        graph    (tasks, n, n)        weights of the propagation graph, n nodes: support, then queries
        sigma    (tasks, n)           length scale of every node
        omega    (tasks, ways)        weights of the classes' losses
        gamma    (tasks, layers)      factors of the layers' learning rates
        weights  (tasks, members)     of a mixture
        """
        ...


@runtime_checkable
class Validates(Protocol):
    """A method with a cheaper answer than `predict`, to choose among states in training."""

    def validate(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities, as of `predict`."""
        ...
