"""BoA: attention-aware post-training quantization without backpropagation (Kim et al., arXiv 2406.13474).

GPTQ treats the rows of W as independent. In attention they are not: an error in one coordinate of a query meets
the same coordinate of every key. Per head, BoA minimises

    tr(H_out dW H_in dW^T),    queries: H_out = E[K^T K],   keys: H_out = E[Q^T Q],
                               values:  H_in = E[X A^T A X^T]  (H_out = I, as in the authors' code)

so rounding one weight is compensated by the later columns of its row *and* by the later rows of its column. With
H_in^-1 = U^T U and H_out^-1 = R^T R the authors go row by row, each row a GPTQ pass: d_h x d steps.

Here the same integers take d_h + d - 1 steps. Weight (r, c) is touched only by weights above and to the left of it,

    pre_rc = w_rc - sum_{r'<r} (R_r'r / R_r'r') D_r'c;    cur = pre_rc - sum_{c'<c} E_rc' U_c'c;
    q = nearest(cur);    D_rc = pre_rc - q;    E_rc = (cur - q) / U_cc,

so all weights with r + c = k are independent and form step k, for all heads at once:

        c ->                     step 0: a        (1 weight)
    r   a b c d                  step 1: b b      (2 weights)
    |   b c d e                  step 2: c c c
    v   c d e f                  ...

The damped loss is the sum of (E_rc / R_rr)^2. With H_out diagonal this is GPTQ, with both diagonal RTN.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight, expand
from smidgen.quant.replay import replayed
from smidgen.quant.solvers.descent import refine
from smidgen.quant.solvers.gptq import GPTQ, as_qweight, scale_metric
from smidgen.quant.solvers.hessian import activation_order, damped, identity_order, inverse_factor, permuted, prepare
from smidgen.quant.solvers.rtn import check_finite
from smidgen.quant.stats import Stats

STEPS = 128  # anti-diagonals whose effect on the rest is applied at once


@dataclass(frozen=True)
class BOA(GPTQ):
    """Rounding with compensation along columns and rows."""

    row_order: bool = True
    "Rows of each head with the largest H_out diagonal first."
    keys: Literal["raw", "centred", "first_order"] = "raw"
    "The queries' row factor: K^T K, the same of keys without their mean, or the first-order effect on the attention output."
    value_rows: bool = False
    "The values' row factor W_O^T W_O (equation 9); the authors' code has none."
    mlp_rows: bool = False
    "A row factor for the gate and up projections of gated MLPs as well."

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.static_groups:
            raise UserError("boa compensates whole heads, so it needs static_groups")

    @property
    def needs(self) -> frozenset[str]:
        """What `collect` must gather."""
        rows = {"value_rows": self.value_rows, "mlp_rows": self.mlp_rows, self.keys: self.keys != "raw"}
        return super().needs | {"h_out"} | {name for name, wanted in rows.items() if wanted}

    def __call__(self, w: Float[Tensor, "out in"], stats: Stats, grid: Grid) -> QWeight:
        """Solves for the codes; computes in float32, or float64 where the weights are."""
        if stats.h_out is None:
            return super().__call__(w, stats, grid)
        check_finite(stats.h_out, "second moments of the heads")
        if self.choose:
            w = self.aim(w, stats)
            return self.chosen(w, stats, grid)(w, stats, grid)
        w, h = prepare(self.aim(w, stats), stats, self.damp)
        h_out = damped(stats.h_out.to(w.dtype), self.damp)
        order = activation_order(h) if self.act_order else identity_order(h)
        rows = activation_order(h_out) if self.row_order else identity_order(h_out)
        u, r = inverse_factor(permuted(h, order, order), w.dtype), inverse_factor(permuted(h_out, rows, rows), w.dtype)
        scale, zero = grid.fit(w, scale_metric(self.scales, h, u, order))
        columns, rows = order[:, None, :].expand_as(w), rows[:, :, None].expand_as(w)

        def solved(scale: Tensor) -> Tensor:
            sorted_by = [t.gather(-1, columns).gather(-2, rows) for t in (w, *(expand(t, w.shape[-1]) for t in (scale, zero)))]
            codes = solve_wavefront(sorted_by[0], u, r, grid, *sorted_by[1:])
            codes = torch.empty_like(codes).scatter_(-2, rows, codes)
            return torch.empty_like(codes).scatter_(-1, columns, codes)

        codes = solved(scale)
        if self.passes:
            codes, scale = refine(w, h, h_out, codes, scale, zero, grid, self.passes, solved)
        return as_qweight(codes, scale, zero, grid)


@replayed
def solve_wavefront(
    w: Float[Tensor, "heads rows in"],
    u: Float[Tensor, "one_or_heads in in"],
    r: Float[Tensor, "heads rows rows"],
    grid: Grid,
    scale: Float[Tensor, "heads rows in"],
    zero: Float[Tensor, "heads rows in"],
) -> Float[Tensor, "heads rows in"]:
    """Codes, one anti-diagonal per step.

    Rows are kept upside down, so that an anti-diagonal is a diagonal and, by its strides, a view (`diagonals`);
    matrices are padded so that it never leaves them. A padded weight is 0 on the grid {0}: it rounds to itself
    and its errors are 0.
    """
    heads, rows, columns = w.shape
    pad = (rows + STEPS, rows + STEPS)  # left and right
    w, zero, codes, acc, e, d = (torch.nn.functional.pad(t.flip(1), pad) for t in (w, zero, *(torch.zeros_like(w) for _ in range(4))))
    scale = torch.nn.functional.pad(scale.flip(1), pad, value=1.0)
    u = torch.nn.functional.pad(u, pad + pad)
    diagonal = u.diagonal(dim1=-2, dim2=-1)[:, None, :].expand(heads, rows, -1).contiguous()
    diagonal.masked_fill_(diagonal == 0, 1)
    u_t = u.mT.contiguous()
    mix = r / r.diagonal(dim1=-2, dim2=-1)[..., None]
    mix = mix.triu(1).flip(-1, -2).contiguous()

    shift = STEPS + 1  # the padded column of row 0's weight on anti-diagonal 0, minus rows - 1 (flipped row 0 is row rows - 1)
    for start in range(0, rows + columns - 1, STEPS):
        stop = min(start + STEPS, rows + columns - 1)
        for k in range(start, stop):
            at = k + shift
            pre = diagonals(w, at) - (mix * d[:, :, at : at + rows]).sum(1)
            cur = pre - diagonals(acc, at)
            if k > start:
                past = diagonals(e, start + shift, k - start)
                cur -= (past * into(u_t, rows, start + shift, at, k - start)).sum(-1)
            code = grid.encode(cur, diagonals(scale, at), diagonals(zero, at))
            value = grid.decode(code, diagonals(scale, at), diagonals(zero, at))
            diagonals(codes, at).copy_(code)
            diagonals(d, at).copy_(pre - value)
            diagonals(e, at).copy_((cur - value) / diagonals(diagonal, at))
        # weights already rounded receive garbage here, the others exactly their share of these steps
        band = slice(start + shift, stop + shift + rows - 1)
        fresh = torch.zeros_like(e[:, :, band])
        diagonals(fresh, 0, stop - start).copy_(diagonals(e, start + shift, stop - start))
        acc[:, :, stop + shift :] += fresh @ u[:, band, stop + shift :]
    inner = slice(pad[0], pad[0] + columns)
    return codes[:, :, inner].flip(1)


def diagonals(x: Float[Tensor, "n rows width"], at: int, count: int | None = None) -> Tensor:
    """View of entries [n, r, at + r + i], i < count; without `count` the one diagonal, [n, r, at + r]."""
    n, rows, width = x.shape
    offset = x.storage_offset() + at
    if count is None:
        return x.as_strided((n, rows), (x.stride(0), x.stride(1) + 1), offset)
    return x.as_strided((n, rows, count), (x.stride(0), x.stride(1) + 1, 1), offset)


def into(u_t: Float[Tensor, "n in in"], rows: int, source: int, target: int, count: int) -> Tensor:
    """View of u[n, source + r + i, target + r] (`u_t` is its transpose): what errors on `count` diagonals do to the target one."""
    offset = (target * u_t.shape[-1]) + source
    return u_t.as_strided((u_t.shape[0], rows, count), (u_t.stride(0), u_t.shape[-1] + 1, 1), offset)
