"""Images varied a little, each on its own, on the device they are on.

    flip      left and right exchanged, of every second image        photographs; never characters or signs
    crop      shifted by up to an eighth of the side, edges mirrored
    colour    brightness, contrast and saturation between 0.6 and 1.4 times what they were
    affine    turned by up to 15 degrees, scaled and sheared by up to a tenth, shifted by up to a tenth      characters

How much is drawn by numpy, so that a task is the same on every device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Augment = Literal["flip", "crop", "colour", "affine"]
Varied = Float[Tensor, "n channels height width"]


def augmented(x: Float[Tensor, "*n channels height width"], kinds: Sequence[Augment], random: np.random.Generator) -> Tensor:
    """Images in [0, 1], each varied by all the kinds, in the order given."""
    flat = x.flatten(0, -4)
    for kind in kinds:
        flat = KINDS[kind](flat, random)
    return flat.view(x.shape)


def flipped(x: Varied, random: np.random.Generator) -> Varied:
    """Half of the images mirrored."""
    return torch.where(drawn(x, random.random((len(x), 1, 1, 1)) < 0.5), x.flip(-1), x)


def cropped(x: Varied, random: np.random.Generator) -> Varied:
    """A window of the same size out of an image that mirrors at its edges.

    A row 1 2 3 with one pixel of margin is 2 1 2 3 2, of which 2 1 2, 1 2 3 or 2 3 2 is taken.
    """
    n, channels, height, width = x.shape
    across, down = width // 8, height // 8
    wide = F.pad(x, (across, across, down, down), mode="reflect")
    rows = drawn(x, random.integers(0, 2 * down + 1, (n, 1)) + np.arange(height))
    columns = drawn(x, random.integers(0, 2 * across + 1, (n, 1)) + np.arange(width))
    images, depth = torch.arange(n, device=x.device)[:, None, None, None], torch.arange(channels, device=x.device)[:, None, None]
    return wide[images, depth, rows[:, None, :, None], columns[:, None, None, :]]


def recoloured(x: Varied, random: np.random.Generator) -> Varied:
    """Brighter or darker, with more or less contrast and colour; values stay in [0, 1]."""
    brightness, contrast, saturation = (drawn(x, random.uniform(0.6, 1.4, (len(x), 1, 1, 1)), x.dtype) for _ in range(3))
    x = x * brightness
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + contrast * (x - mean)
    grey = x.mean(1, keepdim=True)
    return (grey + saturation * (x - grey)).clamp(0, 1)


def moved(x: Varied, random: np.random.Generator) -> Varied:
    """Turned, sheared, scaled and shifted; what comes in from outside is 0."""
    n = len(x)
    turn, shear = random.uniform(-math.pi / 12, math.pi / 12, n), random.uniform(-0.1, 0.1, n)
    scale, shift = random.uniform(0.9, 1.1, (n, 2)), random.uniform(-0.2, 0.2, (n, 2))  # of half a side
    rotation = np.stack([np.cos(turn), -np.sin(turn) + shear, np.sin(turn), np.cos(turn)], -1).reshape(n, 2, 2)
    theta = np.concatenate([rotation * scale[:, None], shift[..., None]], 2)
    grid = F.affine_grid(drawn(x, theta, x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def drawn(x: Tensor, values: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    """On the device of `x`."""
    return torch.from_numpy(values).to(x.device, dtype)


KINDS: dict[str, Callable[[Varied, np.random.Generator], Varied]] = {
    "flip": flipped,
    "crop": cropped,
    "colour": recoloured,
    "affine": moved,
}
