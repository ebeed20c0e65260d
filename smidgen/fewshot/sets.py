"""Tasks of several data sets: each task comes whole from one of them, chosen with equal probability.

A network reads images of one shape, so the sets must have one: the caller resizes and makes grey images coloured (or the reverse), since
only the caller knows whether a digit of 28 x 28 should be enlarged or padded. Different shapes are refused here, by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, Sampler, Tasks
from smidgen.images import Images

CHOICE = 1  # keeps the draw of the set apart from the draws inside the set, which are seeded by (seed, number)


@dataclass(frozen=True)
class SetsSampler(Tasks[tuple[Images, ...]]):
    """Draws batches of tasks from several sets.

    Task t of batch i is number k = i tasks + t. Its set is drawn uniformly from (seed, k), whatever the sizes of the sets; the task is the
    k-th of that set's own Sampler.
    """

    def __post_init__(self) -> None:
        one_shape(self.images)
        self.samplers  # noqa: B018 (sets that cannot be drawn from are refused now)

    @property
    def classes(self) -> tuple[str, ...]:
        """Of all sets, one after the other."""
        return tuple(f"{s.name}/{c}" for s in self.images for c in s.classes)

    @property
    def device(self) -> torch.device:
        """Of the images."""
        return self.images[0].pixels.device

    @cached_property
    def samplers(self) -> tuple[Sampler, ...]:
        """One per set, of one task at a time."""
        return tuple(
            Sampler(s, self.ways, self.shots, self.queries, self.balance, seed=self.seed, augment=self.augment) for s in self.images
        )

    def chosen(self, i: int) -> list[int]:
        """Indices of the sets that the tasks of batch i come from."""
        numbers = range(i * self.tasks, (i + 1) * self.tasks)
        return [int(np.random.default_rng([self.seed, k, CHOICE]).integers(len(self.images))) for k in numbers]

    def __call__(self, i: int) -> Episode:
        """Batch number i."""
        return joined([self._counted(self.samplers[s](i * self.tasks + t), s) for t, s in enumerate(self.chosen(i))])

    def _counted(self, episode: Episode, s: int) -> Episode:
        before = sum(len(images.classes) for images in self.images[:s])
        return episode if episode.classes is None else replace(episode, classes=episode.classes + before)


def one_shape(sets: Sequence[Images]) -> tuple[int, int, int]:
    """The shape (channels, height, width) that all sets share."""
    if not sets:
        raise UserError("tasks need at least one data set")
    first, shapes = sets[0], [tuple(s.pixels.shape[1:]) for s in sets]
    for other, shape in zip(sets, shapes, strict=True):
        if shape != shapes[0]:
            raise UserError(
                f"{first.name} has images of {_described(shapes[0])}, {other.name} of {_described(shape)}; "
                "resize them, or convert their colours, to one shape first"
            )
    height, width, channels = shapes[0]
    return channels, height, width


def held_out(images: Images, share: float = 0.2) -> tuple[Images, Images]:
    """The first classes, to train members with, and the last `share` of them, to train weights with (in order of class id)."""
    count = len(images.classes)
    kept = count - round(share * count)
    if not 0 < kept < count:
        raise UserError(f"{images.name} has {count} classes, of which {share:g} cannot be held out; give more classes or another share")
    return images.of(list(range(kept))), images.of(list(range(kept, count)))


def joined(episodes: Sequence[Episode]) -> Episode:
    """Batches of tasks in one, filled up with padding where they differ in size."""
    if len(episodes) == 1:
        return episodes[0]
    support_x, support_y, query_x, query_y = (
        _filled([part(e) for e in episodes], fill)
        for part, fill in (
            (lambda e: e.support_x, 0),
            (lambda e: e.support_y, -1),
            (lambda e: e.query_x, 0),
            (lambda e: e.query_y, -1),
        )
    )
    known = [e.classes for e in episodes if e.classes is not None]
    classes = torch.cat(known) if len(known) == len(episodes) else None
    return Episode(support_x, support_y, query_x, query_y, episodes[0].ways, classes)


def _filled(parts: list[Tensor], fill: int) -> Tensor:
    longest = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1]), value=fill) for part in parts])


def _described(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{height} x {width} with {channels} channel{'s' * (channels != 1)}"
