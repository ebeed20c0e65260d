"""The linear layers of transformers models, whichever way they store their weights."""

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)


def weight_of(layer: nn.Module) -> Float[Tensor, "out in"]:
    """A linear layer's weight as (out, in), a view; GPT-2 stores it the other way round."""
    w = layer.get_parameter("weight")
    return w.T if isinstance(layer, Conv1D) else w
