"""What can still be won once every weight is rounded: the loss tr(H_out dW H_in dW^T) is quadratic in the scales and in each code.

refit     for fixed codes the best scales solve a linear system, per row or, where H_out couples the rows of a head, per head.
          TurboBoA (arXiv 2602.04929, its F3) reaches the same point by coordinate descent; here it is solved directly.
descend   for fixed scales the best code of one weight is the nearest to  w_hat - (gradient / curvature);  one pass visits
          every column, all rows at once, and never raises the loss. Column-wise rounding meets each weight once, when those
          after it are still free; a pass meets it again when none is.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.grid import Grid, expand
from smidgen.quant.replay import replayed

BLOCK = 128  # columns whose effect on the rest of the gradient is applied at once

Heads = Float[Tensor, "heads rows in"]


def refine(
    w: Heads,
    h: Float[Tensor, "one_or_heads in in"],
    h_out: Float[Tensor, "heads rows rows"] | None,
    codes: Heads,
    scale: Float[Tensor, "heads rows groups"],
    zero: Float[Tensor, "heads rows groups"],
    grid: Grid,
    passes: int,
    again: Callable[[Tensor], Heads] | None = None,
) -> tuple[Heads, Float[Tensor, "heads rows groups"]]:
    """Codes and scales after `passes` rounds of refitting and descent; the loss never rises.

    With H_out a weight's neighbours are a whole head, so instead of a descent the head is rounded once more on the new scales by
    `again` and kept if that is better.
    """
    for _ in range(passes):
        scale = refit(w, h, h_out, codes, scale, zero, grid)
        if h_out is None:
            codes = descend(w, h, codes, expand(scale, w.shape[-1]), expand(zero, w.shape[-1]), grid)
        elif again is not None:
            new = again(scale)
            old_loss, new_loss = (losses(w, h, h_out, c, scale, zero, grid) for c in (codes, new))
            codes = torch.where((new_loss < old_loss)[:, None, None], new, codes)
    return codes, refit(w, h, h_out, codes, scale, zero, grid)


def losses(w: Heads, h: Tensor, h_out: Tensor | None, codes: Heads, scale: Tensor, zero: Tensor, grid: Grid) -> Float[Tensor, "heads"]:
    """tr(H_out dW H_in dW^T) of every head."""
    e = grid.decode(codes, expand(scale, w.shape[-1]), expand(zero, w.shape[-1])) - w
    weighted = e @ h if h_out is None else h_out @ e @ h
    return (weighted * e).sum((-1, -2))


def descend(w: Heads, h: Float[Tensor, "one_or_heads in in"], codes: Heads, scale: Heads, zero: Heads, grid: Grid) -> Heads:
    """One pass of coordinate descent over the columns."""
    values = grid.decode(codes, scale, zero)
    gradient = (values - w) @ h
    done = []
    for start in range(0, w.shape[-1], BLOCK):
        block = slice(start, start + BLOCK)
        # columns first and contiguous, as in `gptq.solve_block`
        g, v, s, z = (t[..., block].permute(2, 0, 1).contiguous() for t in (gradient, values, scale, zero))
        new, change = column_by_column(g, v, h[:, block, block], grid, s, z)
        gradient[..., start + BLOCK :] += change.permute(1, 2, 0) @ h[:, block, start + BLOCK :]
        done.append(new.permute(1, 2, 0))
    return torch.cat(done, -1)


@replayed
def column_by_column(gradient: Tensor, values: Tensor, h: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """New codes, and how much the values change, of one block of columns, which come first; keeps `gradient` up to date."""
    codes, change = torch.empty_like(values), torch.empty_like(values)
    curvature = h.diagonal(dim1=-2, dim2=-1)
    for j in range(len(values)):
        codes[j] = grid.encode(values[j] - gradient[j] / curvature[:, j, None], scale[j], zero[j])
        change[j] = grid.decode(codes[j], scale[j], zero[j]) - values[j]
        gradient[j + 1 :].addcmul_(h[:, j, j + 1 :].T[..., None], change[j])
    return codes, change


def refit(
    w: Heads,
    h: Float[Tensor, "one_or_heads in in"],
    h_out: Float[Tensor, "heads rows rows"] | None,
    codes: Heads,
    scale: Float[Tensor, "heads rows groups"],
    zero: Float[Tensor, "heads rows groups"],
    grid: Grid,
) -> Float[Tensor, "heads rows groups"]:
    """The scales of least loss for these codes, as they can be stored; the old ones where rounding them for storage undoes the gain."""
    levels = codes - expand(zero, w.shape[-1])
    return _refit_rows(w, h, levels, scale, grid) if h_out is None else _refit_heads(w, h, h_out, levels, scale, grid)


def _refit_rows(w: Heads, h: Tensor, levels: Heads, scale: Tensor, grid: Grid) -> Tensor:
    """Rows are independent: a system of the size of its groups for each."""
    groups = scale.shape[-1]
    a, b = (torch.empty(*scale.shape, *n, dtype=w.dtype, device=w.device) for n in ((groups,), ()))
    for g, columns in enumerate(_columns(w.shape[-1], groups)):
        seen = levels[..., columns] @ h[:, columns]
        a[..., g, :] = (seen * levels).unflatten(-1, (groups, -1)).sum(-1)
        b[..., g] = (seen * w).sum(-1)
    new = grid.storable(solved(a, b, scale), scale)
    better = quadratic(a, b, new) < quadratic(a, b, scale)
    return torch.where(better[..., None], new, scale)


def _refit_heads(w: Heads, h: Tensor, h_out: Tensor, levels: Heads, scale: Tensor, grid: Grid) -> Tensor:
    """H_out couples the rows: one system of rows x groups unknowns for each head."""
    rows, groups = scale.shape[-2:]
    result = []
    for i in range(len(w)):  # one head at a time: its matrix may be large
        a = torch.empty(rows, groups, rows, groups, dtype=w.dtype, device=w.device)
        b = torch.empty(rows, groups, dtype=w.dtype, device=w.device)
        for g, columns in enumerate(_columns(w.shape[-1], groups)):
            seen = levels[i, :, columns] @ h[i % len(h), columns]
            met = torch.einsum("rgc,qgc->rqg", seen.unflatten(-1, (groups, -1)), levels[i].unflatten(-1, (groups, -1)))
            a[:, g] = h_out[i][:, :, None] * met
            b[:, g] = (h_out[i] * (seen @ w[i].T)).sum(-1)
        a, b, old = a.view(rows * groups, -1), b.flatten(), scale[i].flatten()
        new = grid.storable(solved(a, b, old), old)
        result.append((new if quadratic(a, b, new) < quadratic(a, b, old) else old).view(rows, groups))
    return torch.stack(result)


def _columns(width: int, groups: int) -> list[slice]:
    size = width // groups
    return [slice(g * size, (g + 1) * size) for g in range(groups)]


def solved(a: Float[Tensor, "*n k k"], b: Float[Tensor, "*n k"], old: Float[Tensor, "*n k"]) -> Float[Tensor, "*n k"]:
    """The minimum of x a x - 2 b x near `old`: a millionth of a's diagonal holds x there, where a is singular."""
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-6 * diagonal + torch.where(diagonal > 0, 0.0, 1.0)
    a = a.diagonal_scatter(diagonal + ridge, dim1=-2, dim2=-1)
    return torch.linalg.solve(a, b + ridge * old)


def quadratic(a: Float[Tensor, "*n k k"], b: Float[Tensor, "*n k"], x: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
    """x a x - 2 b x."""
    return ((a @ x[..., None])[..., 0] * x - 2 * b * x).sum(-1)
