"""Collects what a solver needs to know about every matrix of a block.

Ordinarily that is one forward pass of the block before any of its layers is quantized, as in the papers. Where the inputs are
compared with the unquantized model's (`cross`), a layer must see what the quantized layers before it really send, or their
corrections would be made twice: then layers are taken in stages, those with the same input at once, and each stage is run after
the one before was solved. Attention is the expensive part of a pass and is computed twice, not once per stage.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.quant.attention import HeadMoments, Replay, autocast_type
from smidgen.quant.blocks import Block, Matrix
from smidgen.quant.families import Gated
from smidgen.quant.linear import weight_of
from smidgen.quant.stats import Moments, Stats

HELD = 8  # one sequence in so many is held out


def stages(block: Block, needs: frozenset[str]) -> Iterator[tuple[list[Matrix], dict[str, Stats]]]:
    """Matrices with their statistics, to be solved in place before the next are asked for.

    `needs` holds any of

    h_in         E[x x^T] of every layer's input
    h_out        the attention-aware factors of queries, keys and values (aespa 3.2, BoA 4.1)
    cross        how far inputs are from the unquantized model's; for a block that carries its stream
    residual     how far the residual stream is, besides
    held         the same moments of held-out sequences alone
    value_rows   W_O^T W_O for the values (BoA, equation 9)
    mlp_rows     the factor of gate and up rows that their product and the down projection imply
    centred      keys without their mean, which softmax cannot see
    first_order  the queries' exact first-order factor instead of K^T K
    """
    if "cross" not in needs:
        yield block.matrices(), collect(block, needs)
        return
    if block.reference is None or block.reference is block.hidden:
        raise UserError("the inputs of the unquantized model are needed but were not followed")
    with closing(InputMoments(block, Moments(), needs)) as inputs, closing(Replay(block.module, block.family)) as replay:
        leaders = inputs.order(block)
        for first, end in zip(leaders, [*leaders[1:], None], strict=True):
            inputs.recorded, inputs.stop = {first}, end
            matrices = [m for m in block.matrices() if inputs.leader[m.layer] == first]
            with closing(Observers(block, needs, inputs, matrices)) as observers:
                for batch, held in enumerate(held_out(block, needs)):
                    inputs.moments.held, replay.batch = held, batch
                    if first == leaders[0]:  # the float pass serves all stages, while all weights are still float
                        inputs.moments.reference = True
                        block.reference[batch] = block.run(block.reference[batch])
                        inputs.moments.reference = False
                    with suppress(Enough):
                        block.run(block.hidden[batch])
            yield matrices, observers.stats()
            replay.solved(matrices)
        inputs.close()
        for batch in range(len(block.hidden)):
            replay.batch = batch
            block.hidden[batch] = block.run(block.hidden[batch])


@torch.no_grad()
def collect(block: Block, needs: frozenset[str]) -> dict[str, Stats]:
    """Statistics of every matrix by name, in one pass; `needs` as in `stages`, without cross and residual."""
    if not needs:
        return {}
    with closing(InputMoments(block, Moments(), needs)) as inputs, closing(Observers(block, needs, inputs, block.matrices())) as observers:
        for batch, held in enumerate(held_out(block, needs)):
            inputs.moments.held = held
            out = block.run(block.hidden[batch])
            if block.reference is block.hidden:
                block.hidden[batch] = out
    return observers.stats()


def held_out(block: Block, needs: frozenset[str]) -> list[bool]:
    """Which batches are held out: the last ones, if any."""
    batches = len(block.hidden)
    if "held" not in needs:
        return [False] * batches
    if batches < 2:
        raise UserError("choices on held-out sequences need more calibration sequences; raise --sequences")
    held = max(1, batches // HELD)
    return [False] * (batches - held) + [True] * held


class Enough(Exception):
    """Ends a forward pass whose rest is not needed."""


class InputMoments:
    """E[x x^T] of the input of every layer; layers fed the same tensor share one."""

    def __init__(self, block: Block, moments: Moments, needs: frozenset[str]) -> None:
        self.moments = moments
        self.recorded: set[str] | None = None  # None: all
        self.stop: str | None = None
        self.leader: dict[str, str] = {}
        self.finished: dict[str, Stats] = {}
        self.latest: tuple[Tensor | None, str] = (None, "")
        self.handles = []
        self.stream: dict[str, Tensor] = {}
        self.after: dict[str, deque[Tensor]] = defaultdict(deque)
        for layer, module in {m.layer: m.module for m in block.matrices()}.items():
            norm = block.family.residual.get(layer) if block.family and "residual" in needs and block.pre_norm() else None
            self.handles.append(module.register_forward_pre_hook(self._hook(layer, add=norm is None)))
            if norm:
                self.handles.append(block.module.get_submodule(norm).register_forward_pre_hook(self._stream_hook(layer)))
                self.handles.append(module.register_forward_hook(self._residual_hook(layer)))

    def _hook(self, name: str, add: bool):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if x is not self.latest[0]:
                if name == self.stop and not self.moments.reference:
                    raise Enough
                self.latest = (x, name)
                if add and self._wanted(name):
                    rows = autocast_type(x).flatten(0, -2)
                    # without a norm before, x is the block's input, which its output will replace
                    rows = rows.clone() if self.moments.reference and rows.dtype == x.dtype else rows
                    self.moments.add(name, rows[None], len(rows))
            self.leader[name] = self.latest[1]

        return hook

    def _stream_hook(self, layer: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.stream[layer] = args[0].flatten(0, -2)

        return hook

    def _residual_hook(self, name: str):
        """For a layer whose output `y` is added to the residual stream: what the stream then lacks stands for what `x` does."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            after = self.stream[name] + y.flatten(0, -2)
            if self.moments.reference:
                self.after[name].append(after)
            elif self._wanted(name):
                rows = autocast_type(args[0]).flatten(0, -2)
                self.moments.add(name, rows[None], len(rows), lacking=self.after[name].popleft() - after)

        return hook

    def _wanted(self, name: str) -> bool:
        return self.recorded is None or name in self.recorded or self.moments.reference

    def order(self, block: Block) -> list[str]:
        """The layers that are first to read an input, in the order they run."""
        self.recorded = set()
        block.run(block.hidden[0])
        return list(dict.fromkeys(self.leader.values()))

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
            self.finished[leader] = self.moments.stats(leader)
        return self.finished[leader]

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.latest = (None, "")


class Observers:
    """What a pass watches besides the inputs of layers: attention heads, and the inside of a gated MLP."""

    def __init__(self, block: Block, needs: frozenset[str], inputs: InputMoments, matrices: list[Matrix]) -> None:
        if "h_out" in needs and block.family is None:
            raise UserError("attention-aware statistics are not known for this family of models; use --method gptq")
        self.inputs, self.matrices = inputs, matrices
        attention = "h_out" in needs and any(m.role == "query" for m in matrices)
        self.heads = HeadMoments(block, inputs.moments, inputs.latest_input, needs) if attention else None
        gated = block.family.gated if block.family and "mlp_rows" in needs else None
        watched = gated is not None and any(m.layer == f"{gated.module}.{gated.up}" for m in matrices)
        self.gates = GateMoments(block.module, gated, inputs.moments) if gated and watched else None

    def stats(self) -> dict[str, Stats]:
        """Of every matrix by name."""
        stats = {m.name: self.inputs.stats(m.layer) for m in self.matrices}
        if self.gates:
            stats |= {name: replace(stats[name], h_out=factor[None]) for name, factor in self.gates.factors().items()}
        if self.heads:
            roles = self.heads.stats(next(stats[m.name] for m in self.matrices if m.role == "query"))
            stats |= {m.name: roles[m.role] for m in self.matrices if m.role}
        return stats

    def close(self) -> None:
        """Takes the hooks off."""
        for observer in (self.heads, self.gates):
            if observer:
                observer.close()


class GateMoments:
    """How errors in the rows of gate and up projections meet in the output of a gated MLP, to first order.

    With y = W_down (f(g) * u):  dy = W_down (f(g) * du) and dy = W_down (u f'(g) * dg), so the row factors are
    W_down^T W_down  times, entry by entry,  E[f(g) f(g)^T]  for up and  E[(u f'(g)) (u f'(g))^T]  for gate.
    """

    def __init__(self, block: nn.Module, gated: Gated, moments: Moments) -> None:
        mlp = block.get_submodule(gated.module)
        self.names = {part: f"{gated.module}.{part}" for part in (gated.gate, gated.up)}
        self.gated, self.moments = gated, moments
        self.activation = mlp.get_submodule(gated.activation)
        self.down = weight_of(mlp.get_submodule(gated.down))
        self.gate: Tensor | None = None
        self.handles = [
            mlp.get_submodule(gated.gate).register_forward_hook(self._remember),
            mlp.get_submodule(gated.up).register_forward_hook(self._add),
        ]

    def _remember(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        self.gate = out

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert self.gate is not None
        with torch.enable_grad():
            gate = self.gate.detach().float().flatten(0, -2).requires_grad_()
            activated = self.activation(gate)
            (slope,) = torch.autograd.grad(activated.sum(), gate)
        for name, rows in ((self.gated.up, activated.detach()), (self.gated.gate, out.float().flatten(0, -2) * slope)):
            self.moments.add(f"{name} rows", rows[None], len(rows), paired=False)
        self.gate = None

    def factors(self) -> dict[str, Float[Tensor, "rows rows"]]:
        """The row factor of both layers."""
        seen = self.down.T @ self.down
        return {name: seen * self.moments.stats(f"{part} rows").h_in[0] for part, name in self.names.items()}

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
