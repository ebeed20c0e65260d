"""GPTQ: accurate post-training quantization (Frantar et al., arXiv 2210.17323).

Minimises  tr(dW H dW^T)  over the grid, one column at a time. With H^-1 = U^T U, U upper triangular:

    q_j = nearest(w_j);   e_j = (w_j - q_j) / U_jj;   W[:, j:] -= e_j U[j, j:]

All rows share one column order, so U is factorised once; columns are done in blocks whose effect on the rest is
one matrix product ("lazy blocks"). Identities: W - W_hat = E U and the damped loss is ||E||^2.

Heads are a batch: a Stats with one H_in per head (the values' attention-weighted Hessian) is solved head by head
at once. H_out is not read; `boa.py` is this with rows that interact as well.

The original code forms U with three factorisations; `inverse_factor` needs one, in float64, and a triangular inverse.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight, expand, metric_of
from smidgen.quant.solvers.rtn import check_finite
from smidgen.quant.stats import Stats

BLOCK = 128  # columns whose effect on the rest is applied at once
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

    needs: ClassVar[frozenset[str]] = frozenset({"h_in"})

    def __post_init__(self) -> None:
        if self.act_order and not self.static_groups:
            raise UserError("act_order takes columns out of their groups, so it needs static_groups")

    def __call__(self, w: Float[Tensor, "out in"], stats: Stats, grid: Grid) -> QWeight:
        """Solves for the codes; computes in float32, or float64 where the weights are."""
        w, h = prepare(w, stats, self.damp)
        order = activation_order(h) if self.act_order else identity_order(h)
        u = inverse_factor(permuted(h, order, order), w.dtype)
        metric = scale_metric(self.scales, h, u, order)
        columns = order[:, None, :].expand_as(w)
        if self.static_groups:
            scale, zero = grid.fit(w, metric)
            steps = [expand(t, w.shape[-1]).gather(-1, columns) for t in (scale, zero)]
            codes = solve_columns(w.gather(-1, columns), u, grid, *steps)
        else:
            codes, scale, zero = solve_groups(w, u, metric, grid)
        return as_qweight(torch.empty_like(codes).scatter_(-1, columns, codes), scale, zero, grid)


def prepare(w: Tensor, stats: Stats, damp: float) -> tuple[Float[Tensor, "heads rows in"], Float[Tensor, "one_or_heads in in"]]:
    """Weights split into heads, with dead columns cleared, and the damped Hessian in their type.

    A column no calibration token ever excited has a zero row in H: its weights become 0 and its diagonal 1.
    """
    w = w.unflatten(0, (stats.heads(), -1)).clone()
    w = w if w.dtype == torch.float64 else w.float()
    check_finite(w, "weights")
    check_finite(stats.h_in, "second moments of the inputs")
    dead = stats.h_in.diagonal(dim1=-2, dim2=-1) == 0
    w.masked_fill_(dead[:, None, :], 0)
    return w, damped(stats.h_in.to(w.dtype), damp)


def damped(h: Float[Tensor, "*n d d"], damp: float) -> Float[Tensor, "*n d d"]:
    """h plus `damp` times its mean diagonal; zeros of the diagonal, which nothing excited, become 1 first."""
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    return h.diagonal_scatter(diagonal + damp * diagonal.mean(-1, keepdim=True), dim1=-2, dim2=-1)


def inverse_factor(h: Float[Tensor, "*n d d"], dtype: torch.dtype) -> Float[Tensor, "*n d d"]:
    """Upper triangular U with h^-1 = U^T U.

    h = R R^T with R upper triangular is an ordinary Cholesky factorisation of h read backwards; U = R^-1.
    """
    backwards = h.double().flip(-1, -2)
    lower, failed = torch.linalg.cholesky_ex(backwards)
    if bool(failed.any()):
        raise UserError("a Hessian is not positive definite; raise the damping (--gptq.damp, --boa.damp) or use more calibration data")
    r = lower.flip(-1, -2).to(dtype)
    eye = torch.eye(h.shape[-1], dtype=r.dtype, device=r.device)
    return torch.linalg.solve_triangular(r, eye.expand_as(r), upper=True)


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


def identity_order(h: Float[Tensor, "n d d"]) -> Tensor:
    """Columns as they are, for every head."""
    return torch.arange(h.shape[-1], device=h.device).expand(h.shape[0], -1)


def activation_order(h: Float[Tensor, "n d d"]) -> Tensor:
    """Indices by descending diagonal, for every head."""
    return h.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)


def permuted(h: Float[Tensor, "n r c"], rows: Tensor, columns: Tensor) -> Float[Tensor, "n r c"]:
    """h[n, rows[n], :][:, columns[n]] for every head."""
    h = h.gather(-2, rows[:, :, None].expand_as(h))
    return h.gather(-1, columns[:, None, :].expand_as(h))


def solve_columns(
    w: Float[Tensor, "heads rows in"],
    u: Float[Tensor, "one_or_heads in in"],
    grid: Grid,
    scale: Float[Tensor, "heads rows in"],
    zero: Float[Tensor, "heads rows in"],
) -> Float[Tensor, "heads rows in"]:
    """The column loop; overwrites `w`."""
    codes = []
    for start in range(0, w.shape[-1], BLOCK):
        block = slice(start, start + BLOCK)
        done, errors = solve_block(w[..., block], u[:, block, block], grid, scale[..., block], zero[..., block])
        w[..., start + BLOCK :] -= errors @ u[:, block, start + BLOCK :]
        codes.append(done)
    return torch.cat(codes, -1)


def solve_block(w: Tensor, u: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors E of one block of columns."""
    # columns first and contiguous: a step then touches whole lines of memory
    w, scale, zero = (t.permute(2, 0, 1).contiguous() for t in (w, scale, zero))
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    diagonal = u.diagonal(dim1=-2, dim2=-1)
    for j in range(w.shape[0]):
        codes[j] = grid.encode(w[j], scale[j], zero[j])
        errors[j] = (w[j] - grid.decode(codes[j], scale[j], zero[j])) / diagonal[:, j, None]
        w[j + 1 :].addcmul_(u[:, j, j + 1 :].T[..., None], errors[j], value=-1)
    return codes.permute(1, 2, 0), errors.permute(1, 2, 0)


def solve_groups(w: Tensor, u: Tensor, metric: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The column loop with each group's grid fitted when its first column is reached."""
    columns = w.shape[-1]
    width = columns // grid.groups(columns)
    codes, scales, zeros = [], [], []
    for start in range(0, columns, width):
        group = slice(start, start + width)
        scale, zero = grid.fit_group(w[..., group], metric_of(metric, group, w.ndim))
        done, errors = solve_block(w[..., group], u[:, group, group], grid, expand(scale, width), expand(zero, width))
        w[..., start + width :] -= errors @ u[:, group, start + width :]
        codes.append(done)
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(codes, -1), torch.cat(scales, -1), torch.cat(zeros, -1)


def as_qweight(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> QWeight:
    """Heads stacked on rows again."""
    return QWeight(codes.flatten(0, 1).to(torch.uint8), scale.flatten(0, 1), zero.flatten(0, 1), grid)
