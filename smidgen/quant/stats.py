"""Second moments of one matrix: all a solver knows about the data.

The loss of an error dW = W_hat - W is the quadratic form  sum_h tr(H_out[h] dW[h] H_in[h] dW[h]^T), where the rows
of W belong to heads h. GPTQ has one "head" and H_out = I. Moments are means over tokens, so twice the
same data gives the same statistics; constant factors change no solver's result.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TILE = 256  # most columns of a symmetric product computed at once


@dataclass
class Stats:
    """The factors of one matrix's Hessian, H_out (x) H_in per head.

    `h_in` has one entry per head, or one that all heads share. `h_out` is None where the rows of a head do not interact (H_out = I).
    """

    h_in: Float[Tensor, "one_or_heads in in"]
    h_out: Float[Tensor, "heads dim dim"] | None = None
    tokens: int = 0

    def heads(self) -> int:
        """Number of heads the rows are split into."""
        return self.h_in.shape[0] if self.h_out is None else self.h_out.shape[0]

    def loss(self, error: Float[Tensor, "out in"]) -> float:
        """The quadratic form above."""
        e = error.to(self.h_in.dtype).unflatten(0, (self.heads(), -1))
        weighted = e @ self.h_in
        if self.h_out is not None:
            weighted = self.h_out @ weighted
        return float(torch.linalg.vecdot(weighted.flatten(), e.flatten()))


def add_gram(total: Float[Tensor, "d d"], x: Float[Tensor, "n d"]) -> None:
    """total += x^T x, accumulated in float32 whatever type `x` has. Fills the lower triangle only: see `symmetrize`.

    Half of a symmetric product is enough, so columns are done in tiles. A bfloat16 `x` is widened first; its
    products then fit the bfloat16 units exactly (`exact_products`), which doubles the speed on a CPU.
    """
    exact = x.dtype == torch.bfloat16 and not x.is_cuda
    x = x.float() if x.dtype != torch.float64 else x
    with torch.autocast(x.device.type, enabled=False), exact_products(exact):
        width = -(-x.shape[1] // -(-x.shape[1] // TILE))
        for start in range(0, x.shape[1], width):
            stop = start + width
            total[start:stop, :stop] += x[:, start:stop].T @ x[:, :stop]


def symmetrize(total: Float[Tensor, "*h d d"]) -> Float[Tensor, "*h d d"]:
    """The full matrix from its lower triangle."""
    return total.tril() + total.tril(-1).mT


@contextmanager
def exact_products(allowed: bool):
    """Lets float32 products run on bfloat16 units, for operands that are bfloat16 values anyway.

    A product of two 8-bit mantissas is exact in float32 and sums are kept in float32, so nothing is lost.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
