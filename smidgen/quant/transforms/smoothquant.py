"""SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438, equation 4): factors in closed form.

With activations multiplied by alpha and weights divided by it (the paper's s is 1 / alpha),

    alpha_j = max|W_j|^(1 - t) / max|X_j|^t      a_j = (1 - t) log max|W_j| - t log max|X_j|

over all tokens and over the rows of all consumers of channel j. t = 0 makes the columns of W alike and t = 1 the
channels of X; .5 is the paper's usual choice. Here t is searched per block, by the error of what the simulated block returns.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.quant.transforms.alpha import SMALLEST, Adapted, Site


@dataclass(frozen=True)
class SmoothQuant:
    """Options of SmoothQuant."""

    migration: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    "t, the share of the difficulty that moves into the weights; of several the one with the least error."

    def __post_init__(self) -> None:
        if not self.migration or not all(0 <= t <= 1 for t in self.migration):
            raise UserError(f"--smoothquant.migration must be one or more numbers from 0 to 1, got {self.migration}")

    def __call__(self, block: Adapted) -> dict[str, float]:
        """Sets a at every site; returns the error before and the t that was best."""
        start = block.error()
        inputs = block.largest_inputs()
        errors = {}
        for t in self.migration:
            smooth(block, inputs, t)
            errors[t] = block.error(few=True)
        best = min(errors, key=lambda t: errors[t])
        smooth(block, inputs, best)
        return {"error_before": start, "migration": best}


def smooth(block: Adapted, inputs: list[Float[Tensor, "_"]], t: float) -> None:
    """Sets a at every site, given max|X_j| of each."""
    for site, largest in zip(block.sites, inputs, strict=True):
        site.set(closed_form(site, largest, t))


def closed_form(site: Site, largest: Float[Tensor, "channels"], t: float) -> Float[Tensor, "channels"]:
    """a of a site, given max|X_j|."""
    weights, inputs = (x.clamp(min=SMALLEST).log() for x in (site.largest_weights(), largest))
    return (1 - t) * weights - t * inputs
