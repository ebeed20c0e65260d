"""Truncated Monte Carlo Shapley: what an image adds to the images before it, over random orders.

    Ghorbani and Zou, Data Shapley: Equitable Valuation of Data for Machine Learning, ICML 2019, arXiv 1904.02868

    phi_i = mean over permutations of U(those before i, and i) - U(those before i)

An order is cut short where U comes within `tolerance` of U(all): whoever comes later is credited 0. Untruncated, the credits of every
order sum to U(all) - U(none). Sampling stops when phi has settled: mean_i |phi_i(t) - phi_i(t - 100)| / |phi_i(t)| < `settled`.

Permutation t is drawn from its own seed, so orders can be walked by many processes with one result.

Worked by hand: U(S) = min(1, |S|), two players, orders 12 and 21: the first of an order is credited 1, the second 0, phi = (1/2, 1/2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smidgen.errors import UserError
from smidgen.refine.evidence import Evidence, Need, Scores, ranked
from smidgen.refine.spread import spread
from smidgen.refine.valuation.games import HeadGame, Utility

BLOCK = 32  # subsets of an order asked for at once


@dataclass(frozen=True)
class TMCShapley:
    """Retrains: for some hundred images."""

    permutations: int = 1000
    "At most."
    tolerance: float | None = None
    "Of truncation; none: the standard deviation of U(all) over validation sets."
    settled: float = 0.05
    "Relative change at which to stop."
    every: int = 100
    "Permutations between looks at it."
    processes: int = 1
    needs: ClassVar[tuple[Need, ...]] = ("validation",)

    def __call__(self, evidence: Evidence) -> Scores:
        """phi, (n,); of accuracies on the validation set."""
        game = HeadGame(evidence)
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = game.deviation(float(game(torch.ones(1, len(evidence.y), dtype=torch.bool, device=evidence.y.device))[0]))
        value = self.values(game, len(evidence.y), tolerance, evidence.seed, evidence.y.device)
        return Scores(value, ranked(value))

    def values(self, utility: Utility, n: int, tolerance: float, seed: int = 0, device: torch.device | str = "cpu") -> Float[Tensor, "n"]:
        """phi of any game; `utility` is sent to other processes, if there are."""
        if self.permutations < 1 or self.every < 1:
            raise UserError(f"permutations and those between looks must be positive, got {self.permutations} and {self.every}")
        ends = utility(torch.tensor([[False], [True]], device=device).expand(2, n))
        walk = _Walk(utility, n, ends, tolerance, seed)
        return settled_mean(walk, self.permutations, self.every, self.settled, self.processes)


@dataclass(frozen=True)
class _Walk:
    """Credits of permutation t; a class, because functions within functions cannot be sent to every kind of process."""

    utility: Utility
    n: int
    ends: Float[Tensor, "2"]
    tolerance: float
    seed: int

    def __call__(self, t: int) -> Float[Tensor, "n"]:
        return gains(self.utility, permutation(self.n, self.seed, t), self.ends, self.tolerance)


def permutation(n: int, seed: int, t: int) -> Int[Tensor, "n"]:
    """The t-th random order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + t) % 2**31))


def gains(
    utility: Utility, order: Int[Tensor, "n"], ends: Float[Tensor, "2"], tolerance: float, limit: int | None = None
) -> Float[Tensor, "n"]:
    """What every point of one order adds to those before it; `ends` are U(none) and U(all), `limit` the most points to add."""
    n = len(order)
    limit = n if limit is None else limit
    before, after = ends.unbind()
    order = order.to(ends.device)
    credit = torch.zeros(n, dtype=ends.dtype, device=ends.device)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=ends.device))
    for start in range(0, limit, BLOCK):
        size = torch.arange(start + 1, min(start + BLOCK, limit) + 1, device=ends.device)
        values = torch.cat([before[None], utility(place < size[:, None])])
        near = ((after - values[:-1]).abs() < tolerance).nonzero()
        stop = int(near[0]) if len(near) else len(size)
        credit[order[start : start + stop]] = values[1 : stop + 1] - values[:stop]
        before = values[-1]
        if len(near):
            break
    return credit


def settled_mean(
    walk: Callable[[int], Float[Tensor, "n"]], permutations: int, every: int, settled: float, processes: int
) -> Float[Tensor, "n"]:
    """The mean of walks 0, 1, ..., until it changes by less than `settled` over `every` of them."""
    total, done, mean = torch.zeros(()), 0, None
    while done < permutations:
        part = range(done, min(done + every, permutations))
        total = total + torch.stack(spread(walk, part, processes)).sum(0)
        done, before, mean = part.stop, mean, total / part.stop
        if before is not None:
            change = (mean - before).abs()
            if torch.where(change > 0, change / mean.abs(), 0.0).mean() < settled:
                break
    assert mean is not None
    return mean
