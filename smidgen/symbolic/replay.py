"""Training by CUDA graphs.

    s2g-cnn, s2g-acnn               the grid network is one graph: its shapes never change
    gru-attention, transformers     the whole loss is: batches are padded, which changes nothing, to one of eight lengths, a graph each

An LSTM that reads backwards is told where questions begin, in numbers; batch norm over a text in one row sees its padding: they have none.
Validation, in evaluation mode, does not use them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from smidgen.cuda_graphs import captured, replaying
from smidgen.fit import FitConfig
from smidgen.symbolic.baselines import Attentive, Classifier, Recurrent, Seq2Seq
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.networks import Blocks
from smidgen.symbolic.pool import Training
from smidgen.symbolic.tasks import Batch

LENGTHS = 8  # of batches, each with a graph of its own


def has_fixed_shapes(model: nn.Module) -> bool:
    """Whether some of it can be a graph."""
    if isinstance(model, GridModel):
        return isinstance(model.network, Blocks)
    encoder = model.encoder if isinstance(model, Seq2Seq | Classifier) else None
    return isinstance(encoder, Attentive) or (isinstance(encoder, Recurrent) and not encoder.backwards)


@contextmanager
def replayed(training: Training, questions: Batch, size: int, config: FitConfig) -> Iterator[None]:
    """Meanwhile batches of `size` questions train by graphs."""
    model = training.model
    with replaying():
        if isinstance(model, GridModel):
            capture_grid_network(model, size, config)
        else:
            training.graphs = Losses(model, int(questions.lengths.max()))
        try:
            yield
        finally:
            training.graphs = None
            if isinstance(model, GridModel):
                del model.network.forward  # what make_graphed_callables put before the class's own


def capture_grid_network(model: GridModel, size: int, config: FitConfig) -> None:
    """From now on, in training."""
    network, module, device = model.network, model.module, model.embedding.table.device
    shape = size, module.rows, module.columns, model.embedding.table.shape[1]
    precision = config.products(device)
    statistics = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        captured(network, (torch.randn(shape, device=device, requires_grad=True),))
    for buffer, before in statistics:
        buffer.copy_(before)  # batch norm has seen the drawn grid


class Losses:
    """A model's loss and its gradient as CUDA graphs, each made when its length first comes."""

    def __init__(self, model: nn.Module, longest: int) -> None:
        """For questions of up to `longest` tokens."""
        self.model = model
        self.step = -(-longest // LENGTHS)
        self.made: dict[int, Callable[..., Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if next(model.parameters()).is_cuda else None

    def __call__(self, tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], target: Tensor) -> Float[Tensor, ""]:
        """The loss of a batch, whose gradient is a graph as well."""
        behind = -tokens.shape[1] % self.step
        given = pad(tokens, (0, behind)), pad(mask, (0, behind)), target
        length = given[0].shape[1]
        if length not in self.made:
            self.made[length] = captured(_Loss(self.model), given, self.pool)
        return self.made[length](*given)


class _Loss(nn.Module):
    """Of tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        return self.model.loss(tokens, mask, target)  # pyright: ignore  a model of MODELS
