"""A Hessian factor made ready: damped, ordered, and as the triangle U that every column-wise solver runs on."""

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.quant.solvers.rtn import check_finite
from smidgen.quant.stats import Stats


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
