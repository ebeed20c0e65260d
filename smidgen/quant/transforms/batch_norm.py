"""Batch norm folded into the convolution before it (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 3.2): the same function, with fewer operations and one bias.

    gamma (W x + b - mu) / sqrt(var + eps) + beta  =  (c W) x + c (b - mu) + beta,        c = gamma / sqrt(var + eps), by output channel

mu, var are the running statistics. Weights must be quantized after it: c differs from channel to channel.
"""

from typing import Any

import torch
from torch import Tensor, nn

from smidgen.errors import UserError

CLOSE = 1e-4  # relative to the largest output: float32 sums in another order


@torch.no_grad()
def fold(module: nn.Module, call: dict[str, Any]) -> nn.Module:
    """Folds every batch norm that reads a convolution's output in this call, in place; the module is in evaluation mode.

    Convolutions are changed, batch norms become Identity. UserError: the outputs are no longer the same, since something else reads
    what a convolution makes, or uses it twice.
    """
    before = _tensors(module(**call))
    pairs = _pairs(module, call)
    for convolution, name in pairs:
        if [c for c, _ in pairs].count(convolution) > 1 or [n for _, n in pairs].count(name) > 1:
            raise UserError(f"{name}: a batch norm that is used twice, or behind a convolution that is, cannot be folded")
        parent, _, leaf = name.rpartition(".")
        _absorb(convolution, module.get_submodule(name))
        module.get_submodule(parent)._modules[leaf] = nn.Identity()
    for a, b in zip(before, _tensors(module(**call)), strict=True):
        if not torch.allclose(a, b, rtol=0, atol=CLOSE * max(float(a.abs().max()), 1e-12)):
            raise UserError(f"{type(module).__name__}: a batch norm cannot be folded, something else reads the convolution before it")
    return module


def _pairs(module: nn.Module, call: dict[str, Any]) -> list[tuple[nn.Conv2d, str]]:
    """Convolutions and the name of the batch norm that reads what they make."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by the tensor's id; kept, so that no other gets the same
    pairs: list[tuple[nn.Conv2d, str]] = []
    names = {m: name for name, m in module.named_modules()}

    def after(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            made[id(output)] = layer, output
        elif id(inputs[0]) in made and layer.track_running_stats:  # pyright: ignore  a BatchNorm2d
            pairs.append((made[id(inputs[0])][0], names[layer]))

    handles = [m.register_forward_hook(after) for m in module.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    try:
        module(**call)
    finally:
        for handle in handles:
            handle.remove()
    return pairs


def _absorb(convolution: nn.Conv2d, norm: Any) -> None:
    """In float64: c may be tiny and the bias large."""
    weight, bias, mean, variance = (
        t.double() if t is not None else torch.full_like(norm.running_var, default, dtype=torch.float64)
        for t, default in ((norm.weight, 1.0), (norm.bias, 0.0), (norm.running_mean, 0.0), (norm.running_var, 1.0))
    )
    c = weight / (variance + norm.eps).sqrt()
    old = 0.0 if convolution.bias is None else convolution.bias.double()
    shift = c * (old - mean) + bias
    dtype = convolution.weight.dtype
    convolution.weight.copy_((convolution.weight.double() * c[:, None, None, None]).to(dtype))
    convolution.bias = nn.Parameter(shift.to(dtype), requires_grad=False)


def _tensors(output: Any) -> list[Tensor]:
    """Of what a module returns."""
    if isinstance(output, Tensor):
        return [output]
    return [t for t in (output.values() if isinstance(output, dict) else output) if isinstance(t, Tensor) and t.is_floating_point()]
