"""How many are bad, and where to cut: thresholds by fitted mixtures instead of by a magic number.

`Mixture` fits two normal distributions to one number per image (EM); it is for values whose scale nobody knows, like Shapley values, of
which zero is no clean cut. Where one distribution describes them as well (BIC), there is nothing to cut off.

`planted_share` uses examples of what is looked for (Blanchard, Lee and Scott, Semi-Supervised Novelty Detection, JMLR 2010):

    G = (1 - share) * G_good + share * F       G: scores met, F: scores of planted errors, G_good: anything

    share <= min over cuts t of G(score <= t) / F(score <= t)

for where the good ones leave the low end alone the ratio is the share itself. Both sides are counts, so G is moved up and F down by
two standard errors: the smallest ratio of many would otherwise be the luckiest.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError

ROUNDS = 200  # of EM
LEAST = 20  # planted examples


@dataclass(frozen=True)
class Mixture:
    """Two normal distributions, the lower first; `distinct` if they are a better description than one."""

    weight: float
    "Of the lower one."
    means: tuple[float, float]
    deviations: tuple[float, float]
    distinct: bool

    def low(self, value: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Probability of the lower distribution; beyond its mean, where a wide upper one would win again, it does not fall."""
        if not self.distinct:
            return torch.zeros_like(value)
        value = value.clamp(min=self.means[0])
        odds = self._log_density(0, value) + math.log(self.weight) - self._log_density(1, value) - math.log(1 - self.weight)
        p = torch.sigmoid(odds)
        return torch.where(value > self.means[1], 0.0, p)

    def _log_density(self, i: int, value: Tensor) -> Tensor:
        return -(((value - self.means[i]) / self.deviations[i]) ** 2) / 2 - math.log(self.deviations[i])


def two_normals(value: Float[Tensor, "n"]) -> Mixture:
    """Fitted by EM from a cut at every tenth of the range of quantiles; the likeliest end."""
    if len(value) < 4 or not torch.isfinite(value).all():
        raise UserError("a mixture needs four finite values or more")
    v = value.double()
    least = max(float(v.std()) * 1e-3, 1e-12)
    best = (-math.inf, 0.0, (0.0, 0.0), (1.0, 1.0))
    for quantile in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5):
        low = (v <= v.quantile(quantile)).double()
        for _ in range(ROUNDS):
            means, deviations, weight = _moments(v, low, least)
            logs = torch.stack([-(((v - m) / s) ** 2) / 2 - math.log(s) for m, s in zip(means, deviations, strict=True)])
            logs = logs + torch.tensor([[math.log(weight)], [math.log(1 - weight)]], dtype=v.dtype, device=v.device)
            new = logs.softmax(0)[0]
            settled = float((new - low).abs().max()) < 1e-6
            low = new
            if settled:
                break
        likelihood = float(logs.logsumexp(0).sum())
        if likelihood > best[0]:
            best = (likelihood, weight, means, deviations)
    likelihood, weight, means, deviations = best
    one = float((-(((v - v.mean()) / v.std().clamp(min=least)) ** 2) / 2 - v.std().clamp(min=least).log()).sum())
    distinct = 2 * (likelihood - one) > 3 * math.log(len(v)) and means[0] < means[1]
    return Mixture(weight, means, deviations, distinct)


def _moments(v: Tensor, low: Tensor, least: float) -> tuple[tuple[float, float], tuple[float, float], float]:
    parts = torch.stack([low, 1 - low])
    total = parts.sum(1).clamp(min=1e-9)
    means = (parts @ v) / total
    deviations = ((parts * (v - means[:, None]) ** 2).sum(1) / total).sqrt().clamp(min=least)
    weight = min(max(float(total[0]) / len(v), 1e-9), 1 - 1e-9)
    return (float(means[0]), float(means[1])), (float(deviations[0]), float(deviations[1])), weight


def planted_share(met: Float[Tensor, "n"], planted: Float[Tensor, "m"]) -> float:
    """Share of bad ones among the scores met (low is suspicious), given scores of `planted` bad ones.

    >>> planted_share(torch.cat([torch.zeros(100), torch.ones(900)]), torch.zeros(400))  # a tenth, and two standard errors
    0.12...
    """
    if len(planted) < LEAST:
        raise UserError(f"a share cannot be estimated from {len(planted)} planted examples; {LEAST} or more are needed")
    cuts = planted.sort().values
    found = torch.searchsorted(cuts, cuts, right=True).double() / len(planted)
    seen = torch.searchsorted(met.sort().values, cuts, right=True).double() / len(met)
    upper = seen + 2 * (seen * (1 - seen) / len(met)).sqrt() + 1 / len(met)
    lower = found - 2 * (found * (1 - found) / len(planted)).sqrt()
    return float(torch.where(lower > 0, upper / lower.clamp(min=1e-9), 1.0).min().clamp(max=1.0))
