"""GPTQ: accurate post-training quantization (Frantar et al., arXiv 2210.17323).

Minimises  tr(dW H dW^T)  over the grid, one column at a time. With H^-1 = U^T U, U upper triangular:

    q_j = nearest(w_j);   e_j = (w_j - q_j) / U_jj;   W[:, j:] -= e_j U[j, j:]

All rows share one column order, so U is factorised once; columns are done in blocks whose effect on the rest is
one matrix product ("lazy blocks"). Identities: W - W_hat = E U and the damped loss is ||E||^2.

Heads are a batch: a Stats with one H_in per head (the values' attention-weighted Hessian) is solved head by head
at once. H_out is not read; `boa.py` is this with rows that interact as well.

The original code forms U with three factorisations; `hessian.inverse_factor` needs one, in float64, and a triangular inverse.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight, expand, metric_of
from smidgen.quant.replay import replayed
from smidgen.quant.solvers.descent import refine
from smidgen.quant.solvers.hessian import activation_order, identity_order, inverse_factor, permuted, prepare
from smidgen.quant.solvers.mismatch import aim
from smidgen.quant.stats import Stats

DAMPS = 0.003, 0.01, 0.03, 0.1  # tried by `choose`
BLOCK = 128  # columns whose effect on the rest is applied at once
Heads = Float[Tensor, "heads rows in"]
Scales = Literal["minmax", "hessian", "compensated"]


@dataclass(frozen=True)
class GPTQ:
    """Column-wise rounding with error compensation."""

    damp: float = 0.01
    "Added to the diagonal of the Hessian, as a fraction of its mean."
    act_order: bool = True
    "Columns with the largest second moment first."
    static_groups: bool = True
    "Scales from the original weights; otherwise each group is fitted to the compensated weights it meets."
    scales: Scales = "compensated"
    "How scale and zero are chosen: see `scale_metric`."
    passes: int = 0
    "Rounds of refitted scales and descent over the codes afterwards: see `descent.py`."
    mismatch: Literal["none", "inputs", "residual"] = "none"
    "Correct for what earlier layers did to the inputs, or to the residual stream as well: see `mismatch.py`."
    zfold: bool = False
    "Fold a factor per input channel into the layer before: see `transforms/zfold.py`."
    choose: bool = False
    "Take damping and column order from the loss on held-out sequences, layer by layer, instead of as given."

    def __post_init__(self) -> None:
        if self.act_order and not self.static_groups:
            raise UserError("act_order takes columns out of their groups, so it needs static_groups")
        if not self.damp >= 0:
            raise UserError(f"damp must not be negative, got {self.damp}")
        if self.passes < 0:
            raise UserError(f"passes must not be negative, got {self.passes}")

    @property
    def needs(self) -> frozenset[str]:
        """What `collect` must gather."""
        extra = {"none": set(), "inputs": {"cross", "held"}, "residual": {"cross", "held", "residual"}}
        return frozenset({"h_in"} | extra[self.mismatch] | ({"held"} if self.choose else set()))

    def __call__(self, w: Float[Tensor, "out in"], stats: Stats, grid: Grid) -> QWeight:
        """Solves for the codes; computes in float32, or float64 where the weights are."""
        if self.choose:
            w = self.aim(w, stats)
            return self.chosen(w, stats, grid)(w, stats, grid)
        w, h = prepare(self.aim(w, stats), stats, self.damp)
        codes, scale, zero, _ = self.rounded(w, h, grid)
        if self.passes:
            codes, scale = refine(w, h, None, codes, scale, zero, grid, self.passes)
        return as_qweight(codes, scale, zero, grid)

    def chosen(self, w: Float[Tensor, "out in"], stats: Stats, grid: Grid) -> "GPTQ":
        """This solver with the damping and order that lose least on the held-out sequences when solved on the others."""
        if stats.held is None:
            raise UserError("choose needs statistics of held-out sequences")
        fitted, held = stats.fitted(), replace(stats.held, h_out=stats.h_out)
        orders = (True, False) if self.static_groups else (False,)
        options = [{"damp": d, "act_order": o, "choose": False, "mismatch": "none"} for d in DAMPS for o in orders]
        return replace(self, **min(options, key=lambda o: held.loss(replace(self.quick(), **o)(w, fitted, grid).dequantize() - w)))

    def quick(self) -> "GPTQ":
        """What is tried for a choice."""
        return replace(self, passes=0)

    def aim(self, w: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        """The weights to approximate."""
        return w if self.mismatch == "none" else aim(w, stats, self.damp)

    def rounded(self, w: Heads, h: Float[Tensor, "one_or_heads in in"], grid: Grid) -> tuple[Heads, Tensor, Tensor, Heads]:
        """Codes, scales, zeros, and every weight as it was just before it was rounded."""
        order = activation_order(h) if self.act_order else identity_order(h)
        u = inverse_factor(permuted(h, order, order), w.dtype)
        metric = scale_metric(self.scales, h, u, order)
        columns = order[:, None, :].expand_as(w)
        if self.static_groups:
            scale, zero = grid.fit(w, metric)
            steps = [expand(t, w.shape[-1]).gather(-1, columns) for t in (scale, zero)]
            codes, errors = solve_columns(w.gather(-1, columns), u, grid, *steps)
        else:
            codes, errors, scale, zero = solve_groups(w.clone(), u, metric, grid)
        errors = errors * u.diagonal(dim1=-2, dim2=-1)[:, None, :]  # of rounding itself
        codes, errors = (torch.empty_like(t).scatter_(-1, columns, t) for t in (codes, errors))
        values = grid.decode(codes, expand(scale, w.shape[-1]), expand(zero, w.shape[-1]))
        return codes, scale, zero, values + errors


def scale_metric(scales: Scales, h: Float[Tensor, "n d d"], u: Float[Tensor, "n d d"], order: Int[Tensor, "n d"]) -> Tensor | None:
    """What the search of scale and zero minimises, for `Grid.fit`.

    minmax       nothing: the full range of the weights
    hessian      e H e^T, e the error of rounding to nearest (the authors of aespa and BoA)
    compensated  sum_j (e_j / U_jj)^2: the loss column-wise rounding ends with, since that is exactly the sum of its
                 scaled errors, taking e from the weights as they are before compensation. No product with H is
                 needed, so it costs d instead of d^2 per candidate and row.
    """
    if scales == "minmax":
        return None
    if scales == "hessian":
        return h
    remaining = u.diagonal(dim1=-2, dim2=-1).pow(-2)
    return torch.empty_like(remaining).scatter_(-1, order, remaining)


def solve_columns(w: Heads, u: Float[Tensor, "one_or_heads in in"], grid: Grid, scale: Heads, zero: Heads) -> tuple[Heads, Heads]:
    """The column loop: codes and scaled errors E; overwrites `w`."""
    codes, errors = [], []
    for start in range(0, w.shape[-1], BLOCK):
        block = slice(start, start + BLOCK)
        done, e = solve_block(w[..., block], u[:, block, block], grid, scale[..., block], zero[..., block])
        w[..., start + BLOCK :] -= e @ u[:, block, start + BLOCK :]
        codes.append(done)
        errors.append(e)
    return torch.cat(codes, -1), torch.cat(errors, -1)


def solve_block(w: Tensor, u: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors E of one block of columns."""
    # columns first and contiguous: a step then touches whole lines of memory
    w, scale, zero = (t.permute(2, 0, 1).contiguous() for t in (w, scale, zero))
    codes, errors = column_by_column(w, u, grid, scale, zero)
    return codes.permute(1, 2, 0), errors.permute(1, 2, 0)


@replayed
def column_by_column(w: Tensor, u: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """`solve_block` of columns that come first; overwrites `w`."""
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    diagonal = u.diagonal(dim1=-2, dim2=-1)
    for j in range(w.shape[0]):
        codes[j] = grid.encode(w[j], scale[j], zero[j])
        errors[j] = (w[j] - grid.decode(codes[j], scale[j], zero[j])) / diagonal[:, j, None]
        w[j + 1 :].addcmul_(u[:, j, j + 1 :].T[..., None], errors[j], value=-1)
    return codes, errors


def solve_groups(w: Heads, u: Tensor, metric: Tensor | None, grid: Grid) -> tuple[Heads, Heads, Tensor, Tensor]:
    """The column loop with each group's grid fitted when its first column is reached: codes, E, scales, zeros."""
    columns = w.shape[-1]
    width = grid.fitted(columns)
    parts = []
    for start in range(0, columns, width):
        group = slice(start, start + width)
        scale, zero = grid.fit(w[..., group], metric_of(metric, group, w.ndim))
        codes, errors = solve_block(w[..., group], u[:, group, group], grid, expand(scale, width), expand(zero, width))
        w[..., start + width :] -= errors @ u[:, group, start + width :]
        parts.append((codes, errors, scale, zero))
    codes, errors, scale, zero = (torch.cat(t, -1) for t in zip(*parts, strict=True))
    return codes, errors, scale, zero


def as_qweight(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> QWeight:
    """Heads stacked on rows again."""
    return QWeight(codes.flatten(0, 1).to(torch.uint8), scale.flatten(0, 1), zero.flatten(0, 1), grid)
