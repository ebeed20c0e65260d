"""seq2grid: a sequence of tokens laid out on a grid of cells by three list actions, all of it differentiable.

Kim, Nam, Kim, Jung, "Neural Sequence-to-grid Module for Learning Symbolic Rules", AAAI 2021, arXiv 2101.04921. An encoder reads the
tokens and gives each one a probability for every action; the task's loss is all that teaches them.

    x_t          embedding of token t = 1 .. T, C wide
    u_t, p_t, n_t   probabilities of its actions: top-list-update, new-list-push, no-op; their sum is 1
    G            grid, H rows of W slots; row 0 is the top list, slot 0 of a row its newest token; G_0 = 0

    TLU(G, x)    row 0 becomes x, G[0,0], ..., G[0,W-2]
    NLP(G, x)    row 0 becomes x, 0, ..., 0; row h the old row h-1
    G_t = u_t TLU(G_{t-1}, x_t) + p_t NLP(G_{t-1}, x_t) + n_t G_{t-1}                                    `unroll`: the paper's definition

Written tokens only move, so the grid is a weighted sum of embeddings, and the weights need no C:

    G_T[h,w] = sum_i M_i[h,w] x_i,     M_i[h,w] = (u_i + p_i) f_i[h,w]                                   `weights`, `write`

where f_i[h,w] is the probability that what lies at (0,0) after step i ends at (h,w). Read the actions from the last one backwards: to end
in row h there must be h pushes, during which nothing else matters; after them (in reading order: before the first push) w updates and no
further push. So row h is a line of H + W places with a particle that starts at place H - h and walks up, one place at most for every
action read; places H .. H + W - 1 are the slots:

    y_0[k] = [k = H - h],     y_j[k] = a_j[k] y_{j-1}[k] + c_j[k] y_{j-1}[k-1],     f_i = y_{T-i}[H:]
    waiting, k < H:   a = u + n, c = p          entering, k = H:   a = n, c = p          walking, k > H:   a = n, c = u

The line is the same for all rows; T steps over H (H + W) numbers replace T steps over H W C of them, and one matrix product writes
the grid. With actions that are certain two counters do (`cells`): the row is the number of later pushes, the slot that of the updates
before the first of them.

    >>> tokens "582 13$", a push at the "1", updates elsewhere:      row 0:  $ 3 1        row 1:  (space) 2 8 5
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from smidgen.precision import has_triton
from smidgen.symbolic.networks import GRU
from smidgen.symbolic.tasks import NLP, NOOP, TLU

Actions = Float[Tensor, "batch time 3"]
Grid = Float[Tensor, "batch rows columns dim"]
Mode = Literal["soft", "hard"]


def update(grid: Grid, x: Float[Tensor, "batch dim"], action: Float[Tensor, "batch 3"]) -> Grid:
    """One step of the definition."""
    u, p, n = action[:, :, None, None, None].unbind(1)
    empty = grid[:, :1, 1:] * 0
    top = torch.cat([x[:, None, None], grid[:, :1, :-1]], 2)
    updated = torch.cat([top, grid[:, 1:]], 1)
    pushed = torch.cat([torch.cat([x[:, None, None], empty], 2), grid[:, :-1]], 1)
    return u * updated + p * pushed + n * grid


def unroll(actions: Actions, x: Float[Tensor, "batch time dim"], rows: int, columns: int) -> Grid:
    """The grid by its definition, step by step: what the other forms are checked against."""
    grid = x.new_zeros(len(x), rows, columns, x.shape[-1])
    for t in range(x.shape[1]):
        grid = update(grid, x[:, t], actions[:, t])
    return grid


def weights(actions: Actions, rows: int, columns: int) -> Float[Tensor, "batch time rows columns"]:
    """M: how much of every token each cell holds.

    >>> weights(torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.6, 0.2], [0.7, 0.1, 0.2]]]), 2, 3)[0, 0]
    tensor([[0.0300, 0.1350, 0.1050],
            [0.4200, 0.0150, 0.0000]])
    """
    u, p, n = actions.flip(1).mT[..., None, None].movedim(2, 0).unbind(2)  # each (time, batch, 1, 1), last token first
    a = torch.cat([(u + n).expand(-1, -1, 1, rows), n.expand(-1, -1, 1, columns)], -1)
    c = torch.cat([p.expand(-1, -1, 1, rows + 1), u.expand(-1, -1, 1, columns - 1)], -1)
    start = torch.eye(rows, device=u.device, dtype=u.dtype).flip(1)  # place H - h of row h: the anti-diagonal, one place further up
    start = pad(start, (1, columns - 1)).expand(1, u.shape[1], -1, -1)
    y = Walk.apply(a[:-1], c[:-1], pad(start, (0, 0) * 3 + (0, len(u) - 1)))
    return ((u + p) * y[..., rows:]).flip(0).movedim(0, 1)


def write(m: Float[Tensor, "batch time rows columns"], x: Float[Tensor, "batch time dim"]) -> Grid:
    """The grid: all cells in one product."""
    return (m.flatten(2).mT @ x).unflatten(1, m.shape[2:])


def cells(action: Int[Tensor, "batch time"], rows: int, columns: int) -> Int[Tensor, "batch time"]:
    """Where every token of certain actions ends: row * columns + slot, or rows * columns if it is not on the grid.

    Counters, sums and look-ups only, which every runtime has.
    """
    push, updates = action == NLP, (action == TLU).long()
    pushes = push.long().cumsum(1)
    later = updates.sum(1, keepdim=True) - updates.cumsum(1)  # updates after each token
    # of the k-th push; what are no pushes write the 0 that stands for "no push comes" on place 0, which no push has
    at_push = later.new_zeros(later.shape[0], later.shape[1] + 2).scatter(1, pushes * push, later * push)
    row, slot = pushes[:, -1:] - pushes, later - at_push.gather(1, pushes + 1)
    return torch.where((action != NOOP) & (row < rows) & (slot < columns), row * columns + slot, rows * columns)


def place(cell: Int[Tensor, "batch time"], x: Float[Tensor, "batch time dim"], rows: int, columns: int) -> Grid:
    """Every token at its cell; no two share one."""
    grid = x.new_zeros(x.shape[0], rows * columns + 1, x.shape[-1])
    grid = grid.scatter(1, cell[..., None].expand(-1, -1, x.shape[-1]), x)
    return grid[:, :-1].unflatten(1, (rows, columns))


class Walk(torch.autograd.Function):
    """y_0 = v_0,  y_j[k] = v_j[k] + a_j[k] y_{j-1}[k] + c_j[k] y_{j-1}[k-1]: a linear recurrence whose derivative is one like it.

    With g_j the derivative of the loss by y_j, and e_j the part of it that does not come through y_{j+1},

        g_j[k] = e_j[k] + a_{j+1}[k] g_{j+1}[k] + c_{j+1}[k+1] g_{j+1}[k+1]

    which is the same recurrence, time and places turned around.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Float[Tensor, "steps batch 1 places"],
        c: Float[Tensor, "steps batch 1 places"],
        v: Float[Tensor, "steps+1 batch rows places"],
    ) -> Float[Tensor, "steps+1 batch rows places"]:
        """All y."""
        y = walk(a, c, v)
        ctx.save_for_backward(a, c, y)
        return y

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By a, c and v."""
        a, c, y = ctx.saved_tensors
        turned = Walk.apply(a.flip(0, -1), pad(c.flip(0, -1)[..., :-1], (1, 0)), e.flip(0, -1))
        g = turned.flip(0, -1)
        return (g[1:] * y[:-1]).sum(2, keepdim=True), (g[1:] * pad(y[:-1, ..., :-1], (1, 0))).sum(2, keepdim=True), g


def walk(a: Tensor, c: Tensor, v: Tensor) -> Tensor:
    """The recurrence of `Walk`; on a GPU in one kernel where there is Triton."""
    if v.is_cuda and has_triton():
        from smidgen.symbolic.walk_triton import walk_triton

        return walk_triton(a, c, v)
    return walk_steps(a, c, v)


def walk_steps(a: Tensor, c: Tensor, v: Tensor) -> Tensor:
    """Two operations a step."""
    y = torch.empty_like(v)
    y[0] = v[0]
    now, up, down = y.unbind(), y[..., 1:].unbind(), y[..., :-1].unbind()
    for j, (a_j, c_j, v_j) in enumerate(zip(a.unbind(), c[..., 1:].unbind(), v[1:].unbind(), strict=True)):
        torch.addcmul(v_j, a_j, now[j], out=now[j + 1])
        up[j + 1].addcmul_(c_j, down[j])
    return y


@dataclass(frozen=True)
class Layout:
    """How a batch was laid out; what a picture of it needs."""

    grid: Grid
    actions: Actions
    "TLU, NLP, no-op; padding has (0, 0, 1)."
    weights: Float[Tensor, "batch time rows columns"]
    "M: how much of every token each cell holds; rounded to 0 and 1 in hard mode."


class Seq2Grid(nn.Module):
    """Embeddings to a grid, for any network that reads one.

        Seq2Grid(dim, rows, columns)(embeddings, mask)      (batch, time, dim), (batch, time) -> (batch, rows, columns, dim)

    `encoder` maps (embeddings, mask) to states of the same shape; the paper's, three layers of GRU, by default. The embeddings themselves
    are written, not the states. `rows`, `columns` and `mode` are plain attributes: no parameter depends on them, so a trained module can
    write wider grids, or take the most probable action of each token ("hard").

    no_leak: the code's variant without no-op, whose probability is 0. Guided: `actions` given with the call are used instead of predicted.
    Autocast does not reach it: sums of small probabilities want all bits, and the time goes elsewhere.
    """

    def __init__(self, dim: int, rows: int, columns: int, encoder: nn.Module | None = None, *, no_leak: bool = False) -> None:
        super().__init__()
        self.rows, self.columns, self.no_leak = rows, columns, no_leak
        self.mode: Mode = "soft"
        self.encoder = GRU(dim, layers=3) if encoder is None else encoder
        self.action = nn.Linear(dim, 2 if no_leak else 3)
        nn.init.xavier_uniform_(self.action.weight)
        nn.init.zeros_(self.action.bias)

    def forward(
        self,
        embeddings: Float[Tensor, "batch time dim"],
        mask: Bool[Tensor, "batch time"],
        actions: Int[Tensor, "batch time"] | None = None,
    ) -> Grid:
        """The grid after the last token; padding, where the mask is false, leaves it as it is."""
        with torch.autocast(embeddings.device.type, enabled=False):
            x = embeddings.to(self.action.weight.dtype)
            if self.mode == "hard":
                chosen = self.probabilities(x, mask).argmax(-1) if actions is None else actions
                return place(cells(chosen, self.rows, self.columns), x, self.rows, self.columns)
            return write(weights(self.probabilities(x, mask, actions), self.rows, self.columns), x)

    def layout(
        self,
        embeddings: Float[Tensor, "batch time dim"],
        mask: Bool[Tensor, "batch time"],
        actions: Int[Tensor, "batch time"] | None = None,
    ) -> Layout:
        """The grid with what led to it."""
        with torch.autocast(embeddings.device.type, enabled=False):
            x = embeddings.to(self.action.weight.dtype)
            probabilities = self.probabilities(x, mask, actions)
            certain = one_hot(probabilities.argmax(-1), 3).to(x.dtype)
            m = weights(certain if self.mode == "hard" else probabilities, self.rows, self.columns)
            return Layout(write(m, x), probabilities, m)

    def probabilities(
        self,
        x: Float[Tensor, "batch time dim"],
        mask: Bool[Tensor, "batch time"],
        actions: Int[Tensor, "batch time"] | None = None,
    ) -> Actions:
        """Of every token's three actions."""
        if actions is None:
            p = self.action(self.encoder(x, mask)).softmax(-1)
            p = pad(p, (0, 3 - p.shape[-1]))
        else:
            p = one_hot(actions, 3).to(x.dtype)
        stay = one_hot(torch.full_like(mask, NOOP, dtype=torch.long), 3).to(x.dtype)
        return torch.where(mask[..., None], p, stay)


@contextmanager
def hard_layouts(module: Seq2Grid) -> Iterator[None]:
    """Hard mode meanwhile."""
    before, module.mode = module.mode, "hard"
    try:
        yield
    finally:
        module.mode = before


def entropy(layout_actions: Actions, mask: Bool[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """Mean over tokens of the entropy of their actions, in nats; 0 if every action is certain."""
    each = -torch.xlogy(layout_actions, layout_actions.clamp_min(1e-12)).sum(-1)
    return each[mask].mean()
