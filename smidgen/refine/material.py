"""What stages work on and what they are proved on: images, features, duplicates, and a part held out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from smidgen.backbones import Backbone
from smidgen.errors import UserError
from smidgen.refine.cache import Cache
from smidgen.refine.decide import Twins
from smidgen.refine.detectors.duplicates import Group, find_duplicates, group_numbers
from smidgen.refine.folder import Source, View, untouched
from smidgen.refine.heads import assigned

FOLDS = 5


@dataclass(frozen=True)
class Material:
    """Of one source."""

    source: Source
    view: View
    x: UInt8[Tensor, "n channels side side"] = field(repr=False)
    "What networks see of every image."
    features: Float[Tensor, "n width"] = field(repr=False)
    twins: Twins
    groups: Int[Tensor, "n"] = field(repr=False)
    "The same number for images that are duplicates of each other."
    part: Int[np.ndarray, "m"] = field(repr=False)
    "Rows the stages may see before they are proved."
    held_x: UInt8[Tensor, "v channels side side"] = field(repr=False)
    "Images they are proved on."
    held_y: Int[Tensor, "v"] = field(repr=False)

    @property
    def classes(self) -> int:
        """Their number."""
        return len(self.source.classes)

    def folds(self, seed: int) -> Int[Tensor, "n"]:
        """Of the part; -1 of images held out."""
        index = torch.from_numpy(self.part)
        fold = torch.full((len(self.source),), -1)
        fold[index] = assigned(self.source.images.labels[index], FOLDS, seed, self.groups[index])
        return fold


def gather(
    source: Source, validation: Source | None, backbone: Backbone, side: int, share: float, cache: Cache, batch: int, seed: int
) -> Material:
    """Features and duplicates of all images, and a held-out part: validation, or a share of the source."""
    channels = max(s.images.pixels.shape[-1] for s in (source, validation) if s is not None)
    view, n = View(source.small, channels, side), len(source)
    features = backbone.features(source.images, batch, cache.folder)
    x = view(untouched(range(n), source.labels.tolist()))
    if validation is None:
        twins, groups = duplicates(source, features)
        held = hold_out(source, groups, share, seed)
        part, inside = np.flatnonzero(~held), torch.from_numpy(held)
        return Material(source, view, x, features, twins, groups, part, x[inside], source.images.labels[inside])
    labels = renamed(validation, source.classes)
    all_features = torch.cat([features, backbone.features(validation.images, batch, cache.folder)])
    twins, groups = duplicates(source, all_features, validation, labels)
    held_x = View(validation.small, channels, side)(untouched(range(len(validation)), labels.tolist()))
    fresh = ~torch.isin(groups[n:], groups[:n])  # what training has, too, would be known by heart
    if not bool(fresh.any()):
        raise UserError(f"{validation.images.name}: every image is in the source, too; nothing is left to prove anything on")
    return Material(source, view, x, features, twins, groups[:n], np.arange(n), held_x[fresh], labels[fresh])


def renamed(validation: Source, classes: Sequence[str]) -> Int[Tensor, "v"]:
    """Its labels as numbers of the source's classes."""
    unknown = [name for name in validation.classes if name not in classes]
    if unknown:
        raise UserError(f"{validation.images.name}: class {unknown[0]!r} is not in the source, whose classes are {', '.join(classes[:8])}")
    return torch.tensor([classes.index(name) for name in validation.classes])[validation.images.labels]


def duplicates(
    source: Source, features: Float[Tensor, "n width"], validation: Source | None = None, labels: Int[Tensor, "v"] | None = None
) -> tuple[Twins, Int[Tensor, "n"]]:
    """Those of the source, leaks into validation, and group numbers of all images, validation's at the end."""
    n, sets = len(source), [source] if validation is None else [source, validation]
    depth = max(s.images.pixels.shape[-1] for s in sets)
    pixels = torch.cat([s.images.pixels.expand(-1, -1, -1, depth) for s in sets])
    y = source.images.labels if labels is None else torch.cat([source.images.labels, labels])
    groups = find_duplicates(pixels, y, features, validation=torch.arange(len(y)) >= n)
    inside = tuple(tuple(i for i in g.members if i < n) for g in groups)
    leaks = {i: leaked(g, n, validation) for g in groups if g.leak for i in g.members if i < n} if validation is not None else {}
    return Twins(tuple(g for g in inside if len(g) > 1), leaks), group_numbers(groups, len(y))


def leaked(group: Group, n: int, validation: Source) -> str:
    """The validation image of a group."""
    return validation.names[next(i - n for i in group.members if i >= n)]


def hold_out(source: Source, groups: Int[Tensor, "n"], share: float, seed: int) -> np.ndarray:
    """Which images are held out: stratified, duplicates on one side, and enough of every class on the other."""
    labels = source.images.labels
    held = assigned(labels, round(1 / share), seed, groups) == 0
    for c, name in enumerate(source.classes):
        if not bool((held & (labels == c)).any()) or int((~held & (labels == c)).sum()) < 2:
            raise UserError(
                f"{source.images.name}: class {name!r} has too few different images to hold some out; add some or give --validation"
            )
    return held.numpy()
