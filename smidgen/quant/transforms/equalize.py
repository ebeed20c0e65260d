"""Cross-layer equalization (Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.1): factors from the weights alone.

Two linear layers with something homogeneous between them: row j of the first has range r1_j = max|W1_j|, column j of the second
r2_j = max|W2_j|. Dividing the rows by f_j = sqrt(r1_j / r2_j) and multiplying the columns by it makes both sqrt(r1_j r2_j); here

    a_j = -log f_j = (log r2_j - log r1_j) / 2

No data are looked at. Legal pairs are v -> output projection, up -> down and fc1 -> relu -> fc2; a norm is not a linear layer. Where rows
have scales of their own, as ours, the first layer gains nothing by it.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.quant.linear import LINEAR, weight_of
from smidgen.quant.transforms.alpha import SMALLEST, Adapted, Site


@dataclass(frozen=True)
class Equalization:
    """It has no options."""

    def __call__(self, block: Adapted) -> dict[str, float]:
        """Sets a at every site; returns the error before."""
        start = block.error()
        for site in block.sites:
            if not isinstance(site.producer, LINEAR):
                raise UserError(f"equalization is for pairs of linear layers, and {site.fold.before} is a norm; choose other sites")
            site.set(closed_form(site))
        return {"error_before": start}


def closed_form(site: Site) -> Float[Tensor, "channels"]:
    """a of a site; of a fused first layer the rows that are the channels are its last."""
    rows = weight_of(site.producer)[-len(site.a) :].detach().abs().amax(1).float()
    first, second = (r.clamp(min=SMALLEST).log() for r in (rows, site.largest_weights()))
    return (second - first) / 2
