"""Bits per layer under a budget: the same size, spent where it matters.

Every layer is solved at several widths on statistics of the unquantized model, in which nothing is changed, and its loss measured:
the share of the layer's output energy that is lost. The choice of one width per layer that loses least in sum within the budget is
a multiple-choice knapsack, solved exactly (scipy's HiGHS).
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from smidgen.errors import UserError
from smidgen.grid import Grid
from smidgen.quant.blocks import Block
from smidgen.quant.collect import collect
from smidgen.quant.solvers import GPTQ
from smidgen.quant.statistics import StatsFolder


def widths(target: float) -> list[int]:
    """The widths worth trying for an average of `target` bits: two below to two above, within 2..8."""
    return [b for b in range(int(target) - 1, int(target) + 4) if 2 <= b <= 8]


@torch.no_grad()
def measured(
    blocks: Iterable[Block], solver: GPTQ, grid: Grid, choices: list[int], stored: StatsFolder | None, device: torch.device
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, int]]]:
    """Loss and size in bits of every layer at every width, by full name; the model is left as it is."""
    loss: dict[str, dict[int, float]] = {}
    size: dict[str, dict[int, int]] = {}
    for block in blocks:
        stats = stored.read(block, solver.needs, device) if stored else collect(block, solver.needs)
        for matrix in block.matrices():
            name, w, s = f"{block.name}.{matrix.layer}", matrix.weight(), stats[matrix.name]
            energy = s.loss(w)
            for bits in choices:
                q = solver(w, s, replace(grid, bits=bits))
                share = s.loss(q.dequantize() - w) / energy if energy else 0.0
                loss.setdefault(name, dict.fromkeys(choices, 0.0))[bits] += share
                size.setdefault(name, dict.fromkeys(choices, 0))[bits] += q.bits()
    return loss, size


def knapsack(loss: dict[str, dict[int, float]], size: dict[str, dict[int, int]], budget: int) -> dict[str, int]:
    """The width of every layer: least total loss among those of at most `budget` bits together."""
    layers, choices = list(loss), list(next(iter(loss.values())))
    least = sum(min(size[layer].values()) for layer in layers)
    if least > budget:
        raise UserError(f"a budget of {budget} bits is less than the {least} that every layer at its smallest takes; raise --target-bpw")
    costs = np.array([loss[layer][b] for layer in layers for b in choices])
    sizes = np.array([size[layer][b] for layer in layers for b in choices], dtype=float)
    one_each = np.kron(np.eye(len(layers)), np.ones(len(choices)))
    found = milp(
        costs / costs.max(),
        integrality=np.ones_like(costs),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes / budget, -np.inf, 1)],
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    if found.x is None:
        raise UserError(f"no choice of bits found: {found.message}")
    chosen = found.x.reshape(len(layers), len(choices)).argmax(1)
    return {layer: choices[i] for layer, i in zip(layers, chosen, strict=True)}
