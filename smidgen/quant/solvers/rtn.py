"""RTN: round to nearest. The baseline every other solver must beat; min || W - W_hat ||_inf, no data.

Every solver has this shape: `needs` names the statistics it reads, the call takes weights of all heads
stacked on rows and returns a QWeight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight, expand
from smidgen.quant.stats import Stats


@dataclass(frozen=True)
class RTN:
    """Round to nearest on the min-max grid."""

    needs: ClassVar[frozenset[str]] = frozenset()
    zfold: ClassVar[bool] = False

    def __call__(self, w: Float[Tensor, "out in"], stats: Stats | None, grid: Grid) -> QWeight:
        """`stats` is not read."""
        check_finite(w, "weights")
        scale, zero = grid.fit(w)
        codes = grid.encode(w, expand(scale, w.shape[-1]), expand(zero, w.shape[-1]))
        return QWeight(codes.to(torch.uint8), scale, zero, grid)


def check_finite(x: Tensor, what: str) -> None:
    """Stops at the first NaN or infinity, which no solver survives."""
    if not bool(x.isfinite().all()):
        raise UserError(f"{what} contain NaN or infinity")
