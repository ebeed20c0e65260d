"""The proof: does a network learn more from the set after a stage than from the set before?

The same small network (classifier.py) is trained on both, S times, and asked about m held-out images that no stage has seen. With

    r[s, j]     1 if the network of seed s is right about image j, else 0
    d[s, j]     r_after[s, j] - r_before[s, j]

    gain        g = mean of d
    error       e^2 = var_j(mean_s d) / m + var_s(mean_j d) / S       images and seeds are both samples; some is counted twice,
                                                                      so e is rather too large
    interval    g -+ 1.96 e
    kept        g > e; else the stage is undone

Held-out labels are those given, wrong ones among them: these lower both accuracies alike, and gains with them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from smidgen.refine.cache import Cache
from smidgen.refine.classifier import Recipe, trained

Z = 1.96


@dataclass(frozen=True)
class Gain:
    """What a stage was worth."""

    before: float
    "Accuracy, mean over seeds."
    after: float
    error: float
    "Standard error of the difference."

    @property
    def gain(self) -> float:
        """Of accuracy."""
        return self.after - self.before

    @property
    def interval(self) -> tuple[float, float]:
        """95%."""
        return self.gain - Z * self.error, self.gain + Z * self.error

    @property
    def helps(self) -> bool:
        """Whether the stage stays."""
        return self.gain > self.error


def compare(before: Float[Tensor, "seeds m"], after: Float[Tensor, "seeds m"]) -> Gain:
    """From who was right, 0 or 1, seed by seed and image by image.

    >>> compare(torch.tensor([[0.0, 1], [0, 1]]), torch.tensor([[1.0, 1], [1, 1]]))
    Gain(before=0.5, after=1.0, error=0.5)
    """
    d = (after - before).double()
    seeds, images = d.shape
    by_image, by_seed = (d.mean(axis).var(correction=1 if n > 1 else 0) / n for axis, n in ((0, images), (1, seeds)))
    return Gain(float(before.mean()), float(after.mean()), float((by_image + by_seed).sqrt()))


def right(
    x: UInt8[Tensor, "n channels side side"],
    y: Int[Tensor, "n"],
    held_x: UInt8[Tensor, "m channels side side"],
    held_y: Int[Tensor, "m"],
    classes: int,
    recipe: Recipe,
    seeds: Iterable[int],
    cache: Cache,
) -> Float[Tensor, "seeds m"]:
    """Who of the held-out images networks trained on x are right about."""
    rows = []
    for seed in seeds:
        p = trained(x, y, classes, recipe, cache, seed).probabilities(held_x)
        rows.append((p.argmax(1) == held_y.cpu()).float())
    return torch.stack(rows)
