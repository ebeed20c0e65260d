"""llama.cpp's block formats as grids: scales of scales, kept exactly as they will be stored.

A super-block is `block` columns of a row, split into groups. It stores float16 d and dmin, each group integers sc and m:

    format   bits  group  block   value                     sc         m          bits per weight
    q2_k     2     16     256     d sc q - dmin m           1..15      0..15      2.625
    q3_k     3     16     256     d sc (q - 4)              1..31                 3.4375
    q4_k     4     32     256     d sc q - dmin m           1..63      0..63      4.5
    q4_1     4     32     32      d q - dmin                1          0..1       5

In this package's terms  scale = d sc  and  zero = dmin m / (d sc),  which is real: a code is round(w / scale + zero). llama.cpp
allows sc = 0 and, in q3_k, negative sc; scales here are positive. Products of a float16 and such a small integer fit
float32 exactly, so `units` finds d and sc, dmin and m again from what a QWeight holds, and nothing else need travel with it.

>>> d, sc = units(torch.tensor([[0.75, 0.25, 1.0, 2.0]]), steps=15)      # d = 2 / 8: the first k for which 2 / k divides them all
>>> d.tolist(), sc.tolist()
([0.25], [[3.0, 1.0, 4.0, 8.0]])
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.grid import Fit, Grid, metric_of, weighted_square

SMALLEST = 2.0**-24  # positive float16
AROUND = (0, -1, 1, -2, 2)  # steps searched about the rounded sc and m


@dataclass(frozen=True)
class SuperGrid(Grid):
    """One of the formats above; use the instances in FORMATS.

    `scale_dtype` stays float32: that is the type runtimes multiply d and sc in.
    """

    name: str = ""
    "As in the table."
    block: int = 256
    "Columns of a super-block."
    steps: int = 1
    "The largest sc and m."
    overhead: int = 0
    "Bits of a super-block beside its codes."

    def __post_init__(self) -> None:
        if int(self.name[1]) != self.bits:
            raise UserError(f"{self.name} has {self.name[1]} bits per weight, not {self.bits}; layers of unequal bits need another grid")

    def groups(self, columns: int) -> int:
        """Number of groups in a row; a UserError if super-blocks do not fill it."""
        if columns % self.block:
            nearest = "; use q4_0 (--bits 4 --group 32 --symmetric)" if columns % 32 == 0 else ""
            raise UserError(f"{self.name} needs rows that are multiples of {self.block} weights, and these have {columns}{nearest}")
        return columns // self.width

    @property
    def width(self) -> int:
        """Columns of a group."""
        assert self.group is not None
        return self.group

    def fitted(self, columns: int) -> int:
        """Columns whose scales are chosen together: a super-block."""
        self.groups(columns)
        return self.block

    def group_bits(self) -> int:
        """What a group takes beside its codes, its share of d and dmin included."""
        return self.overhead * self.width // self.block

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes, as floats."""
        return torch.round(w / scale + zero).clamp_(0, self.top)

    def fit(
        self, w: Float[Tensor, "*heads rows columns"], metric: Tensor | None = None, exhaustive: bool = False
    ) -> tuple[Float[Tensor, "*heads rows groups"], Float[Tensor, "*heads rows groups"]]:
        """Scale and zero of every group, as stored.

        First each group for itself, as on a Grid. Then d and dmin from the largest scale and the lowest minimum of a super-block,
        and sc and m by search about their rounded values. Without a `metric` errors count alike.
        """
        groups = self.groups(w.shape[-1])
        if metric is None:
            metric = w.new_ones((*w.shape[:-2], w.shape[-1]))
        scale, zero = super().fit(w, metric, exhaustive)
        empty = w.unflatten(-1, (groups, self.width)).abs().amax(-1) == 0  # any scale would do, so it must not widen d
        scale, low = (torch.where(empty, 0.0, t) for t in (scale, scale * zero))
        d = self._unit(scale).clamp(min=SMALLEST)
        dmin = torch.zeros_like(d) if self.symmetric else self._unit(low)
        if not bool(d.isfinite().all() & dmin.isfinite().all()):
            raise UserError(f"a scale of {scale.max():.1e} does not fit the float16 of {self.name}")
        d, dmin = (t.repeat_interleave(self.block // self.width, -1) for t in (d, dmin))
        sc = torch.round(scale / d).clamp_(1, self.steps)
        m = torch.round(low / dmin.clamp(min=SMALLEST)).clamp_(0, self.steps)
        parts = [slice(g * self.width, (g + 1) * self.width) for g in range(groups)]
        if w.is_cuda:
            metrics = torch.stack([metric_of(metric, p, w.ndim) for p in parts])  # pyright: ignore
            columns = [t.movedim(-1, 0)[..., None] for t in (d, dmin, sc, m)]
            scale, zero = self._searched(torch.stack([w[..., p] for p in parts]), metrics, *columns)
            return scale[..., 0].movedim(0, -1).contiguous(), zero[..., 0].movedim(0, -1).contiguous()
        fits = []
        for g, part in enumerate(parts):  # one group at a time stays in a processor's cache
            fits.append(self._searched(w[..., part], metric_of(metric, part, w.ndim), *(t[..., g : g + 1] for t in (d, dmin, sc, m))))
        return torch.cat([s for s, _ in fits], -1), torch.cat([z for _, z in fits], -1)

    def storable(self, new: Float[Tensor, "*rows groups"], old: Float[Tensor, "*rows groups"]) -> Float[Tensor, "*rows groups"]:
        """`new` with d and sc chosen afresh; with minima `old`, since at an unchanged zero another scale needs another m."""
        if not self.symmetric:
            return old
        d = self._unit(new.clamp(min=0)).clamp(min=SMALLEST).repeat_interleave(self.block // self.width, -1)
        stored = d * torch.round(new / d).clamp(1, self.steps)
        blocks = stored.unflatten(-1, (-1, self.block // self.width))
        usable = (blocks.isfinite() & (new.unflatten(-1, blocks.shape[-2:]) > 0)).all(-1, keepdim=True)
        return torch.where(usable, blocks, old.unflatten(-1, blocks.shape[-2:])).flatten(-2)

    def _unit(self, per_group: Tensor) -> Tensor:
        """The float16 step, per super-block, that reaches the largest of its values: (..., groups) -> (..., blocks)."""
        largest = per_group.unflatten(-1, (-1, self.block // self.width)).amax(-1)
        return (largest / self.steps).half().to(per_group.dtype)

    def _searched(self, w: Tensor, metric: Tensor | None, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of least error near `sc` and `m`; all of a group, (..., rows, width) and (..., rows, 1)."""
        assert metric is not None
        best = Fit(torch.full_like(sc, torch.inf), sc, m, sc)
        for i in AROUND if self.steps > 1 else (0,):
            scale = d * (sc + i).clamp(1, self.steps)
            for k in (0,) if self.symmetric or self.steps == 1 else AROUND:
                middle = torch.full_like(scale, 2 ** (self.bits - 1))
                zero = middle if self.symmetric else dmin * (m + k).clamp(0, self.steps) / scale
                e = self.nearest(w, scale, zero) - w
                best = best.beaten_by(Fit(weighted_square(e, metric), scale, zero, sc))
        return best.scale, best.zero


FORMATS = {
    g.name: g
    for g in (
        SuperGrid(2, 16, False, name="q2_k", steps=15, overhead=16 * 8 + 32),
        SuperGrid(3, 16, True, name="q3_k", steps=31, overhead=16 * 6 + 16),
        SuperGrid(4, 32, False, name="q4_k", steps=63, overhead=8 * 12 + 32),
        SuperGrid(4, 32, False, name="q4_1", block=32, steps=1, overhead=32),
    )
}

Q4_0 = Grid(4, 32, symmetric=True, scale_dtype="float16")  # an ordinary grid: value = d (q - 8)


def must_be_uniform(grid: Grid, who: str) -> None:
    """Raises a UserError if `grid` is one of the above, which `who` cannot hold."""
    if isinstance(grid, SuperGrid):
        raise UserError(f"{who} hold uniform grids, not {grid.name}; use --export gguf, or --bits {grid.bits} --group 32, not --format")


def units(x: Float[Tensor, "*n groups"], steps: int) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n groups"]]:
    """The float16 numbers d and integers k <= steps with x = d k, for x >= 0 known to float32; a UserError if there are none.

    Two such products differ by 2^-17 of their size at least, so a float32's rounding error cannot lead to a wrong pair.
    """
    x = x.double()
    largest = x.amax(-1)
    d, k, found = torch.zeros_like(largest), torch.zeros_like(x), largest == 0
    for i in range(1, steps + 1):
        trial = (largest / i).half().double()
        whole = torch.round(x / torch.where(trial > 0, trial, 1.0)[..., None])
        fits = ((whole * trial[..., None] - x).abs() <= 1e-6 * x).all(-1) & (whole <= steps).all(-1) & ~found
        d, k, found = torch.where(fits, trial, d), torch.where(fits[..., None], whole, k), found | fits
    if not bool(found.all()):
        raise UserError(f"scales are no float16 times integers up to {steps}; was this layer solved on another grid?")
    return d.float(), k.float()
