"""AdaRound: up or down, learned for one layer at a time (Nagel et al., ICML 2020, arXiv 2004.10568).

    min_V  |W X - W~ X|^2 + lambda sum (1 - |2 h(V) - 1|^beta),    W~ = s clip(floor(W / s) + h(V), n, p)

h is a stretched sigmoid, clipped to 0..1; beta falls from 20 to 2, so that every h ends at 0 or 1. The first term is tr(dW H dW^T) with
H = E[x x^T]. This is aespa's learning (aespa.py) without what it knows of attention, from W itself instead of from GPTQ's weights.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.grid import Grid, QWeight, expand
from smidgen.quant.solvers.aespa import AESPA, learn
from smidgen.quant.solvers.descent import losses
from smidgen.quant.solvers.gptq import as_qweight
from smidgen.quant.solvers.hessian import prepare
from smidgen.quant.stats import Stats


@dataclass(frozen=True)
class AdaRound:
    """Learned rounding, layer by layer; a layer whose loss is not below the nearest codes' keeps those."""

    steps: int = 2000
    "Steps of learning."
    damp: float = 0.01
    "Added to the diagonal of H, relative to its mean."

    @property
    def needs(self) -> frozenset[str]:
        """What `collect` must gather."""
        return frozenset({"h_in"})

    def __call__(self, w: Float[Tensor, "out in"], stats: Stats, grid: Grid) -> QWeight:
        """Solves for the codes; computes in float32, or float64 where the weights are."""
        w, h = prepare(w, stats, self.damp)
        scale, zero = grid.fit(w, h.diagonal(dim1=-2, dim2=-1))
        steps = expand(scale, w.shape[-1]), expand(zero, w.shape[-1])
        nearest = grid.encode(w, *steps)
        learned = learn(w, w, h, None, grid, *steps, AESPA(steps=self.steps), 1.0)
        old, new = (losses(w, h, None, codes, scale, zero, grid) for codes in (nearest, learned))
        return as_qweight(torch.where((new < old)[:, None, None], learned, nearest), scale, zero, grid)
