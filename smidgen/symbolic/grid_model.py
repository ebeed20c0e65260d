"""The paper's models: tokens are embedded, laid out on a grid, and a network over the grid answers."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smidgen.errors import UserError
from smidgen.symbolic.networks import Embedding, TopList
from smidgen.symbolic.seq2grid import Layout, Seq2Grid, entropy


class GridModel(nn.Module):
    """Embedding, seq2grid, a network over the grid, a readout: the paper's models, trained from answers alone.

    `guided` ones lay out by actions that come with the data.
    """

    def __init__(
        self, embedding: Embedding, module: Seq2Grid, network: nn.Module, readout: nn.Module, smoothing: float = 0.0, guided: bool = False
    ) -> None:
        super().__init__()
        self.embedding, self.module, self.network, self.readout = embedding, module, network, readout
        self.smoothing, self.guided = smoothing, guided
        self.to(memory_format=torch.channels_last)  # pyright: ignore  an overload of nn.Module.to; the grid is written that way

    @property
    def columns(self) -> int | None:
        """Slots that answer."""
        return self.module.columns if isinstance(self.readout, TopList) else None

    def forward(
        self, tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], actions: Int[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch *columns symbols"]:
        """Logits of slots, or of labels."""
        return self.readout(self.network(self.module(self.embedding(tokens, mask), mask, self.given(actions))))

    def layout(
        self, tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], actions: Int[Tensor, "batch time"] | None = None
    ) -> Layout:
        """Where the tokens go."""
        return self.module.layout(self.embedding(tokens, mask), mask, self.given(actions))

    def given(self, actions: Tensor | None) -> Tensor | None:
        """Actions to be taken from the data."""
        if self.guided and actions is None:
            raise UserError("a guided model lays out by actions that come with the data, and this data has none; train without guidance")
        return actions if self.guided else None

    def loss(
        self,
        tokens: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        target: Int[Tensor, "batch *columns"],
        actions: Int[Tensor, "batch time"] | None = None,
        sharpness: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Mean over all slots, padding included, or over the batch; plus `sharpness` times the entropy of the actions (ours)."""
        layout = self.layout(tokens, mask, actions)
        logits = self.readout(self.network(layout.grid))
        loss = cross_entropy(logits.flatten(0, -2), target.flatten(), label_smoothing=self.smoothing)
        return loss + sharpness * entropy(layout.actions, mask) if sharpness else loss
