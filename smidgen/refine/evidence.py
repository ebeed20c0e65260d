"""What the methods of `smidgen refine` look at, and what they answer.

    x   (n, d)   features of the images, of a frozen network
    y   (n,)     given labels, 0 .. classes - 1; some are wrong

A method is a frozen dataclass of its hyper-parameters: method(evidence) -> Scores. Its `needs` name what it cannot do without besides x and
y. Duplicates share a number in `groups`: a fold never holds one and trains on the other.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smidgen.errors import UserError
from smidgen.refine.heads import STEPS, Compression, best_decay, folds, predictions
from smidgen.refine.kernel import KernelMachine

Need = Literal["validation", "probabilities", "dynamics"]
FOLDS, REPEATS = 5, 3


@dataclass(frozen=True, eq=False)
class Evidence:
    """All on one device. What several methods make of it is made once: components, a kernel machine, probabilities."""

    x: Float[Tensor, "n d"] = field(repr=False)
    y: Int[Tensor, "n"] = field(repr=False)
    classes: int
    validation: tuple[Float[Tensor, "v d"], Int[Tensor, "v"]] | None = field(default=None, repr=False)
    "Features and labels of images that are no part of x, labelled with care."
    probabilities: Float[Tensor, "n classes"] | None = field(default=None, repr=False)
    "Of every class, by models that were not trained on the image."
    dynamics: Float[Tensor, "epochs n classes"] | None = field(default=None, repr=False)
    "Logits of the training images after every epoch of one training."
    groups: Int[Tensor, "n"] | None = field(default=None, repr=False)
    "The same number for images that are duplicates of each other."
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise UserError(f"labels cannot be judged with {self.classes} class; two or more are needed")
        if len(self.x) < 2 * self.classes:
            raise UserError(f"{len(self.x)} images of {self.classes} classes are too few to judge their labels; give two per class or more")
        _check("training", self.x, self.y, self.classes)
        if self.validation is not None:
            _check("validation", *self.validation, self.classes)
        for name, given in (("probabilities", self.probabilities), ("dynamics", self.dynamics)):
            if given is not None and not torch.isfinite(given).all():
                raise UserError(f"{name} hold NaN or infinite values")

    @cached_property
    def components(self) -> Float[Tensor, "n k"]:
        """The principal ones of x, as heads read them."""
        return Compression(self.x)(self.x)

    @cached_property
    def targets(self) -> Float[Tensor, "n classes"]:
        """One-hot labels."""
        return F.one_hot(self.y, self.classes).to(self.components.dtype)

    @cached_property
    def inside(self) -> Bool[Tensor, "n heads"]:
        """What each of the heads of the folds trains on, repeat by repeat."""
        return folds(self.y, FOLDS, REPEATS, self.seed, self.groups)

    @cached_property
    def decay(self) -> float:
        """Of linear heads: the one with the least out-of-fold loss."""
        return best_decay(self.components, self.targets, self.inside[:, :FOLDS])

    @cached_property
    def out_of_fold(self) -> Float[Tensor, "n classes"]:
        """Probabilities given, or those of linear heads that saw neither the image nor its duplicates."""
        if self.probabilities is not None:
            return self.probabilities
        total = torch.zeros_like(self.targets)
        for part, p in predictions(self.components, self.targets, self.inside.to(total.dtype), self.decay, 2 * STEPS):
            total += (p * ~self.inside[:, part, None]).sum(1)
        return total / REPEATS

    @cached_property
    def machine(self) -> KernelMachine:
        """Of the components, whatever the labels."""
        return KernelMachine(self.components[:, :-1], self.groups, self.seed)

    def with_labels(self, y: Int[Tensor, "n"]) -> "Evidence":
        """The same images; what does not depend on labels is not made again."""
        other = replace(self, y=y)
        other.__dict__.update(components=self.components, machine=self.machine)  # where cached properties lie
        return other


@dataclass(frozen=True)
class Scores:
    """One answer per image."""

    value: Float[Tensor, "n"]
    "As the method defines it; high is good."
    score: Float[Tensor, "n"]
    "In [0, 1], low is suspicious, in the order of `value`."


@runtime_checkable
class Method(Protocol):
    """A valuation or a detector of wrong labels."""

    needs: ClassVar[tuple[Need, ...]]

    def __call__(self, evidence: Evidence) -> Scores:
        """Value and score of every image."""
        ...


def ranked(value: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The share of the other images that are worse; equal ones share their places. For values without bounds of their own.

    >>> ranked(torch.tensor([0.3, -2.0, 0.3, 9.0]))
    tensor([0.5000, 0.0000, 0.5000, 1.0000])
    """
    ordered = value.sort().values
    below, upto = torch.searchsorted(ordered, value), torch.searchsorted(ordered, value, right=True)
    return (below + upto - 1).to(value.dtype) / 2 / max(1, len(value) - 1)


def required(evidence: Evidence) -> tuple[Float[Tensor, "v d"], Int[Tensor, "v"]]:
    """The validation set, of a method that needs one."""
    if evidence.validation is None:
        raise UserError("this method compares models on a validation set; give one (--validation), or choose knn-shapley or data-oob")
    return evidence.validation


def _check(name: str, x: Tensor, y: Tensor, classes: int) -> None:
    if not torch.isfinite(x).all():
        raise UserError(f"the {name} features hold NaN or infinite values")
    if len(y) == 0:
        raise UserError(f"there is no {name} image")
    if y.min() < 0 or y.max() >= classes:
        raise UserError(f"{name} labels are {int(y.min())} to {int(y.max())}, but there are {classes} classes, so 0 to {classes - 1}")
