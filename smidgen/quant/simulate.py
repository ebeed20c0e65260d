"""A model as integer kernels will compute it, in floats: every linear layer's input and weight fake-quantized.

    y = Q_a(x) Q_w(W)^T + b        8-bit products summed in 32 bits; only the sum is scaled and becomes a float again

Inputs are asymmetric, one range per tensor (static), or one per token, computed as it comes (dynamic). Weights are symmetric, one range
per row or per group. Layers that read the same tensor share one `Activation`, since a kernel quantizes it once. Everything else (norms,
scores, softmax, embeddings, head) stays as it is. A convolution is such a layer too, of patches; its kernels return codes instead of
floats, so that its output is quantized as well, behind the ReLU that follows if one does, and its bias is a whole number of s_x s_w.

Where an `Activation`'s range comes from is its `mode`:

    float       nothing is quantized
    observe     nothing is quantized; minimum, maximum and a sample of the values are kept
    batch       minimum and maximum of the batch, inside the graph, so that gradients reach what made them; times factors that may be
                learned (`reach`), so that they can clip
    learned     a Range, once `fix` was called: the only one that can be exported
    token       minimum and maximum of every token
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.grid import QWeight
from smidgen.quant.blocks import decoder_list, family_of
from smidgen.quant.families import Family
from smidgen.quant.linear import LINEAR, product, weight_of
from smidgen.quant.ranges import Kind, Link, Range, fake_quantize, moved

Mode = Literal["float", "observe", "batch", "learned", "token"]
SAMPLE = 4096  # values kept of every observed batch
SMALLEST = 1e-8


@dataclass(frozen=True)
class Scheme:
    """What is quantized, and how."""

    weights: int = 8
    "Bits of weights, symmetric."
    activations: int = 8
    "Bits of the linear layers' inputs, asymmetric."
    group: int | None = None
    "Columns of a weight that share a scale; none: the row."
    per_token: bool = False
    "A range for every token as it comes, instead of a static one."


class Activation(nn.Module):
    """The quantizer of one tensor."""

    low: Tensor
    high: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.mode: Mode = "float"
        self.range: Range | None = None
        self.reach: nn.Parameter | None = None
        "Mode batch: logarithms of what minimum and maximum are multiplied by, (2,)."
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))
        self.sample: list[Tensor] = []
        self.count = 0
        "Values observed, of which the sample is a part; in mode batch, batches."

    def forward(self, x: Float[Tensor, "*n width"]) -> Float[Tensor, "*n width"]:
        """`x`, quantized as the mode says."""
        if self.mode == "float":
            return x
        if self.mode == "observe":
            self._observe(x.detach())
            return x
        if self.mode == "learned":
            assert self.range is not None
            return self.range(x)
        if self.mode == "token":
            return self.within(x, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
        low, high = x.min(), x.max()
        if self.reach is not None:
            low, high = low * self.reach[0].exp(), high * self.reach[1].exp()
        self._average(low.detach(), high.detach())
        return self.within(x, low, high)

    def forget(self) -> None:
        """What was observed, or averaged in mode batch."""
        self.low.fill_(torch.inf)
        self.high.fill_(-torch.inf)
        self.sample, self.count = [], 0

    def fix(self, low: Tensor, high: Tensor, kind: Kind = "min-max", link: Link = "exp", normalised: bool = True) -> Range:
        """From now on a learned range, which starts at [low, high]; steps of min-max are relative to it."""
        unit = (high.clamp(min=0) - low.clamp(max=0)).clamp(min=SMALLEST)
        self.range = Range(low, high, self.bits, kind, link, normalised=normalised, unit=unit)
        self.mode, self.sample, self.count = "learned", [], 0
        return self.range

    def _average(self, low: Tensor, high: Tensor) -> None:
        """Keeps the mean range of the batches seen."""
        self.count += 1
        for kept, new in ((self.low, low), (self.high, high)):
            kept.copy_(new if self.count == 1 else kept + (new - kept) / self.count)

    def _observe(self, x: Tensor) -> None:
        self.low.copy_(torch.minimum(self.low, x.min()))
        self.high.copy_(torch.maximum(self.high, x.max()))
        values = x.flatten()
        index = torch.linspace(0, len(values) - 1, min(SAMPLE, len(values)), device=x.device).long()
        self.sample.append(values[index].float().cpu())
        self.count += len(values)

    def within(self, x: Float[Tensor, "*n width"], low: Tensor, high: Tensor) -> Float[Tensor, "*n width"]:
        """`x`, quantized in that range, which gets gradients too."""
        top = 2**self.bits - 1
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        scale = (high - low) / top
        scale = moved(scale, scale.clamp(min=SMALLEST))
        zeta = -low / scale
        return fake_quantize(x, scale, moved(zeta, zeta.round()), top)


class QuantLinear(nn.Module):
    """A linear layer, or a convolution, whose input and weight are quantized; its weight stays the layer's own parameter.

    With `alpha` (logarithms of one factor per input channel, Quadapter) the input is scaled by the factors and the weight by their
    inverses before either is quantized: what the layer computes once they are folded into what comes before and into the weight.

    With `output`, as convolutions have it, what leaves is quantized too, after it is clamped to `bounds`: the ReLU that follows.
    """

    source: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        scheme: Scheme,
        activation: Activation,
        output: Activation | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.scheme, self.activation, self.output, self.bounds = layer, scheme, activation, output, bounds
        self.alpha: nn.Parameter | None = None
        self.register_buffer("source", None, persistent=False)  # columns' entries in alpha, where some share one
        self.range: Range | None = None
        "Of the weight, where it is learned by itself; otherwise its absolute maximum, inside the graph."
        self.shrink: nn.Parameter | None = None
        "Logarithms of what that maximum is multiplied by, (out, groups, 1): the scale follows the factors, and clips."
        self.quantized = True
        "Whether the weight is quantized."
        columns = weight_of(layer).shape[1]
        if scheme.group is not None and columns % scheme.group:
            raise UserError(f"group {scheme.group} does not divide a row of {columns} weights; use a divisor or none")

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*m"]:
        """The layer, with fake-quantized operands: (*, in) -> (*, out), or images."""
        factors = self.factors()
        x = self.activation(x if factors is None else x * factors)
        y = product(self.layer, x.to(self.weight.dtype), self.fake_weight().to(self.weight.dtype), self.fake_bias())
        if self.output is None:
            return y
        return self.output(y if self.bounds is None else y.clamp(*self.bounds))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Before quantization and without alpha."""
        return weight_of(self.layer)

    def scaled_weight(self) -> Float[Tensor, "out in"]:
        """What is quantized."""
        factors = self.factors()
        return self.weight if factors is None else self.weight / factors

    def factors(self) -> Float[Tensor, "in"] | None:
        """exp(alpha), one per input channel."""
        if self.alpha is None:
            return None
        return (self.alpha if self.source is None else self.alpha[self.source]).exp()

    def fake_weight(self) -> Float[Tensor, "out in"]:
        """As rounded."""
        if not self.quantized:
            return self.scaled_weight()
        grouped = self.grouped()
        return self.weight_range(grouped)(grouped).flatten(1) if self.range is not None else self._nearest(grouped).flatten(1)

    def fake_bias(self) -> Float[Tensor, "out"] | None:
        """A multiple of the products' scale where codes leave the layer, whose kernels add it to their 32-bit sums."""
        bias: Tensor | None = self.layer.bias  # pyright: ignore[reportAssignmentType]
        if bias is None or self.output is None or not self.quantized or self.activation.range is None:
            return bias
        unit = self.weight_range(self.grouped()).scale_zero()[0].flatten() * self.activation.range.scale_zero()[0]
        return (bias / unit).round() * unit

    def grouped(self) -> Float[Tensor, "out groups width"]:
        """What is quantized, by groups that share a scale."""
        w = self.scaled_weight()
        return w.unflatten(1, (-1, self.scheme.group or w.shape[1]))

    def weight_range(self, grouped: Float[Tensor, "out groups width"]) -> Range:
        """The learned range, or the present one."""
        largest = grouped.detach().abs().amax(-1, keepdim=True).float()
        if self.range is None:
            reach = self.shrunk(largest)
            return Range(-reach, reach, self.scheme.weights, symmetric=True)
        if self.range.kind == "beta-gamma":
            self.range.rebase(-largest, largest)
        return self.range

    def shrunk(self, largest: Float[Tensor, "out groups 1"]) -> Float[Tensor, "out groups 1"]:
        """The upper end of the present range, given the largest absolute weights."""
        return largest if self.shrink is None else largest * self.shrink.exp()

    def _nearest(self, grouped: Tensor) -> Tensor:
        top = 2 ** (self.scheme.weights - 1) - 1
        scale = self.shrunk(grouped.float().abs().amax(-1, keepdim=True)) / top
        return fake_quantize(grouped, moved(scale, scale.clamp(min=SMALLEST)), torch.full_like(scale, top), 2 * top)

    @torch.no_grad()
    def take(self, q: QWeight) -> None:
        """From now on this weight, solved elsewhere on a narrow grid with a scale per row."""
        self.weight.copy_(q.dequantize())
        largest = (q.scale * q.grid.middle)[..., None]
        self.range = Range(-largest, largest, self.scheme.weights, symmetric=True).requires_grad_(False)

    def learn_range(self, kind: Kind = "min-max", link: Link = "exp") -> Range:
        """From now on the weight's range is learned by itself; it starts at the present one."""
        largest = self.grouped().detach().abs().amax(-1, keepdim=True).float()
        reach = self.shrunk(largest).detach()
        unit = largest.clamp(min=SMALLEST)
        self.range, self.shrink = Range(-reach, reach, self.scheme.weights, kind, link, symmetric=True, unit=unit), None
        if kind == "beta-gamma":
            self.range.narrow(reach / unit)
        return self.range


def simulate(model: PreTrainedModel, scheme: Scheme) -> dict[str, QuantLinear]:
    """Puts a QuantLinear, its input still float, in the place of every linear layer of the decoder blocks; by full name."""
    path, blocks = decoder_list(model)
    found: dict[str, QuantLinear] = {}
    for i, block in enumerate(blocks):
        found |= {f"{path}.{i}.{name}": quant for name, quant in simulate_block(block, family_of(model), scheme).items()}
    return found


def simulate_block(block: nn.Module, family: Family | None, scheme: Scheme) -> dict[str, QuantLinear]:
    """The same for one block; by name inside it."""
    layers = {name: m for name, m in block.named_modules() if isinstance(m, LINEAR)}
    shared = {name: group[0] for group in same_input(family) for name in group}
    activations: dict[str, Activation] = {}
    found: dict[str, QuantLinear] = {}
    for name, layer in layers.items():
        activation = activations.setdefault(shared.get(name, name), Activation(scheme.activations))
        found[name] = QuantLinear(layer, scheme, activation).to(weight_of(layer).device)
    install(block, found)
    return found


def install(model: nn.Module, layers: dict[str, QuantLinear]) -> None:
    """Puts the simulated layers in the place of those they hold."""
    for name, quant in layers.items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = quant


def restore(model: nn.Module, layers: dict[str, QuantLinear]) -> None:
    """Puts the layers themselves back; what was learned about them is lost unless it was folded into them."""
    for name, quant in layers.items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = quant.layer


def readers(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Layers of a block that read the same tensor, where the family is known."""
    return same_input(family_of(model))


def same_input(family: Family | None) -> list[tuple[str, ...]]:
    """The same by family."""
    return [] if family is None else [fold.after for fold in family.folds if len(fold.after) > 1]


def activations_of(layers: dict[str, QuantLinear]) -> Iterator[tuple[str, Activation]]:
    """Every quantizer once, by the name of the first layer that reads it, or makes it."""
    seen: set[Activation] = set()
    for name, quant in layers.items():
        for label, activation in ((name, quant.activation), (f"{name}.output", quant.output)):
            if activation is not None and activation not in seen:
                seen.add(activation)
                yield label, activation


def set_mode(layers: dict[str, QuantLinear], mode: Mode) -> None:
    """Of every activation."""
    for _, activation in activations_of(layers):
        activation.mode = mode


@contextmanager
def unquantized(layers: dict[str, QuantLinear], inputs: Mode = "float") -> Iterator[None]:
    """The float model, for as long as the context lasts; activations stay in the mode `inputs` after it."""
    set_mode(layers, inputs)
    for quant in layers.values():
        quant.quantized = False
    try:
        yield
    finally:
        for quant in layers.values():
            quant.quantized = True
