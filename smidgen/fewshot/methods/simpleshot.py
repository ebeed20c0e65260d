"""SimpleShot: nearest class mean of centred, unit-length features (CL2N).

    Wang, Chao, Weinberger, van der Maaten, SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning, 2019

    z = (f(x) - m) / |f(x) - m|         m: mean feature of the base classes, those the backbone was trained on

then as prototypes.py. The means of z are not brought to unit length again.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.methods.prototypes import ProtoNet, nearest_mean


class SimpleShot(ProtoNet):
    """CL2N over a backbone, or over features (`nn.Identity()`).

    Nothing of it needs training but the backbone; `loss` is there to fine-tune one, and to be validated by. The mean does not follow the
    backbone: take it again after training. Logits lie between -4 and 0.
    """

    mean: Tensor

    def __init__(self, backbone: nn.Module, mean: Float[Tensor, "width"]) -> None:
        """`mean`: of the base classes, see `base_mean`; zeros make it L2N."""
        super().__init__(backbone)
        self.register_buffer("mean", mean.clone())

    def head(
        self,
        support: Float[Tensor, "tasks support width"],
        y: Float[Tensor, "tasks support ways"],
        query: Float[Tensor, "tasks queries width"],
    ) -> Float[Tensor, "tasks queries ways"]:
        """Logits from features; what is exported behind the backbone."""
        return nearest_mean(unit(support - self.mean), y, unit(query - self.mean))


def unit(x: Float[Tensor, "*n width"]) -> Float[Tensor, "*n width"]:
    """Of length 1; zeros stay."""
    return x / x.square().sum(-1, keepdim=True).clamp(min=1e-24).sqrt()


@torch.no_grad()
def base_mean(backbone: nn.Module, batches: Iterable[Tensor]) -> Float[Tensor, "width"]:
    """Mean feature of the base classes' images, given as batches (images, *image); backbone in evaluation mode, each image once."""
    total, count = torch.zeros(()), 0
    for x in batches:
        features = backbone(x).flatten(1).double()
        total, count = total.to(features) + features.sum(0), count + len(features)
    if count == 0:
        raise UserError("the mean of the base classes needs at least one image of theirs; got none")
    return (total / count).float()
