"""Factors for outlier channels alone, after Outlier Suppression+ (Wei et al., EMNLP 2023, arXiv 2304.09145, section 4.2).

    alpha_j = 1 / max(1, max|X_j| / T)

Channels within the threshold T keep their scale, so that the weights of all the others stay as they are; SmoothQuant moves every channel.
Where two channels of a thousand are a hundred times as large, as before some down projections, this costs the weights far less.
T is searched for every site by the error of what the simulated block returns, among the largest channel's maximum over 2, 4, 8, ...
The paper shifts channels too, which a bias has to take; most of our families have none, so that is left out.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.quant.transforms.alpha import SMALLEST, Adapted
from smidgen.quant.transforms.smoothquant import closed_form as smooth


@dataclass(frozen=True)
class Outliers:
    """Options of Outlier Suppression+."""

    octaves: int = 9
    "How many halvings of the largest maximum are tried as T."
    migration: tuple[float, ...] = ()
    "t of SmoothQuant to be tried for every site beside the thresholds: the better of both methods."

    def __post_init__(self) -> None:
        if self.octaves < 1:
            raise UserError(f"at least one threshold has to be tried, got {self.octaves}")

    def __call__(self, block: Adapted) -> dict[str, float]:
        """Sets a at every site; returns the error before."""
        start = block.error()
        for site, largest in zip(block.sites, block.largest_inputs(), strict=True):
            candidates = [site.a.detach().clone()] + [closed_form(largest, 2.0**-k) for k in range(1, self.octaves + 1)]
            candidates += [smooth(site, largest, t) for t in self.migration]
            errors = []
            for a in candidates:
                site.set(a)
                errors.append(block.error(few=True))
            site.set(candidates[errors.index(min(errors))])
        return {"error_before": start}


def closed_form(largest: Float[Tensor, "channels"], share: float) -> Float[Tensor, "channels"]:
    """a of a site, given max|X_j|, for T = `share` of the largest."""
    threshold = share * largest.max().clamp(min=SMALLEST)
    return -(largest / threshold).clamp(min=1).log()
