"""Quadapter (Park et al., Findings of EMNLP 2022, arXiv 2211.16912): factors per channel, learned while the weights stay as they are.

Phase 1, block by block, independently: the inputs X and the outputs Y of the float block are given, and

    min_a  mean (f_a(X) - Y)^2      f_a: the block with quantized activations and weights, factors alpha = exp(a) at its sites

is descended by Adam on a alone. Ranges are the batch's minimum and maximum inside the graph: with ranges detached all that reaches a
from values in range is rounding noise. The weights' scales follow W / alpha the same way. What ranges may clip is searched afterwards.
Per site, with u = alpha x, u^ = Q_a(u), w' = W / alpha, w^ = Q_w(w'), G = dL/dy, G_u = G w^, G_w = G^T u^,

    dL/da_j = sum_t G_u [in] u - sum_o G_w w' + u_max [j attains it] sum G_u du^/dhigh + u_min [j attains it] sum G_u du^/dlow
              - sum over rows o whose largest weight is in column j of |w'_oj| / Q sum_j' G_w e_w

(e_w: what rounding added to a weight, in steps; Q: the largest code), which is what automatic differentiation makes of `simulate.py`.

Phase 2, end to end: `finetune` freezes the weights, turns ranges into learned ones, and names what a training loop may change.

Known of the paper: two phases, an L2 loss per block and then the task's, frozen weights, fusion at inference. Ours: a = log alpha,
the ranges, Adam, its rate and steps; the paper's choices could not be had (docs/methods.md).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from smidgen.errors import UserError
from smidgen.quant.ranges import Kind, Link
from smidgen.quant.replay import Recorded
from smidgen.quant.simulate import QuantLinear, activations_of
from smidgen.quant.transforms.alpha import Adapted
from smidgen.quant.transforms.clip import clip
from smidgen.quant.transforms.outliers import Outliers
from smidgen.quant.transforms.smoothquant import SmoothQuant

EPSILON = 1e-15  # of Adam: the size of a block's outputs is not to matter


@dataclass(frozen=True)
class Quadapter:
    """Options of phase 1."""

    steps: int = 800
    "Adam steps per block."
    learning_rate: float = 0.02
    "Of a, relative therefore; falls to 0 along a cosine. From another init than ones a quarter of it."
    init: Literal["ones", "smoothquant", "search"] = "ones"
    """Where factors start: at the best t of SmoothQuant for all sites of the block; search: at the better of its t and of the thresholds of
    Outlier Suppression+, site by site. The end is never worse."""
    clip: bool = True
    "Ranges may clip: their reach is searched afterwards (clip.py), and kept where the block errs less."
    seed: int = 0
    "Of the order of batches."

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"--quadapter.steps must not be negative, got {self.steps}")
        if not self.learning_rate > 0:
            raise UserError(f"--quadapter.learning-rate must be positive, got {self.learning_rate}")

    def __call__(self, block: Adapted) -> dict[str, float]:
        """Learns a at every site; where that ends worse than it started, the start is kept. Returns the errors before and at the start."""
        before, rate = block.error(), self.learning_rate
        if self.init != "ones":
            start = SmoothQuant() if self.init == "smoothquant" else Outliers(migration=SmoothQuant().migration)
            start(block)
            rate /= 4
        least, found = block.error(), [site.a.detach().clone() for site in block.sites]
        self._descend(block, rate)
        if not block.error() <= least:  # not a number, too
            for site, a in zip(block.sites, found, strict=True):
                site.set(a)
        if self.clip:
            clip(block)
        return {"error_before": before, "error_start": least}

    def _descend(self, block: Adapted, rate: float) -> None:
        optimizer = torch.optim.Adam([site.a for site in block.sites], lr=rate, eps=EPSILON)
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        hidden, targets = block.block.hidden[0].clone(), block.targets[0].clone()

        def gradient() -> None:
            optimizer.zero_grad()
            with torch.enable_grad():
                block.loss(hidden, targets).backward()

        differentiate = Recorded(gradient) if hidden.is_cuda and self.steps else gradient
        for step in range(self.steps):
            order = order or torch.randperm(len(block.targets), generator=generator).tolist()
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            batch = order.pop()
            hidden.copy_(block.block.hidden[batch])
            targets.copy_(block.targets[batch])
            differentiate()
            optimizer.step()
            for site in block.sites:
                site.set(site.a)


SEARCHED = Quadapter(steps=100, learning_rate=0.04, init="search")
"What the commands do, and docs/activations.md measures: from a searched start a hundred steps are left to gain by."


def finetune(
    model: torch.nn.Module, layers: dict[str, QuantLinear], rate: float = 1e-3, kind: Kind = "min-max", link: Link = "exp"
) -> list[dict[str, Any]]:
    """Prepares phase 2: parameter groups for an optimizer, factors and ranges, without weight decay; all other parameters are frozen.

    Ranges of activations start where they are; those of weights, where phase 1 clipped them, go on following the factors. Steps of a and
    of ranges are relative to what they change, but for raw scale-offset.
    """
    model.requires_grad_(False)
    factors = list({id(q.alpha): q.alpha for q in layers.values() if q.alpha is not None}.values())
    ranges = [q.shrink for q in layers.values() if q.shrink is not None]
    for name, activation in activations_of(layers):
        if not bool(activation.low.isfinite() & activation.high.isfinite()):
            raise UserError(f"{name}: no range of its inputs is known; calibrate with static ranges first")
        ranges += activation.fix(activation.low, activation.high, kind, link).parameters()
    for parameter in (*factors, *ranges):
        parameter.requires_grad_(True)
    groups = {"factors": factors, "ranges": ranges}
    return [{"name": name, "params": params, "lr": rate, "weight_decay": 0.0} for name, params in groups.items() if params]


@torch.no_grad()
def centre(layers: dict[str, QuantLinear]) -> None:
    """After phase 2: the mean of every site's a is 0 again, and the ranges have taken the constant, so that nothing else changes."""
    for _, activation in activations_of(layers):
        a = next(quant.alpha for quant in layers.values() if quant.activation is activation)
        if a is None:
            continue
        constant = a.mean()
        a -= constant
        assert activation.range is not None
        activation.range.rescale(float((-constant).exp()))
