"""Loops of thousands of small kernels, which a GPU waits for between launches, as CUDA graphs.

A column loop has as many steps as a block has columns, each a few kernels of a few microseconds; starting one from Python takes
longer than that. Every block of a model has the same shapes, so the loop is captured once per shape and replayed for the others.
A simulated model starts fifty kernels per layer, of which a graph makes one launch per pass.
"""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

CAPTURED = 32  # graphs kept per function; a model needs a few


def replayed(function: F) -> F:
    """`function` of tensors and hashable constants, returning one tensor or two; on a CUDA device from a graph of its own.

    It may change its arguments; a caller that sees the change on processors does not see it there.
    """
    graphs: dict[tuple, Graph] = {}

    @wraps(function)
    def call(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not all(t.is_cuda for t in tensors):
            return function(*args)
        key = tuple((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in args)
        if key not in graphs:
            if len(graphs) == CAPTURED:
                graphs.pop(next(iter(graphs)))
            beside = next((g.recorded.graph for g in graphs.values() if g.recorded.replays), None)  # in the same memory: no two run at once
            graphs[key] = Graph(function, args, beside and beside.pool())
        return graphs[key](tensors)

    return cast(F, call)


class Recorded:
    """A function without arguments, which reads and writes tensors that stay where they are: its kernels, recorded on its second run.

    What cannot be recorded (a model whose code waits for the device, say) is called every time instead; it is only slower.
    """

    def __init__(self, function: Callable[[], Any], pool: Any = None) -> None:
        """`pool`: memory that other graphs compute in too; by default its own, which it gives back."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up at their first call, which cannot be recorded
            function()
        torch.cuda.current_stream().wait_stream(side)
        self.function = function
        self.graph = torch.cuda.CUDAGraph()
        self.replays = True
        try:
            with torch.cuda.graph(self.graph, pool=pool):
                self.outputs = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch has no narrower one for what a capture does not permit
            reason = str(error).partition("\n")[0]
            warnings.warn(f"not recorded as a CUDA graph, hence slower: {reason}", stacklevel=2)
            self.replays = False

    def __call__(self) -> Any:
        """What the function returns, where it was recorded in the same memory every time."""
        if not self.replays:
            return self.function()
        self.graph.replay()
        return self.outputs


class Graph:
    """A function's kernels for arguments of some shapes, recorded."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, Tensor]], args: tuple, pool: Any = None) -> None:
        def run() -> Tensor | tuple[Tensor, Tensor]:
            inputs = iter([t.clone() for t in self.inputs])
            return function(*(next(inputs) if isinstance(a, Tensor) else a for a in args))

        self.inputs = [a.contiguous().clone() for a in args if isinstance(a, Tensor)]
        self.recorded = Recorded(run, pool)

    def __call__(self, tensors: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """What the function returns for other tensors."""
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        outputs = self.recorded()
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(t.clone() for t in outputs)
