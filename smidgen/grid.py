"""The numbers a weight may take: a uniform integer grid per row, or per group of columns.

    value = scale * (code - zero),   code = clamp(round(value / scale) + zero, 0, 2^bits - 1)

Solvers call `fit`, `encode` and `decode` and know nothing else about a number format, so a new format is a
new class with these three methods. Scales are rounded to the type they will be stored in *before* anything
is solved on them: what the artifact holds is what the solver saw.

>>> grid = Grid(bits=2)
>>> w = torch.tensor([[-1.0, 0.1, 0.9, 2.0]])
>>> scale, zero = grid.fit(w)                # range -1..2 over 3 steps
>>> scale.item(), zero.item()
(1.0, 1.0)
>>> grid.encode(w, scale, zero).tolist()
[[0.0, 1.0, 2.0, 3.0]]
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from smidgen.errors import UserError


@dataclass(frozen=True)
class Grid:
    """A uniform grid of `2**bits` levels.

    >>> Grid(bits=3, group=64).groups(576)
    9
    """

    bits: int = 4
    "Bits per code, 2 to 8."
    group: int | None = None
    "Columns that share one scale; None: the whole row."
    symmetric: bool = False
    "Zero is fixed at the middle code; otherwise each group has its own."
    scale_dtype: str = "float32"
    "Type the scales are stored in; `fit` returns scales this type can hold exactly."

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"bits must lie between 2 and 8, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise UserError(f"group must be a positive number of columns or none, got {self.group}")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of 0 on a symmetric grid."""
        return 2 ** (self.bits - 1)

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` weights; a UserError if they do not fit."""
        if self.group is None:
            return 1
        if columns % self.group:
            raise UserError(f"group {self.group} does not divide a row of {columns} weights; use a divisor or --group none")
        return columns // self.group

    def fitted(self, columns: int) -> int:
        """Columns whose scales are chosen together: a group."""
        return columns // self.groups(columns)

    def group_bits(self) -> int:
        """What a group takes beside its codes: a scale and, unless symmetric, a zero point."""
        return torch.finfo(getattr(torch, self.scale_dtype)).bits + (0 if self.symmetric else self.bits)

    def storable(self, new: Tensor, old: Tensor) -> Tensor:
        """The scales `new` as they can be stored; what cannot be a scale stays `old`."""
        stored = self._stored(new)
        return torch.where(stored.isfinite() & (stored > 0), stored, old)

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes, as floats; `scale` and `zero` broadcast against `w`."""
        return (torch.round(w / scale) + zero).clamp_(0, self.top)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The values the codes stand for."""
        return (codes - zero) * scale

    def nearest(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """`w` rounded to the grid, still as values."""
        return self.decode(self.encode(w, scale, zero), scale, zero)

    def fit(
        self, w: Float[Tensor, "*heads rows columns"], metric: Tensor | None = None, exhaustive: bool = False
    ) -> tuple[Float[Tensor, "*heads rows groups"], Float[Tensor, "*heads rows groups"]]:
        """Scale and zero of every group.

        Without a `metric` from the minimum and maximum, which always include 0. With one the clip ratio (and, if
        asymmetric, the rounding of zero) is searched for the least error e of nearest rounding in each row: a
        matrix H (*h, columns, columns) measures e H e^T, of which a group sees its diagonal block; a vector
        d (*h, columns) measures sum d e^2. The first strict improvement wins and scores start from +inf, so the
        scale of the metric does not matter.

        Ratios are tried from 1.00 downwards in steps of 0.05, then around the best in steps of 0.01;
        `exhaustive` tries all of 1.00, 0.99, ..., 0.01, as the authors of aespa and BoA do.
        """
        groups = self.groups(w.shape[-1])
        width = w.shape[-1] // groups
        parts = [slice(g * width, (g + 1) * width) for g in range(groups)]
        if metric is None or not w.is_cuda:  # one group at a time stays in a processor's cache
            fits = [self.fit_group(w[..., p], metric_of(metric, p, w.ndim), exhaustive) for p in parts]
            return torch.cat([s for s, _ in fits], -1), torch.cat([z for _, z in fits], -1)
        metrics = torch.stack([metric[..., p, p] if metric.ndim == w.ndim else metric[..., p] for p in parts])
        fits = self.fit_group(torch.stack([w[..., p] for p in parts]), metrics, exhaustive)
        scale, zero = (t[..., 0].movedim(0, -1) for t in fits)
        return scale, zero

    def fit_group(self, w: Tensor, metric: Tensor | None, exhaustive: bool = False) -> tuple[Tensor, Tensor]:
        """`fit` for weights that all share one scale per row."""
        if metric is None:
            return self._minmax(w)
        low, high = self._range(w)
        full = (high - low) / self.top
        fixed = torch.full_like(full, self.middle)
        exact = -low / full
        zeros = [fixed] if self.symmetric else [exact.floor().clamp(0, self.top), exact.ceil().clamp(0, self.top)]
        best = Fit(torch.full_like(full, torch.inf), full, zeros[0], torch.ones_like(full))
        one = torch.ones_like(full)
        if exhaustive:
            best = self._best(best, w, metric, full, zeros, [one * (1 - i / 100) for i in range(100)])
        else:
            best = self._best(best, w, metric, full, zeros, [one * (1 - i / 20) for i in range(20)])
            near = [(best.ratio + i / 100).clamp(0.01, 1) for i in (4, 3, 2, 1, -1, -2, -3, -4)]
            best = self._best(best, w, metric, full, zeros, near)
        return self._checked(best.scale), best.zero

    def _best(self, best: "Fit", w: Tensor, metric: Tensor, full: Tensor, zeros: list[Tensor], ratios: list[Tensor]) -> "Fit":
        """`best`, or the candidate that beats it."""
        for ratio in ratios:
            scale = self._stored(full * ratio)
            levels = torch.round(w / scale)
            for zero in zeros:
                e = torch.clamp(levels, -zero, self.top - zero).mul_(scale).sub_(w)
                best = best.beaten_by(Fit(weighted_square(e, metric), scale, zero, ratio))
        return best

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        empty = low == high
        return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)

    def _stored(self, scale: Tensor) -> Tensor:
        """`scale` rounded to what the artifact can hold; zero or infinite beyond its range."""
        return scale.to(getattr(torch, self.scale_dtype)).to(scale.dtype)

    def _checked(self, scale: Tensor) -> Tensor:
        """`scale`, if the artifact can hold it; asked once per fit, since a device has to finish its work to answer."""
        if not bool(((scale > 0) & (scale == self._stored(scale)) & scale.isfinite()).all()):
            raise UserError(f"a scale of {scale.min():.1e} to {scale.max():.1e} does not fit {self.scale_dtype}; use --scale-dtype float32")
        return scale

    def _minmax(self, w: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self._range(w)
        scale = self._checked(self._stored((high - low) / self.top))
        zero = torch.full_like(scale, self.middle) if self.symmetric else torch.round(-low / scale).clamp(0, self.top)
        return scale, zero


@dataclass(frozen=True)
class Narrow(Grid):
    """A symmetric grid without its lowest code, so that 0 is in the middle: what integer kernels want of weights.

    >>> Narrow(bits=4, symmetric=True).top
    14
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.symmetric:
            raise UserError("a narrow grid is symmetric")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 2

    @property
    def middle(self) -> int:
        """The code of 0."""
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class Fit:
    """Scores and grids of the best candidates so far, one per row and group."""

    score: Tensor
    scale: Tensor
    zero: Tensor
    ratio: Tensor

    def beaten_by(self, other: "Fit") -> "Fit":
        """Row by row the strictly better of the two."""
        better = other.score < self.score
        mine, others = (self.score, self.scale, self.zero, self.ratio), (other.score, other.scale, other.zero, other.ratio)
        return Fit(*(torch.where(better, b, a) for a, b in zip(mine, others, strict=True)))


def metric_of(metric: Tensor | None, part: slice, ndim: int) -> Tensor | None:
    """The metric of some columns of weights with `ndim` dimensions: it has as many if it is a matrix, else one fewer."""
    return None if metric is None else (metric[..., part, part] if metric.ndim == ndim else metric[..., part])


def weighted_square(e: Float[Tensor, "*heads rows columns"], metric: Tensor) -> Float[Tensor, "*heads rows 1"]:
    """e H e^T or sum d e^2 of every row."""
    if metric.ndim == e.ndim:
        return (e @ metric).mul_(e).sum(-1, keepdim=True)
    return e.square_() @ metric[..., None]


@dataclass(frozen=True)
class QWeight:
    """A quantized matrix: integer codes and the grid they live on."""

    codes: UInt8[Tensor, "out columns"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]
    grid: Grid

    def dequantize(self) -> Float[Tensor, "out columns"]:
        """The values as a runtime computes them: multiplied in the type scales are stored in, returned in that of `scale`."""
        stored = getattr(torch, self.grid.scale_dtype)
        scale, zero = self.expanded()
        if scale.dtype == torch.float64 or stored == torch.float32:
            return self.grid.decode(self.codes.to(scale.dtype), scale, zero)
        return ((self.codes.to(scale.dtype) - zero).to(stored) * scale.to(stored)).to(scale.dtype)

    def bits(self) -> int:
        """What codes, scales and zero points take."""
        return self.codes.numel() * self.grid.bits + self.scale.numel() * self.grid.group_bits()

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Scale and zero repeated to one per weight."""
        return expand(self.scale, self.codes.shape[-1]), expand(self.zero, self.codes.shape[-1])

    def at(self, rows: Int[Tensor, "n"]) -> "QWeight":
        """These rows, in this order."""
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=self.zero[rows])

    def split(self, rows: list[int]) -> "list[QWeight]":
        """The opposite of `stack`: consecutive numbers of rows."""
        parts = zip(*(t.split(rows) for t in (self.codes, self.scale, self.zero)), strict=True)
        return [replace(self, codes=codes, scale=scale, zero=zero) for codes, scale, zero in parts]

    @staticmethod
    def stack(parts: "list[QWeight]") -> "QWeight":
        """Rows of several matrices on one grid, one above the other."""
        return replace(
            parts[0],
            codes=torch.cat([p.codes for p in parts]),
            scale=torch.cat([p.scale for p in parts]),
            zero=torch.cat([p.zero for p in parts]),
        )


def expand(per_group: Float[Tensor, "*rows groups"], columns: int) -> Float[Tensor, "*rows columns"]:
    """Repeats a value per group to a value per column."""
    return per_group.repeat_interleave(columns // per_group.shape[-1], -1)
