"""Conv-4, the small network of few-shot papers."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

Norm = Literal["inductive", "transductive"]


class Conv4(nn.Sequential):
    """Four blocks of 3 x 3 convolution, batch norm, ReLU and 2 x 2 max pooling.

    `norm`: inductive uses running statistics at test time; transductive those of the batch always, so that queries inform each other.

    >>> sum(p.numel() for p in Conv4(3).parameters())
    113088
    """

    def __init__(self, channels: int = 3, width: int = 64, norm: Norm = "inductive") -> None:
        """`channels` of the images, `width` filters."""
        blocks = []
        for i in range(4):
            blocks += [
                nn.Conv2d(channels if i == 0 else width, width, 3, padding=1),
                nn.BatchNorm2d(width, track_running_stats=norm == "inductive"),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        super().__init__(*blocks)

    def embed(self, x: Float[Tensor, "tasks n channels height width"]) -> Float[Tensor, "tasks n features"]:
        """Flat features of a batch of tasks."""
        return self(x.flatten(0, 1)).flatten(1).unflatten(0, x.shape[:2])
