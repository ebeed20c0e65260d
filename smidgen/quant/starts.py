"""Where a quantized model starts before anything is trained end to end: ranges, and factors per channel.

min-max, mse              ranges of inputs by what the calibration text shows (activations.py); rows of weights reach to their largest
clip                      ranges of inputs and weights that clip, by what the layers return (transforms/clip.py)
smoothquant, equalize     factors in closed form (transforms/), then ranges by the extremes
quadapter                 factors learned block by block, ranges with them
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant.activations import fix_ranges, observe
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.ranges import Kind, Link
from smidgen.quant.simulate import QuantLinear, Scheme, simulate
from smidgen.quant.transforms import alpha
from smidgen.quant.transforms.clip import Clip
from smidgen.quant.transforms.equalize import Equalization
from smidgen.quant.transforms.factors import Factors, attach, calibrate
from smidgen.quant.transforms.quadapter import SEARCHED, Quadapter
from smidgen.quant.transforms.smoothquant import SmoothQuant
from smidgen.run import Run

Method = Literal["min-max", "mse", "clip", "smoothquant", "equalize", "quadapter"]
FACTORS = ("smoothquant", "equalize", "quadapter")  # methods that look for factors
AUTO = ("auto",)
USUAL = {"smoothquant": ("norm",), "equalize": ("heads", "product", "relu"), "quadapter": alpha.KINDS}  # sites, where the family has them


@dataclass(frozen=True)
class Start:
    """A method with its options."""

    method: Method
    sites: tuple[str, ...] = AUTO
    clip: bool = False
    "Ranges that clip after smoothquant or equalize, too."
    smoothquant: SmoothQuant = SmoothQuant()
    quadapter: Quadapter = SEARCHED

    def factors(
        self,
        source: Checkpoint,
        tokens: Int[Tensor, "n length"],
        scheme: Scheme,
        run: Run,
        device: torch.device,
        folder: Path | None = None,
    ) -> Factors | None:
        """What the method finds block by block, kept in `folder`; None if it does not go through the blocks."""
        if self.method in ("min-max", "mse"):
            return None
        closed = {"clip": None, "smoothquant": self.smoothquant, "equalize": Equalization()}
        if self.method == "quadapter":
            found = self.quadapter
        elif self.clip or self.method == "clip":
            found = Clip(closed[self.method])
        else:
            found = closed[self.method]
        assert found is not None
        skeleton = source.skeleton(device)
        return calibrate(source, skeleton, tokens, found, scheme, run, device, self.kinds(skeleton), folder)

    def kinds(self, skeleton: PreTrainedModel) -> tuple[str, ...]:
        """Of the sites; a UserError where the model cannot have them."""
        if self.method not in FACTORS:
            return ()
        kinds = self.sites
        if kinds == AUTO:
            kinds = tuple(kind for kind in alpha.kinds_of(skeleton) if kind in USUAL[self.method])
            if not kinds:
                raise UserError(f"{self.method} finds no sites in '{skeleton.config.model_type}' models; choose another method")
        alpha.check(skeleton, kinds)
        return kinds

    def simulated(
        self,
        model: PreTrainedModel,
        tokens: Int[Tensor, "n length"],
        scheme: Scheme,
        factors: Factors | None,
        kind: Kind = "min-max",
        link: Link = "exp",
    ) -> dict[str, QuantLinear]:
        """Simulates the float `model` in place, with what `factors` found and with static ranges."""
        layers = simulate(model, scheme)
        if factors is not None:
            attach(model, layers, factors)
        if factors is None or not factors.shrink:
            observe(model, layers, tokens)
        fix_ranges(layers, "mse" if self.method == "mse" else "min-max", kind, link)
        return layers
