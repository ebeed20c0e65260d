"""Collects what a solver needs to know about every matrix of a block, in one forward pass over the block's inputs."""

import torch
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.quant.attention import HeadMoments, autocast_type
from smidgen.quant.blocks import Block
from smidgen.quant.stats import Stats, add_gram, symmetrize


@torch.no_grad()
def collect(block: Block, needs: frozenset[str]) -> dict[str, Stats]:
    """Statistics of every matrix by name.

    `needs` holds "h_in" for E[x x^T] of every layer's input, and "h_out" for the attention-aware factors of
    queries, keys and values (aespa 3.2, BoA 4.1).
    """
    if not needs:
        return {}
    matrices = block.matrices()
    grams = InputGrams({m.layer: m.module for m in matrices})
    heads = None
    if "h_out" in needs:
        if block.attention is None:
            raise UserError("attention-aware statistics are not known for this family of models; use --method gptq")
        heads = HeadMoments(block.module.get_submodule(block.attention.module), block.attention, grams.latest_input)
    try:
        for batch in block.hidden:
            block.run(batch)
    finally:
        grams.close()
        if heads:
            heads.close()
    stats = {m.name: grams.stats(m.layer) for m in matrices}
    if heads:
        h_in = next(stats[m.name].h_in for m in matrices if m.role == "query")
        roles = heads.stats(h_in, block.arguments.get("position_embeddings"))
        stats |= {m.name: roles[m.role] for m in matrices if m.role}
    return stats


class InputGrams:
    """E[x x^T] of the input of every layer; layers fed the same tensor share one."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.leader: dict[str, str] = {}
        self.total: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.finished: dict[str, Stats] = {}
        self.latest: tuple[Tensor | None, str] = (None, "")
        self.handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in layers.items()]

    def _hook(self, name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if x is not self.latest[0]:
                self.latest = (x, name)
                self._add(name, autocast_type(x).flatten(0, -2))
            self.leader[name] = self.latest[1]

        return hook

    def _add(self, name: str, rows: Tensor) -> None:
        if name not in self.total:
            width = rows.shape[-1]
            self.total[name] = torch.zeros(width, width, device=rows.device, dtype=torch.float32)
            self.tokens[name] = 0
        add_gram(self.total[name], rows)
        self.tokens[name] += len(rows)

    def latest_input(self) -> Tensor:
        """The tensor the last layer that ran was given: during attention, the input of its projections."""
        assert self.latest[0] is not None
        return self.latest[0]

    def stats(self, layer: str) -> Stats:
        """The layer's input statistics, one H for all its rows; the same object for layers fed the same tensor."""
        if layer not in self.leader:
            raise UserError(f"{layer} was never called on the calibration data (a mixture of experts?); this architecture is not supported")
        leader = self.leader[layer]
        if leader not in self.finished:
            self.finished[leader] = Stats(symmetrize(self.total[leader])[None] / self.tokens[leader], tokens=self.tokens[leader])
        return self.finished[leader]

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.latest = (None, "")
