"""From one block with its statistics to its quantized matrices."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.blocks import Block, Matrix
from smidgen.quant.collect import collect, stages
from smidgen.quant.memory import release
from smidgen.quant.solvers import GPTQ, RTN, AdaRound
from smidgen.quant.solvers.rtn import check_finite
from smidgen.quant.stats import Stats
from smidgen.quant.transforms.zfold import fold
from smidgen.run import Run


@dataclass(frozen=True)
class Grids:
    """The grid of every layer: one for all, but for some."""

    base: Grid
    others: dict[str, Grid] = field(default_factory=dict)
    "By full name of the layer."

    def of(self, layer: str) -> Grid:
        """The layer's grid."""
        return self.others.get(layer, self.base)


@torch.no_grad()
def quantize(
    block: Block, solver: RTN | GPTQ | AdaRound, grids: Grids, dtype: torch.dtype, run: Run, stats: dict[str, Stats] | None = None
) -> dict[str, QWeight]:
    """Quantizes every matrix of a block in place; fused layers come back whole.

    `stats` are the block's, where they were collected before; `dtype` is the type the model is stored in.
    """
    staged = "cross" in solver.needs
    if staged:
        found = collect(block, frozenset({"h_in"})) if isinstance(solver, GPTQ) and solver.zfold else {}
    else:
        found = collect(block, solver.needs) if stats is None else stats
    if isinstance(solver, GPTQ) and solver.zfold:
        fold(block, found, grids.base, solver.damp, dtype)
    steps: Iterable[tuple[list[Matrix], dict[str, Stats]]] = stages(block, solver.needs) if staged else [(block.matrices(), found)]
    parts: dict[str, list[QWeight]] = {}
    for matrices, at_hand in steps:
        for name, q in solve(block, matrices, at_hand, solver, grids, run):
            parts.setdefault(name, []).append(q)
    return {name: QWeight.stack(qs) for name, qs in parts.items()}


def solve(block: Block, of: list[Matrix], stats: dict[str, Stats], solver: Any, grids: Grids, run: Run) -> Iterator[tuple[str, QWeight]]:
    """Solves matrices whose statistics are at hand, and puts the result in their place."""
    for matrices in together(block, of, stats, grids):
        started = time.monotonic()
        grid = grids.of(f"{block.name}.{matrices[0].layer}")
        weights = [m.weight() for m in matrices]
        for matrix, w in zip(matrices, weights, strict=True):
            check_finite(w, f"{block.name}.{matrix.name}: weights")
        stat = stacked([stats[m.name] for m in matrices]) if stats else None
        try:
            solved = solver(torch.cat(weights), stat, grid).split([len(w) for w in weights])
        except UserError as error:
            raise UserError(f"{' and '.join(f'{block.name}.{m.name}' for m in matrices)}: {error}") from error
        seconds = (time.monotonic() - started) / len(matrices)
        for matrix, w, q in zip(matrices, weights, solved, strict=True):
            values = q.dequantize()
            row = errors(w, values, stats.get(matrix.name))
            run.log(block=block.index, layer=matrix.name, role=matrix.role, bits=grid.bits, **row, seconds=seconds)
            w.copy_(values)
            yield f"{block.name}.{matrix.layer}", q
        del weights, solved, values
        release()


def together(block: Block, matrices: list[Matrix], stats: dict[str, Stats], grids: Grids) -> list[list[Matrix]]:
    """Neighbours on one grid, fed the same input, with heads or without: solved as one, their Hessian is factorised once."""

    def kind(matrix: Matrix) -> tuple:
        stat = stats.get(matrix.name)
        alike = (matrix.name,) if stat is None else (id(stat.h_in), stat.h_out is None or stat.h_out.shape[1:])
        return (grids.of(f"{block.name}.{matrix.layer}"), *alike)

    groups: list[list[Matrix]] = []
    for matrix in matrices:
        if groups and kind(matrix) == kind(groups[-1][0]):
            groups[-1].append(matrix)
        else:
            groups.append([matrix])
    return groups


def stacked(stats: list[Stats]) -> Stats:
    """Of matrices solved together, one above the other."""
    factors = [s.h_out for s in stats if s.h_out is not None]
    return replace(stats[0], h_out=torch.cat(factors)) if factors else stats[0]


def errors(w: Tensor, values: Tensor, stat: Stats | None) -> dict[str, float | None]:
    """What rounding a matrix cost: of the weights, and where there are statistics of what the layer does with its inputs."""
    row: dict[str, float | None] = {"relative_error": ((w - values).norm() / w.norm()).item()}
    if stat is not None:
        error, energy = stat.loss(w - values), stat.loss(w)
        row |= {"loss": error, "sqnr_db": 10 * math.log10(energy / error) if error > 0 < energy else None}
    return row
