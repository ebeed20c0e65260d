"""Correcting for inputs that are no longer the model's own (after GPTAQ and TurboBoA's F2, arXiv 2602.04929).

Layers are quantized in order, so a layer's inputs x come out of quantized layers, while W was made for x_float. What should be
approximated is W x_float; where the output is added to a residual stream r that has itself lost something, W x_float + r_float - r.
With y the difference to W x:

    E || W_hat x - W x - y ||^2  =  E || (W_hat - W*) x ||^2 + const,   W* = W + E[y x^T] H^-1

    y = W (x_float - x)                          in general, E[y x^T] = W E[(x_float - x) x^T]
    y = W x_float + r_float - W x - r            where the output is added to the stream

so the whole correction is one shift of the weights; any solver then runs on W* as it is. (GPTAQ instead corrects column by column,
which is not the optimum, and neither looks at the residual stream.) W* is a regression on the calibration data and overfits like one, so
only a fraction of the shift is taken: the one that is best on held-out sequences for a shift estimated from the others, in closed form.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.quant.solvers.hessian import damped
from smidgen.quant.stats import Stats


def aim(w: Float[Tensor, "out in"], stats: Stats, damp: float) -> Float[Tensor, "out in"]:
    """W*, with the strength of the shift chosen on the held-out sequences; all of it where none are."""
    heads = w.unflatten(0, (stats.heads(), -1)).to(stats.h_in.dtype)
    amount = 1.0 if stats.held is None else strength(heads, stats, damp)
    return (heads + amount * shift(heads, stats, damp)).flatten(0, 1).to(w.dtype)


def shift(w: Float[Tensor, "heads rows in"], stats: Stats, damp: float) -> Float[Tensor, "heads rows in"]:
    """W* - W, with H damped."""
    factor = torch.linalg.cholesky(damped(stats.h_in, damp).double())
    return torch.cholesky_solve(missing(w, stats).double().mT, factor).mT.to(w.dtype)


def missing(w: Float[Tensor, "heads rows in"], stats: Stats) -> Float[Tensor, "heads rows in"]:
    """E[y x^T] of what the output lacks."""
    if stats.lacking is not None:
        return stats.lacking.unflatten(0, (len(w), -1))
    assert stats.cross is not None
    return w @ stats.cross


def strength(w: Float[Tensor, "heads rows in"], stats: Stats, damp: float) -> float:
    """The fraction a in 0..1 of the shift D made from the other sequences that leaves least error on the held-out ones.

    The error is quadratic in a and least at  <D, E[y x^T]> / <D, D H>,  the moments those of the held-out sequences.
    """
    held = stats.held
    assert held is not None
    d = shift(w, stats.fitted(), damp)
    weighted = d if stats.h_out is None else stats.h_out @ d
    gain, cost = (weighted * missing(w, held)).sum(), (weighted * (d @ held.h_in)).sum()
    return float((gain / cost).clamp(0, 1)) if cost > 0 else 0.0
