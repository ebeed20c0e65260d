"""Training questions on the device, drawn by number, so that a run that goes on from a checkpoint draws on where it stopped."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smidgen.symbolic.decoders import to_slots
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.tasks import NOOP, Batch

SHORTEST = 0.1  # share of the questions a length curriculum starts with


class Drawn(NamedTuple):
    """A batch of training."""

    tokens: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    target: Int[Tensor, "batch *slots"]
    "In the order the model answers in."
    actions: Int[Tensor, "batch time"] | None
    progress: float
    "Share of the training that is over, 0 .. 1."


class Pool:
    """Questions sorted by length, kept without their padding; pool(i) is batch i of `count`, drawn with replacement.

    buckets      a batch is of one of so many parts of like length; with 1 it mixes all lengths, as batch norm would have it
    curriculum   over this share of the training the longest questions drawn grow from the shortest tenth to all
    """

    def __init__(
        self,
        questions: Batch,
        columns: int | None,
        size: int,
        count: int,
        device: torch.device,
        *,
        seed: int = 0,
        buckets: int = 1,
        curriculum: float = 0.0,
    ) -> None:
        order = np.argsort(questions.lengths, kind="stable")
        self.lengths = questions.lengths[order]
        spans = np.stack([np.cumsum(self.lengths) - self.lengths, self.lengths], 1)
        self.spans = torch.from_numpy(spans).to(device)  # start in `flat`, and length
        mask = questions.mask[order]
        target = questions.target if columns is None else to_slots(questions.target, columns)
        self.flat = torch.from_numpy(questions.tokens[order][mask].astype(np.int32)).to(device)
        self.flat_actions = None if questions.actions is None else torch.from_numpy(questions.actions[order][mask]).to(device)
        self.target = torch.from_numpy(target[order]).to(device)
        self.size, self.count, self.device, self.seed, self.buckets, self.curriculum = size, count, device, seed, buckets, curriculum

    def __call__(self, i: int) -> Drawn:
        """Batch i."""
        progress = i / self.count
        rng = np.random.default_rng([self.seed, i])
        among = self.among(progress)
        bucket = rng.integers(self.buckets)
        low, high = among * bucket // self.buckets, among * (bucket + 1) // self.buckets
        drawn = rng.integers(low, max(low + 1, high), self.size)
        index = torch.from_numpy(drawn).to(self.device)
        starts, lengths = self.spans[index].split(1, 1)
        place = torch.arange(int(self.lengths[drawn].max()), device=self.device)
        mask = place < lengths
        where = (starts + place).clamp_max(len(self.flat) - 1)
        tokens = self.flat[where].long() * mask
        actions = None if self.flat_actions is None else torch.where(mask, self.flat_actions[where], NOOP)
        return Drawn(tokens, mask, self.target[index], actions, progress)

    def among(self, progress: float) -> int:
        """How many of the questions, from the shortest on, are drawn from now."""
        share = 1.0 if progress >= self.curriculum else SHORTEST + (1 - SHORTEST) * progress / self.curriculum
        return max(1, round(share * len(self.lengths)))


class Training(nn.Module):
    """A model whose forward pass is its loss: what spreads a model over processes hears of forward passes only.

    `sharpen` (ours) is the weight, at the end, of the entropy of the actions; it grows from 0 with the training. Certain actions make crisp
    layouts, but blurred ones are also how a grid network without a global view learns what the whole question asks, so it costs accuracy
    where the readout has no other way to know.
    """

    def __init__(self, model: nn.Module, sharpen: float = 0.0) -> None:
        super().__init__()
        self.model, self.sharpen = model, sharpen
        self.graphs: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # meanwhile, the loss of (tokens, mask, target)

    def forward(self, drawn: Drawn) -> Float[Tensor, ""]:
        """Mean over the batch."""
        if isinstance(self.model, GridModel):
            return self.model.loss(drawn.tokens, drawn.mask, drawn.target, drawn.actions, self.sharpen * drawn.progress)
        if self.graphs is not None:
            return self.graphs(drawn.tokens, drawn.mask, drawn.target)
        return self.model.loss(drawn.tokens, drawn.mask, drawn.target)  # pyright: ignore  a model of MODELS
