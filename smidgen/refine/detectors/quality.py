"""Bad pictures, by what a glance would tell: blank, without contrast, blurred, too dark or too bright, of odd proportions.

    contrast    deviation of the grey values; 0 for a blank image
    sharpness   deviation of the Laplacian over that of the grey values: little where edges are smeared
    ink         share of pixels far from the most usual grey: too little for a drawing, too much for a blot

All numbers are compared with those of the same set, as a blurred picture among blurred ones is nothing odd: the score of a number is that
of its robust distance from the median, 1 inside. Only pictures that are blank are flagged by an absolute limit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

BLANK = 2 / 255  # deviation of grey values
FAR = 0.15  # of a pixel from the most usual grey
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Quality:
    """Numbers of every picture."""

    contrast: Float[Tensor, "n"]
    sharpness: Float[Tensor, "n"]
    ink: Float[Tensor, "n"]

    @property
    def blank(self) -> Bool[Tensor, "n"]:
        """Pictures of nothing."""
        return self.contrast < BLANK

    def score(self) -> Float[Tensor, "n"]:
        """In [0, 1]: 1 within 3 deviations of the set's median in all numbers, falling beyond; 0 where blank."""
        worst = torch.stack([_oddness(self.contrast, True), _oddness(self.sharpness, True), _oddness(self.ink, False)]).amax(0)
        return torch.exp(-(worst - 3).clamp(min=0) / 3).masked_fill(self.blank, 0.0)


def picture_quality(pixels: UInt8[Tensor, "n height width channels"]) -> Quality:
    """Of images of one size."""
    grey = grey_values(pixels)
    contrast = grey.flatten(1).std(1)
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    edges = F.conv2d(F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate"), kernel).flatten(1)
    usual = (grey.flatten(1) * 15).round().mode(1).values / 15
    ink = ((grey.flatten(1) - usual[:, None]).abs() > FAR).float().mean(1)
    return Quality(contrast, edges.std(1) / contrast.clamp(min=BLANK), ink)


def grey_values(pixels: UInt8[Tensor, "n height width channels"]) -> Float[Tensor, "n height width"]:
    """In [0, 1]."""
    x = pixels.float() / 255
    return x[..., 0] if x.shape[-1] == 1 else (x * x.new_tensor(GREY)).sum(-1)


def _oddness(numbers: Float[Tensor, "n"], low_only: bool) -> Float[Tensor, "n"]:
    """Deviations from the median, read off the quartiles of the logarithm; of numbers that may be odd on one side only, on that."""
    logs = numbers.double().clamp(min=1e-4).log()
    low, middle, high = torch.quantile(logs, logs.new_tensor([0.25, 0.5, 0.75]))
    distance = (logs - middle) / ((high - low) / 1.349).clamp(min=0.05)
    return (-distance if low_only else distance.abs()).to(numbers.dtype)
