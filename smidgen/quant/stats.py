"""Second moments of one matrix: all a solver knows about the data.

The loss of an error dW = W_hat - W is the quadratic form  sum_h tr(H_out[h] dW[h] H_in[h] dW[h]^T), where the rows
of W belong to heads h. GPTQ has one "head" and H_out = I. Moments are means over tokens, so twice the
same data gives the same statistics; constant factors change no solver's result.

Two more moments make more of the same data: `cross` says how far the inputs, which come out of quantized layers, are from what
they would have been (`mismatch.py`), and `held` are the moments of a few sequences, for choices that must not be made on
the data they are made from.
"""

from collections import defaultdict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

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
    cross: Float[Tensor, "one_or_heads in in"] | None = None
    "E[(x_float - x) x^T]: x_float are the inputs in the unquantized model."
    lacking: Float[Tensor, "out in"] | None = None
    "E[(t_float - t) x^T]: t is the residual stream after the unquantized layer's output was added to it."
    held: "Stats | None" = None
    "`h_in`, `cross` and `tokens` of the held-out sequences alone; the moments above are of all sequences."

    def fitted(self) -> "Stats":
        """The sequences that are not held out: what is chosen on `held` must be made from these."""
        assert self.held is not None
        n, m = self.tokens, self.held.tokens

        def rest(whole: Tensor | None, part: Tensor | None) -> Tensor | None:
            return None if whole is None or part is None else (whole * n - part * m) / (n - m)

        h_in = rest(self.h_in, self.held.h_in)
        assert h_in is not None
        return Stats(h_in, self.h_out, n - m, rest(self.cross, self.held.cross), rest(self.lacking, self.held.lacking))

    def per(self, rows: int) -> "Stats":
        """The same, counting so many rows of inputs as one token."""
        return replace(self, tokens=self.tokens // rows, held=self.held.per(rows) if self.held else None)

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


class Moments:
    """Sums of x^T x by name, over batches of rows x; with a reference, also of (x_float - x)^T x or of y^T x.

    While `reference` is true, rows are only remembered, and the next rows of the same name are paired with them. Once
    `held` is true, rows count as held out; the sums of all rows are the same to the last bit with and without.
    """

    def __init__(self) -> None:
        self.reference = self.held = False
        self.sums: dict[str, _Sums] = {}
        self.fitted: dict[str, _Sums] = {}
        "What the sums were when held-out rows began."
        self.waiting: dict[str, deque[Tensor]] = defaultdict(deque)

    def add(self, name: str, rows: Float[Tensor, "heads n in"], tokens: int, paired: bool = True, lacking: Tensor | None = None) -> None:
        """Adds rows that stand for `tokens` tokens; rows that are not `paired` need no reference.

        `lacking` (n, out) are rows y of what the output lacks.
        """
        if self.reference:
            if paired:
                self.waiting[name].append(rows)
            return
        sums = self.sums.setdefault(name, _Sums())
        if self.held and name not in self.fitted:
            self.fitted[name] = sums.copy()
        sums.tokens += tokens
        sums.add("gram", rows)
        if self.waiting[name]:
            sums.add("cross", rows, self.waiting[name].popleft() - rows)
        if lacking is not None:
            sums.add("lacking", rows, lacking.to(rows.dtype)[None])

    def stats(self, name: str) -> Stats:
        """Means over tokens, of everything and of what was held out."""
        whole, fitted = self.sums.pop(name), self.fitted.pop(name, None)
        if fitted is None or not fitted.tokens:
            return whole.stats()
        return replace(whole.stats(), held=whole.minus(fitted).stats())


@dataclass
class _Sums:
    """x^T x (lower triangles), (x_float - x)^T x, y^T x, and the number of tokens."""

    products: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def add(self, kind: str, rows: Float[Tensor, "heads n in"], other: Float[Tensor, "heads n out"] | None = None) -> None:
        if kind not in self.products:
            out = rows if other is None else other
            self.products[kind] = torch.zeros(len(rows), out.shape[-1], rows.shape[-1], device=rows.device)
        for head, x in enumerate(rows):
            if other is None:
                add_gram(self.products[kind][head], x)
            else:
                add_product(self.products[kind][head], other[head], x)

    def copy(self) -> "_Sums":
        return _Sums({k: v.clone() for k, v in self.products.items()}, self.tokens)

    def minus(self, other: "_Sums") -> "_Sums":
        return _Sums({k: v - other.products[k] for k, v in self.products.items()}, self.tokens - other.tokens)

    def stats(self) -> Stats:
        h = symmetrize(self.products["gram"]) / self.tokens
        cross, lacking = (self.products[k] / self.tokens if k in self.products else None for k in ("cross", "lacking"))
        return Stats(h, None, self.tokens, cross, None if lacking is None else lacking[0])


def add_product(total: Float[Tensor, "k d"], a: Float[Tensor, "n k"], b: Float[Tensor, "n d"]) -> None:
    """total += a^T b, for differences `a`: of bfloat16 rows on a CPU each product is rounded to bfloat16, at twice the speed.

    That is 0.4% of a small correction; sums are kept in float32.
    """
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.bfloat16 and not a.is_cuda:
            total += a.T @ b
        else:
            a, b = (t.float() if t.dtype != torch.float64 else t for t in (a, b))
            total.addmm_(a.T, b)


def add_gram(total: Float[Tensor, "d d"], x: Float[Tensor, "n d"]) -> None:
    """total += x^T x, accumulated in float32 whatever type `x` has. Fills the lower triangle only: see `symmetrize`.

    Half of a symmetric product is enough, so columns are done in tiles (on a CUDA device starting them costs more than it
    saves). A bfloat16 `x` is widened first; its products then fit the bfloat16 units exactly (`exact_products`), which
    doubles the speed on a CPU.
    """
    exact = x.dtype == torch.bfloat16 and not x.is_cuda
    x = x.float() if x.dtype != torch.float64 else x
    with torch.autocast(x.device.type, enabled=False), exact_products(exact):
        width = x.shape[1] if x.is_cuda else -(-x.shape[1] // -(-x.shape[1] // TILE))
        for start in range(0, x.shape[1], width):
            stop = start + width
            total[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])


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
