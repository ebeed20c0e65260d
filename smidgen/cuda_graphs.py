"""CUDA graphs of what trains: an update of a small network is thousands of kernels, which take longer to start than to run."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def captured(module: nn.Module, tensors: tuple[Tensor, ...], pool: tuple[int, int] | None = None) -> Callable[..., Tensor]:
    """A module's forward and backward pass as two CUDA graphs, for tensors of these shapes, in the precision that is set here.

    Its parameters are where the gradients go. Torch's random numbers stay where they are. Graphs that share a `pool` must not need one
    another's results.
    """
    device = tensors[0].device
    precision, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    # weights cast once and remembered would not be cast again in a replay
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, precision, enabled=enabled, cache_enabled=False),
    ):
        return torch.cuda.make_graphed_callables(module, tensors, allow_unused_input=True, pool=pool)  # pyright: ignore  a module


@contextmanager
def replaying() -> Iterator[None]:
    """Trains by CUDA graphs, and says nothing of gradients that are added up on the stream of the capture: it costs an event an update."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
        yield
