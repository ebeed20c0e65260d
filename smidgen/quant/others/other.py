"""What the command needs to know of a model that is no language model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

GRAPH = "model.onnx"


@dataclass(frozen=True)
class Sample:
    """One input: an image, a text, a question, a task."""

    call: Mapping[str, Tensor]
    "As the module takes it, by argument."
    feed: Mapping[str, np.ndarray]
    "As the artifact takes it, by input."

    @staticmethod
    def of(**tensors: Tensor) -> "Sample":
        """Where both are the same."""
        return Sample(tensors, {name: t.numpy() for name, t in tensors.items()})


@dataclass(frozen=True)
class Other:
    """A model with its inputs and its artifact."""

    name: str
    module: nn.Module
    "Float, in evaluation mode."
    compact: nn.Module
    "The same with what is no layer made small; its layers are those that are quantized."
    outputs: tuple[str, ...]
    "Of the graph; the first is compared."
    samples: Callable[[int, int], list[Sample]]
    "(count, seed) -> so many inputs, or fewer where there are no more."
    dynamic: dict[str, dict[int, str]] | None = None
    "Free axes, as `onnx_module.trace` takes them; none at all: {} for every argument."
    skip: tuple[str, ...] = ()
    "Layers that stay float."
    rows: bool = False
    "Whether outputs are scores of classes, a row each, of which the largest counts; otherwise features, whose direction counts."
    complete: Callable[[Path, bool], None] = field(default=lambda folder, integers: None)
    "Adds what belongs beside the graph in a folder, or into it; `integers`: whether its layers are."
    high_precision: str = ""
    "What stays float, in words."

    @property
    def fixed(self) -> bool:
        """Whether no axis is free."""
        return self.dynamic is not None and not any(self.dynamic.values())

    def traced(self, sample: Sample) -> dict[str, Any]:
        """A call to trace by: free axes need two entries or more, and different ones different numbers of them."""
        return dict(sample.call) if self.fixed else {name: t.repeat_interleave(3, 0) for name, t in sample.call.items()}
