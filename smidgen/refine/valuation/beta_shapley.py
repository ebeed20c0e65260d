"""Beta Shapley: Shapley's mean with more weight on small subsets, where a wrong label does the clearest harm.

    Kwon and Zou, Beta Shapley: a Unified and Noise-reduced Data Valuation Framework, AISTATS 2022, arXiv 2110.14049

    phi_i = sum_r w_r sum over S without i, |S| = r, of U(S + i) - U(S),      w_r = B(r + beta, n - 1 - r + alpha) / B(alpha, beta)

so that sum_r (n-1 choose r) w_r = 1; Beta(1, 1) is Shapley's value, Beta(16, 1) leans most on small subsets. Sampled like tmc_shapley.py:
in a random order the set before i is uniform among those of its size r, and every size is met with probability 1/n, so the credit of place
r counts n (n-1 choose r) w_r times. Orders are not followed further than the weights reach.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.refine.evidence import Evidence, Need, Scores, ranked
from smidgen.refine.valuation.games import HeadGame, Utility
from smidgen.refine.valuation.tmc_shapley import gains, permutation, settled_mean


@dataclass(frozen=True)
class BetaShapley:
    """Retrains: for some hundred images."""

    alpha: float = 16.0
    beta: float = 1.0
    tail: float = 1e-3
    "Share of the weights left out, with the largest subsets."
    permutations: int = 1000
    "At most."
    settled: float = 0.05
    "Relative change at which to stop."
    every: int = 100
    "Permutations between looks at it."
    processes: int = 1
    needs: ClassVar[tuple[Need, ...]] = ("validation",)

    def __call__(self, evidence: Evidence) -> Scores:
        """phi, (n,); of accuracies on the validation set."""
        value = self.values(HeadGame(evidence), len(evidence.y), evidence.seed, evidence.y.device)
        return Scores(value, ranked(value))

    def values(self, utility: Utility, n: int, seed: int = 0, device: torch.device | str = "cpu") -> Float[Tensor, "n"]:
        """phi of any game; `utility` is sent to other processes, if there are."""
        if not (self.alpha > 0 and self.beta > 0 and 0 <= self.tail < 1):
            raise UserError(f"alpha and beta must be positive and tail in [0, 1), got {self.alpha}, {self.beta} and {self.tail}")
        if self.permutations < 1 or self.every < 1:
            raise UserError(f"permutations and those between looks must be positive, got {self.permutations} and {self.every}")
        ends = utility(torch.tensor([[False], [True]], device=device).expand(2, n))
        weights = place_weights(n, self.alpha, self.beta).to(ends)
        reached = int((weights.cumsum(0) / n < 1 - self.tail).sum()) + 1
        walk = _Walk(utility, weights, ends, min(reached, n), seed)
        return settled_mean(walk, self.permutations, self.every, self.settled, self.processes)


@dataclass(frozen=True)
class _Walk:
    """Weighted gains of permutation t."""

    utility: Utility
    weights: Float[Tensor, "n"]
    ends: Float[Tensor, "2"]
    reached: int
    seed: int

    def __call__(self, t: int) -> Float[Tensor, "n"]:
        order = permutation(len(self.weights), self.seed, t)
        return weighted(gains(self.utility, order, self.ends, 0.0, self.reached), order.to(self.ends.device), self.weights)


def weighted(credit: Float[Tensor, "n"], order: Tensor, weights: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Credits of one order, each times the weight of its place."""
    return credit * torch.empty_like(weights).scatter_(0, order, weights)


def place_weights(n: int, alpha: float, beta: float) -> Float[Tensor, "n"]:
    """n (n-1 choose r) w_r for r = 0 .. n - 1, float64; their mean is 1.

    >>> place_weights(3, 1, 1)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    r = torch.arange(n, dtype=torch.float64)
    gamma, one = torch.lgamma, torch.ones((), dtype=torch.float64)
    choose = gamma(n * one) - gamma(r + 1) - gamma(n - r)
    inside = gamma(r + beta) + gamma(n - 1 - r + alpha) - gamma((n - 1 + alpha + beta) * one)
    whole = gamma(alpha * one) + gamma(beta * one) - gamma((alpha + beta) * one)
    return n * torch.exp(choose + inside - whole)
