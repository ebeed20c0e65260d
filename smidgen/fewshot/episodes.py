"""Episodes: small classification tasks drawn from a set of labelled images (notes 1.1, 3.1).

A task has N classes ("ways"), relabelled 0 .. N-1, some labelled images of each (the support, K "shots") and others to be classified
(the queries). Tasks come in batches of one shape; where they differ in size the rest is padding, label -1 and zero images, which every
method must mask:

    support_x   (tasks, support, *image)    support_y   (tasks, support)    -1 where padded
    query_x     (tasks, queries, *image)    query_y     (tasks, queries)    -1 where padded

Who draws how many:

    shots       a number: every class has so many; "any": with probability 1/2 all classes of a task have the same n ~ U{1 .. 50}, otherwise
                each its own (notes 3.1); "any-class" and "any-task" are the two halves alone. Classes with too few images get fewer.
    queries     per class; "dirichlet": ways x queries in all, shared out by a Dirichlet(2) draw, so that classes are unbalanced (notes 5.4)
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smidgen.errors import UserError
from smidgen.images import Images

MOST = 50  # shots of an any-shot class
DIRICHLET = 2.0
Shots = int | Literal["any", "any-class", "any-task"]
Queries = Literal["balanced", "dirichlet"]


@dataclass(frozen=True)
class Episode:
    """A batch of tasks; see the module's description."""

    support_x: Float[Tensor, "tasks support *image"]
    support_y: Int[Tensor, "tasks support"]
    query_x: Float[Tensor, "tasks queries *image"]
    query_y: Int[Tensor, "tasks queries"]
    ways: int
    classes: Int[Tensor, "tasks ways"] | None = None
    "What every way is among the classes of the images drawn from; None where nobody knows."

    def shots(self) -> Float[Tensor, "tasks ways"]:
        """Support images of every class."""
        return torch.nn.functional.one_hot(self.support_y + 1, self.ways + 1)[..., 1:].sum(1).float()

    def with_features(self, support: Tensor, query: Tensor) -> "Episode":
        """The same tasks with embeddings, (tasks, n, width), in the place of images."""
        return replace(self, support_x=support, query_x=query)


@dataclass(frozen=True)
class Sampler:
    """Draws batches of tasks, the i-th always the same one."""

    images: Images
    ways: int = 5
    shots: Shots = 1
    queries: int = 15
    balance: Queries = "balanced"
    tasks: int = 1
    "Tasks of a batch."
    seed: int = 0

    def __post_init__(self) -> None:
        usable = len(self.usable())
        if self.ways < 2 or self.ways > usable:
            raise UserError(
                f"{self.images.name} has {usable} classes with enough images, which is not enough for {self.ways} ways"
                if self.ways >= 2
                else f"a task needs at least 2 ways, got {self.ways}"
            )
        if self.queries < 1 or (isinstance(self.shots, int) and self.shots < 1):
            raise UserError("a task needs at least one shot and one query per class")

    def usable(self) -> list[int]:
        """Classes with one image to learn from, or all the shots asked for, and the queries besides."""
        least = self.queries + (self.shots if isinstance(self.shots, int) else 1)
        return [c for c, members in enumerate(self.images.members) if len(members) >= least]

    def __call__(self, i: int) -> Episode:
        """Batch number i."""
        random = np.random.default_rng([self.seed, i])
        tasks = [self._task(random) for _ in range(self.tasks)]
        parts = [_padded([task[part] for task in tasks]) for part in range(5)]
        device = self.images.pixels.device
        support, support_y, query, query_y, classes = (torch.from_numpy(part).to(device) for part in parts)
        return Episode(self.images.floats(support), support_y, self.images.floats(query), query_y, self.ways, classes)

    def __iter__(self) -> Iterator[Episode]:
        """Batches without end."""
        i = 0
        while True:
            yield self(i)
            i += 1

    def _task(self, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Indices and labels of support and query, and the classes."""
        classes = random.choice(self.usable(), self.ways, replace=False)
        shots, queries = self._shots(random), self._queries(random)
        support: list[np.ndarray] = []
        query: list[np.ndarray] = []
        for way, c in enumerate(classes):
            members = random.permutation(self.images.members[c].cpu().numpy())
            asked = min(queries[way], len(members) - 1)
            query.append(members[:asked])
            support.append(members[asked : asked + shots[way]])
        labels = [np.repeat(np.arange(self.ways), [len(p) for p in part]) for part in (support, query)]
        return np.concatenate(support), labels[0], np.concatenate(query), labels[1], classes

    def _shots(self, random: np.random.Generator) -> np.ndarray:
        if isinstance(self.shots, int):
            return np.full(self.ways, self.shots)
        same = self.shots == "any-task" or (self.shots == "any" and random.random() < 0.5)
        return np.full(self.ways, random.integers(1, MOST + 1)) if same else random.integers(1, MOST + 1, self.ways)

    def _queries(self, random: np.random.Generator) -> np.ndarray:
        if self.balance == "balanced":
            return np.full(self.ways, self.queries)
        return random.multinomial(self.ways * self.queries, random.dirichlet(np.full(self.ways, DIRICHLET)))


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of one length, filled up with -1."""
    filled = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = values
    return filled


def accuracy(probabilities: Float[Tensor, "tasks queries ways"], episode: Episode) -> Float[Tensor, "tasks"]:
    """Share of each task's queries that are classified right."""
    real = episode.query_y >= 0
    right = (probabilities.argmax(-1) == episode.query_y) & real
    return right.sum(1) / real.sum(1)
