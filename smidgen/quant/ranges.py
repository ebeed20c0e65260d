"""Ranges that are learned: three ways to write an asymmetric quantizer's two parameters (You et al., arXiv 2404.16898).

A tensor with codes 0 .. N is rounded with scale s and zero point z, halves to even:

    q = clip(round(x / s) + z, 0, N);    x_hat = s (q - z);    z = round(zeta), in the forward pass always

    scale-offset    s and zeta themselves; `normalised`: s N and zeta / N, so that one learning rate suits both
    min-max         s = (high - low) / N, zeta = -low / s
    beta-gamma      low = f(beta) m, high = f(gamma) M with m, M the tensor's own minimum and maximum; f identity, exp or sigmoid

Rounding passes gradients on and clipping stops them, decided on the rounded code before clipping. Per element, e = round(x / s) - x / s,
d = z - zeta:

                in range        below           above                       in range    below       above
    d/ds        e               -z              N - z           d/dlow      -e / N      1 + d / N   d / N
    d/dzeta     0               -s              -s              d/dhigh     +e / N      -d / N      1 - d / N

which is what automatic differentiation makes of these lines. 0 has a code: ends are moved to low <= 0 <= high, and a scale is never below
SMALLEST; both only in value, so that a range that collapsed or crossed still has a gradient to come back by.

Inputs: +-inf take the end codes and give ranges the gradient of any clipped value; NaN stays NaN, as do the gradients it touches, and
has no code; of an empty tensor nothing is clipped. All zeros start a range at [-1, 1], a constant one from 0 to itself.

What of this is the paper's and what is ours (its full text could not be had): docs/methods.md.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smidgen.errors import UserError

Kind = Literal["min-max", "beta-gamma", "scale-offset"]
Link = Literal["identity", "exp", "sigmoid"]
SMALLEST = 1e-8  # scale
SIGMOID_START = 4.0  # sigmoid(4) = 0.982: it can never widen the range it starts from


class Range(nn.Module):
    """A learnable range of `2**bits` codes, or of `2**bits - 1` about 0 where it is symmetric.

    >>> r = Range(torch.tensor(-1.0), torch.tensor(3.0), bits=2)
    >>> r(torch.tensor([-9.0, 0.0, 1.0, 9.0])).tolist()
    [-1.3333333730697632, 0.0, 1.3333333730697632, 2.6666667461395264]
    """

    unit: Tensor
    m: Tensor
    M: Tensor

    def __init__(
        self,
        low: Float[Tensor, "*per"],
        high: Float[Tensor, "*per"],
        bits: int = 8,
        kind: Kind = "min-max",
        link: Link = "exp",
        symmetric: bool = False,
        normalised: bool = True,
        unit: Float[Tensor, "*per"] | None = None,
    ) -> None:
        """Starts at [low, high], which broadcast against what is quantized: () per tensor, (out, 1) per row of a weight.

        `link` is f of beta-gamma, `normalised` of scale-offset. `unit` is what an optimizer's step of 1 means to the ends of min-max:
        the range itself makes learning rates relative; by default 1.
        """
        super().__init__()
        if bits < 2:
            raise UserError(f"a range needs at least 2 bits, got {bits}")
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise UserError("a range cannot start at NaN or infinity; are there such activations or weights?")
        self.bits, self.kind, self.link, self.symmetric, self.normalised = bits, kind, link, symmetric, normalised
        low, high = low.detach().clamp(max=0), high.detach().clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        empty = low == high
        low, high = (torch.where(empty, end, t) for end, t in ((-1.0, low), (1.0, high)))  # any range holds zeros
        if kind == "scale-offset":
            scale, zeta = (high - low) / self.top, -low * self.top / (high - low)
            self.scale = nn.Parameter(scale * self.top if normalised else scale)
            self.offset = None if symmetric else nn.Parameter(zeta / self.top if normalised else zeta)
        elif kind == "min-max":
            self.register_buffer("unit", torch.ones_like(high) if unit is None else torch.where(empty, 1.0, unit.detach()))
            self.low = None if symmetric else nn.Parameter(low / self.unit)
            self.high = nn.Parameter(high / self.unit)
        else:
            start = {"identity": 1.0, "exp": 0.0, "sigmoid": SIGMOID_START}[link]
            self.register_buffer("m", low)
            self.register_buffer("M", high)
            self.beta = None if symmetric else nn.Parameter(torch.full_like(low, start))
            self.gamma = nn.Parameter(torch.full_like(high, start))

    @property
    def top(self) -> int:
        """N, the largest code; a symmetric range does without the lowest one, so that 0 is in the middle."""
        return 2**self.bits - (2 if self.symmetric else 1)

    def rebase(self, low: Tensor, high: Tensor) -> None:
        """beta-gamma: the tensor's own minimum and maximum, read anew; no gradient flows through them."""
        self.m.copy_(-torch.maximum(-low, high) if self.symmetric else low.clamp(max=0))
        self.M.copy_(torch.maximum(-low, high) if self.symmetric else high.clamp(min=0))

    @torch.no_grad()
    def narrow(self, ratio: Float[Tensor, "*per"]) -> None:
        """beta-gamma: the upper end, of a symmetric range both, at `ratio` of where it would start on a base that is wider."""
        start = {"identity": ratio, "exp": ratio.log(), "sigmoid": torch.logit(ratio * torch.sigmoid(torch.tensor(SIGMOID_START)))}
        self.gamma.copy_(start[self.link])

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Both ends times a factor, whatever they are learned by."""
        parts = {"min-max": ("unit",), "beta-gamma": ("m", "M"), "scale-offset": ("scale",)}[self.kind]
        for part in parts:
            self.get_parameter(part).mul_(factor) if part == "scale" else self.get_buffer(part).mul_(factor)

    def ends(self) -> tuple[Tensor, Tensor]:
        """low <= 0 <= high; of scale-offset the realised ones."""
        if self.kind == "scale-offset":
            scale, zero = self.scale_zero()
            return -scale * zero, scale * (self.top - zero)
        low, high = self._ends()
        return moved(low, low.clamp(max=0)), moved(high, high.clamp(min=0))

    def _ends(self) -> tuple[Tensor, Tensor]:
        if self.kind == "min-max":
            high = self.high * self.unit
            return (-high if self.low is None else self.low * self.unit), high
        f = {"identity": lambda t: t, "exp": torch.exp, "sigmoid": torch.sigmoid}[self.link]
        high = f(self.gamma) * self.M
        return (-high if self.beta is None else f(self.beta) * self.m), high

    def scale_zero(self) -> tuple[Float[Tensor, "*per"], Float[Tensor, "*per"]]:
        """s > 0 and the whole number z, 0 <= z <= N."""
        if self.kind == "scale-offset":
            scale = torch.where(self.scale < 0, -self.scale, self.scale)  # what crosses zero, or starts there, comes back
            scale = scale / (self.top if self.normalised else 1)
            scale = moved(scale, scale.clamp(min=SMALLEST))
            zeta = torch.full_like(scale, self.top / 2) if self.offset is None else self.offset * (self.top if self.normalised else 1)
        else:
            low, high = self.ends()
            scale = (high - low) / self.top
            scale = moved(scale, scale.clamp(min=SMALLEST))
            zeta = torch.full_like(scale, self.top / 2) if self.symmetric else -low / scale
        return scale, moved(zeta, zeta.round().clamp(0, self.top))

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """`x` as rounded, in float32 at least; NaN stays NaN."""
        return fake_quantize(x, *self.scale_zero(), self.top)

    def codes(self, x: Float[Tensor, "*any"]) -> Int[Tensor, "*any"]:
        """Codes 0 .. N of `x`."""
        code = self._unclipped(x)
        if bool(code.isnan().any()):
            raise UserError("NaN has no code; are there such activations or weights?")
        return code.clamp(0, self.top).to(torch.int32)

    def clipped(self, x: Float[Tensor, "*any"]) -> float:
        """The share of `x` whose code had to be clipped."""
        code = self._unclipped(x)
        return float(((code < 0) | (code > self.top)).sum()) / max(1, code.numel())

    def _unclipped(self, x: Tensor) -> Tensor:
        scale, zero = self.scale_zero()
        return (at_least_float32(x) / scale).round() + zero


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """s (clip(round(x / s) + z, 0, N) - z), differentiable in all three as the table above says."""
    return _FakeQuantize.apply(at_least_float32(x), scale, zero, top)


class _FakeQuantize(torch.autograd.Function):
    """One node of the graph, which keeps x; written out in operations there are eight, and as many tensors of x's size."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.top = top
        return (_fused(_rounded) if x.is_cuda else _rounded)(x, scale, zero, top)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = _fused(_gradients) if grads[0].is_cuda else _gradients
        x, scale, zero = ctx.saved_tensors
        to_x, to_scale, to_zero = gradients(grads[0], x, scale, zero, ctx.top, ctx.needs_input_grad[2])
        return to_x, to_scale, to_zero, None


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return ((x / scale).round() + zero).clamp(0, top).sub(zero).mul(scale)


def _gradients(g: Tensor, x: Tensor, scale: Tensor, zero: Tensor, top: int, zero_too: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    steps = x / scale
    code = steps.round() + zero
    outside = (code < 0) | (code > top)
    levels = code.clamp(0, top) - zero
    to_x = torch.where(outside, 0.0, g).sum_to_size(x.shape)
    to_scale = (g * torch.where(outside, levels, levels - steps)).sum_to_size(scale.shape)  # -z, N - z, e
    to_zero = ((to_x - g) * scale).sum_to_size(zero.shape) if zero_too else None  # 0 in range, -s outside
    return to_x, to_scale, to_zero


@cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """As one kernel instead of six, or a dozen: these go over every weight and input, and little else takes as long."""
    return torch.compile(function, dynamic=True)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision would round the codes themselves: a tensor's type prevails over that of a scale without dimensions."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0], None


def moved(x: Tensor, value: Tensor) -> Tensor:
    """`value` in the forward pass, to the last bit, and the gradient of `x`."""
    return _Moved.apply(x, value)
