"""Episodes: small classification tasks drawn from a set of labelled images.

A task has N classes ("ways"), relabelled 0 .. N-1, some labelled images of each (the support, K "shots") and others to be classified
(the queries). Tasks come in batches of one shape; where they differ in size the rest is padding, label -1 and zero images, which every
method must mask:

    support_x   (tasks, support, *image)    support_y   (tasks, support)    -1 where padded
    query_x     (tasks, queries, *image)    query_y     (tasks, queries)    -1 where padded

Who draws how many:

    shots       a number: every class has so many; "any": with probability 1/2 all classes of a task have the same n ~ U{1 .. 50}, otherwise
                each its own; "any-class" and "any-task" are the two halves alone. Classes with too few images get fewer.
    queries     per class; "dirichlet": ways x queries in all, shared out by a Dirichlet(2) draw, as far as a class has
                images beside its shots

Images that belong together (`Images.groups`: frames of one film) are never on both sides of a task: half of a class's groups, drawn anew
for every task, are for its queries, the others for its support; where one of the halves has too few images the class gets fewer.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smidgen.errors import UserError
from smidgen.fewshot.augment import Augment, augmented
from smidgen.images import Images

MOST = 50  # shots of an any-shot class
DIRICHLET = 2.0
VARIATION = 2  # keeps the draws of augmentation apart from those of the tasks, which are seeded by (seed, number)
Shots = int | Literal["any", "any-class", "any-task"]
Queries = Literal["balanced", "dirichlet"]
Source = TypeVar("Source")


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
    room: tuple[int, int] | None = None
    "Of supports and of queries, how many parts an inner loop computes (methods/inner.py), where shapes may not depend on data (graphs.py)."

    def shots(self) -> Float[Tensor, "tasks ways"]:
        """Support images of every class."""
        return torch.nn.functional.one_hot(self.support_y + 1, self.ways + 1)[..., 1:].sum(1).float()

    @cached_property
    def full(self) -> bool:
        """Whether nothing is padding; asked once."""
        return full(torch.cat([self.support_y, self.query_y], 1) >= 0)

    def with_features(self, support: Tensor, query: Tensor) -> "Episode":
        """The same tasks with embeddings, (tasks, n, width), in the place of images."""
        return replace(self, support_x=support, query_x=query)


@dataclass(frozen=True)
class Tasks(ABC, Generic[Source]):
    """Numbered batches of tasks, the i-th always the same one."""

    images: Source
    "What tasks are drawn from."
    ways: int = 5
    "Classes of a task."
    shots: Shots = 1
    "Labelled images of each."
    queries: int = 15
    "Images of each to be classified, or their mean."
    balance: Queries = "balanced"
    "Whether all classes have as many."
    tasks: int = 1
    "Tasks of a batch."
    seed: int = 0
    augment: tuple[Augment, ...] = ()
    "How images are varied, each on its own."

    @abstractmethod
    def __call__(self, i: int) -> Episode:
        """Batch number i."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that `Episode.classes` counts through."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the images are."""

    @property
    def most(self) -> int:
        """Largest number of shots."""
        return self.shots if isinstance(self.shots, int) else MOST

    def __iter__(self) -> Iterator[Episode]:
        """Batches without end."""
        i = 0
        while True:
            yield self(i)
            i += 1


@dataclass(frozen=True)
class Sampler(Tasks[Images]):
    """Draws batches of tasks from one set of images."""

    def __post_init__(self) -> None:
        usable = len(self.usable)
        if self.ways < 2 or self.ways > usable:
            raise UserError(
                f"{self.images.name} has {usable} classes with enough images, which is not enough for {self.ways} ways"
                if self.ways >= 2
                else f"a task needs at least 2 ways, got {self.ways}"
            )
        if self.queries < 1 or (isinstance(self.shots, int) and self.shots < 1):
            raise UserError("a task needs at least one shot and one query per class")

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the images."""
        return self.images.classes

    @property
    def device(self) -> torch.device:
        """Of the images."""
        return self.images.pixels.device

    @cached_property
    def members(self) -> list[list[np.ndarray]]:
        """Of every class the images of every group; where nothing is grouped, a single one."""
        members = [m.cpu().numpy() for m in self.images.members]
        if self.images.groups is None:
            return [[m] for m in members]
        groups = self.images.groups.cpu().numpy()
        return [[m[groups[m] == g] for g in np.unique(groups[m])] for m in members]

    @cached_property
    def usable(self) -> np.ndarray:
        """Classes with one image to learn from, or all the shots asked for, and the queries besides; and with groups for both."""
        least = self.queries + (self.shots if isinstance(self.shots, int) else 1)
        grouped = self.images.groups is not None
        fits = [c for c, parts in enumerate(self.members) if sum(map(len, parts)) >= least and (len(parts) > 1 or not grouped)]
        return np.array(fits, np.int64)

    def __call__(self, i: int) -> Episode:
        """Batch number i."""
        random = np.random.default_rng([self.seed, i])
        tasks = [self._task(random) for _ in range(self.tasks)]
        parts = [_padded([task[part] for task in tasks]) for part in range(5)]
        moved = torch.from_numpy(np.concatenate(parts, 1)).to(self.device)  # one transfer instead of five
        support, support_y, query, query_y, classes = moved.split([part.shape[1] for part in parts], 1)
        x = self.images.floats(torch.cat([support, query], 1))
        if self.augment:
            x = augmented(x, self.augment, np.random.default_rng([self.seed, i, VARIATION]))
        return Episode(x[:, : support.shape[1]], support_y, x[:, support.shape[1] :], query_y, self.ways, classes)

    def _task(self, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Indices and labels of support and query, and the classes."""
        classes = random.choice(self.usable, self.ways, replace=False)
        shots, queries = self._shots(random), self._queries(random)
        support: list[np.ndarray] = []
        query: list[np.ndarray] = []
        for way, c in enumerate(classes):
            most = sum(map(len, self.members[c])) - (self.shots if isinstance(self.shots, int) else 1)
            for_query, for_support = self._sides(self.members[c], min(int(queries[way]), most), random)
            query.append(for_query)
            support.append(for_support[: shots[way]])
        labels = [np.repeat(np.arange(self.ways), [len(p) for p in part]) for part in (support, query)]
        return np.concatenate(support), labels[0], np.concatenate(query), labels[1], classes

    @staticmethod
    def _sides(parts: Sequence[np.ndarray], queries: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Of one class so many images to ask about, or as many as there are for it; and those to learn from, in a random order."""
        if len(parts) == 1:
            members = random.permutation(parts[0])
            return members[:queries], members[queries:]
        order = random.permutation(len(parts))
        half = len(order) // 2
        asked, shown = (random.permutation(np.concatenate([parts[g] for g in side])) for side in (order[:half], order[half:]))
        return asked[:queries], shown

    def _shots(self, random: np.random.Generator) -> np.ndarray:
        if isinstance(self.shots, int):
            return np.full(self.ways, self.shots)
        same = self.shots == "any-task" or (self.shots == "any" and random.random() < 0.5)
        return np.full(self.ways, random.integers(1, MOST + 1)) if same else random.integers(1, MOST + 1, self.ways)

    def _queries(self, random: np.random.Generator) -> np.ndarray:
        if self.balance == "balanced":
            return np.full(self.ways, self.queries)
        return random.multinomial(self.ways * self.queries, random.dirichlet(np.full(self.ways, DIRICHLET)))


def full(real: Bool[Tensor, "tasks n"]) -> bool:
    """Whether nothing is padding. CUDA graphs are made of such tasks alone, and cannot wait for the answer."""
    return capturing(real) or bool(real.all())


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being made, in which the processor may wait for nothing."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


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
