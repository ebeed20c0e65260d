"""Z-Fold: a step size of rank one that costs nothing at run time (Jeon et al., EMNLP 2023; aespa 3.2).

A row's step s becomes s zeta_j in column j. The factors zeta need not be stored: those of layers that share an input fold into what
makes it, a norm's gain or the rows of a linear layer, so the integers and their plain row scales are all that changes. Folded, this is
just another model with the same output; any solver then runs on it.

zeta is found by alternation. For fixed codes the best factor of column j is the least-squares fit of the weights w_j on the values v_j
(without zeta); for fixed factors every code is rounded anew and every scale fitted by least squares. Columns are weighed by 1 / U_jj^2,
what an error in them costs after compensation (`gptq.scale_metric`), so each of the three steps lowers one loss,

    sum_ij (w_ij - zeta_j s_i (c_ij - z_i))^2 / U_jj^2.

The authors search the scales on a grid in every round and weigh errors in two ways; here the search is left to the solver, at the end.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smidgen.grid import Grid, expand
from smidgen.quant.blocks import Block, Matrix
from smidgen.quant.families import Fold
from smidgen.quant.linear import LINEAR
from smidgen.quant.solvers.hessian import activation_order, damped, inverse_factor, permuted
from smidgen.quant.stats import Stats

ROUNDS = 30
ENOUGH = 1e-3  # a round that lowers the loss by less, relatively, is the last
SMALLEST = 1e-3  # least factor through a relu, which passes positive ones only


@torch.no_grad()
def fold(block: Block, stats: dict[str, Stats], grid: Grid, damp: float, dtype: torch.dtype) -> None:
    """Folds factors in every legal place of a block, in place; `stats` become those of the folded block.

    Gains are kept in `dtype`, the type the model stores, and a factor is what the rounded gain says, so that folding stays exact.
    """
    assert block.family is not None
    for site in block.family.folds:
        if not foldable(block, site):
            continue
        after = [m for m in block.matrices() if m.layer in site.after]
        source = channels(block, site, after[0].weight().shape[1])
        zeta = factors([(m.weight(), stats[m.name]) for m in after], source, grid, damp, positive=site.through == "relu")
        zeta = move(block, site, zeta, stats, dtype)
        rescale([stats[m.name] for m in after], zeta[source])


def foldable(block: Block, site: Fold) -> bool:
    """Whether a factor passes: not where norms stay in the residual stream, nor through a relu that in this model is something else."""
    if site.through == "relu":
        return any(isinstance(m, nn.ReLU) for m in block.module.modules())
    return isinstance(block.module.get_submodule(site.before), LINEAR) or block.pre_norm()


def channels(block: Block, site: Fold, columns: int) -> Int[Tensor, "columns"]:
    """The channel every column reads: its own, but query heads that share a value head read the same."""
    index = torch.arange(columns, device=block.hidden.device)
    if site.through != "heads":
        return index
    assert block.family is not None
    dim = vars(block.module.get_submodule(block.family.attention.module))["head_dim"]
    copies = columns // len(_rows_before(block, site).weight())
    return index // (copies * dim) * dim + index % dim


def _rows_before(block: Block, site: Fold) -> Matrix:
    """The rows of the linear layer before; of a fused one those of the values."""
    return [m for m in block.matrices() if m.layer == site.before][-1]


def factors(
    layers: list[tuple[Float[Tensor, "_ columns"], Stats]], source: Int[Tensor, "columns"], grid: Grid, damp: float, positive: bool
) -> Float[Tensor, "channels"]:
    """zeta of layers that share an input."""
    zeta = torch.ones(int(source.max()) + 1, dtype=layers[0][0].dtype, device=source.device)
    problems = [_Rows(w, stats, grid, damp) for w, stats in layers]
    best = zeta
    least = sum(p.round(zeta[source]) for p in problems)
    for _ in range(ROUNDS):
        parts = zip(*(p.columns() for p in problems), strict=True)
        sums = [torch.zeros_like(zeta).index_add_(0, source, torch.stack(part).sum(0)) for part in parts]
        zeta = torch.where(sums[1] > 0, sums[0] / sums[1], 1.0)
        zeta = zeta.clamp(min=SMALLEST) if positive else torch.where(zeta == 0, 1.0, zeta)
        loss = sum(p.round(zeta[source]) for p in problems)
        if not loss < least:
            break
        done, best, least = loss > (1 - ENOUGH) * least, zeta, loss
        if done:
            break
    return best


class _Rows:
    """One layer's part of the alternation."""

    def __init__(self, w: Float[Tensor, "out columns"], stats: Stats, grid: Grid, damp: float) -> None:
        self.grid = grid
        self.w = w.unflatten(0, (stats.heads(), -1))
        h = damped(stats.h_in.to(w.dtype), damp)
        order = activation_order(h)
        u = inverse_factor(permuted(h, order, order), w.dtype)
        remaining = u.diagonal(dim1=-2, dim2=-1).pow(-2)
        self.cost = torch.empty_like(remaining).scatter_(-1, order, remaining)
        self.scale, self.zero = grid.fit(self.w, self.cost)
        self.codes = torch.empty_like(self.w)

    def round(self, zeta: Float[Tensor, "columns"]) -> Tensor:
        """Rounds on the factors `zeta`, refits the scales; returns the loss."""
        columns = self.w.shape[-1]
        self.codes = self.grid.encode(self.w / zeta, expand(self.scale, columns), expand(self.zero, columns))
        levels = (self.codes - expand(self.zero, columns)).mul_(zeta)
        weighted = levels * self.cost[:, None, :]
        top, bottom = ((weighted * t).unflatten(-1, (self.scale.shape[-1], -1)).sum(-1) for t in (self.w, levels))
        self.scale = torch.where((bottom > 0) & (top > 0), top / bottom, self.scale)
        error = self.w - levels.mul_(expand(self.scale, columns))
        return (error.square_() @ self.cost[..., None]).sum()

    def columns(self) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of every column's least-squares factor."""
        values = self.grid.decode(self.codes, expand(self.scale, self.w.shape[-1]), expand(self.zero, self.w.shape[-1]))
        return tuple((self.cost * (values * t).sum(-2)).sum(0) for t in (self.w, values))  # type: ignore[return-value]


def move(block: Block, site: Fold, zeta: Float[Tensor, "channels"], stats: dict[str, Stats], dtype: torch.dtype) -> Tensor:
    """Moves factors out of the columns of the layers of a site into what comes before; returns those it really moved."""
    after = [m for m in block.matrices() if m.layer in site.after]
    source = channels(block, site, after[0].weight().shape[1])
    zeta = absorb(block, site, zeta, stats, dtype)
    for matrix in after:
        matrix.weight().div_(zeta[source])
    return zeta


def absorb(block: Block, site: Fold, zeta: Float[Tensor, "channels"], stats: dict[str, Stats], dtype: torch.dtype) -> Tensor:
    """Multiplies what comes before by zeta, and `stats` of it if there are any; returns the factors it really took."""
    before = block.module.get_submodule(site.before)
    if isinstance(before, LINEAR):
        rows = _rows_before(block, site)
        rows.weight().mul_(zeta[:, None])
        if before.bias is not None:
            before.bias[rows.rows].mul_(zeta)
        factor = stats[rows.name].h_out if stats else None
        if factor is not None:
            factor.div_((zeta[:, None] * zeta).view(len(factor), len(factor[0]), len(factor), -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        return zeta
    zeta = storable(before.get_parameter("weight"), zeta, dtype, site.offset)
    for name, parameter in before.named_parameters():  # gain and bias
        offset = site.offset if name == "weight" else 0.0
        parameter.add_(offset).mul_(zeta).sub_(offset)
    return zeta


def storable(
    weight: Float[Tensor, "channels"], zeta: Float[Tensor, "channels"], dtype: torch.dtype, offset: float = 0.0
) -> Float[Tensor, "channels"]:
    """The factors nearest to zeta with which a norm's weight can be stored in `dtype`; a gain (weight + offset) of 0 takes none."""
    gain = weight + offset
    folded = (gain * zeta - offset).to(dtype).to(gain.dtype) + offset
    return torch.where((gain != 0) & (folded != 0), folded / gain, 1.0)


def rescale(stats: list[Stats], zeta: Float[Tensor, "columns"]) -> None:
    """Moments of inputs that are zeta times what they were; a moment that several layers share is scaled once."""
    moments = [m for s in stats for part in (s, s.held) if part for m in (part.h_in, part.cross) if m is not None]
    for moment in {id(m): m for m in moments}.values():
        moment.mul_(zeta[:, None] * zeta)
