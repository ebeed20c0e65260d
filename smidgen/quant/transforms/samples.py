"""Some tokens of a float block: what methods without gradients try ranges and factors on.

    u_t              a few tokens' values of every quantized tensor, as its factors leave them, the first token of a text among them
    n_t              how many tokens it stands for
    low_j, high_j    every channel's extremes over all tokens, in the mean over batches

The first token stands for itself: decoders rest attention on it and give it a few huge activations (Sun et al., arXiv 2402.17762).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.quant.simulate import Activation, QuantLinear, activations_of, set_mode, unquantized
from smidgen.quant.transforms.alpha import Adapted

ROWS = 512  # tokens, about


@dataclass(frozen=True)
class Sample:
    """Of one tensor."""

    rows: Float[Tensor, "n in"]
    stands: Float[Tensor, "n"]
    channel_low: Float[Tensor, "in"]
    channel_high: Float[Tensor, "in"]
    low: Float[Tensor, ""]
    high: Float[Tensor, ""]
    "Mean extremes of the batches."


@torch.no_grad()
def sampled(block: Adapted) -> dict[Activation, Sample]:
    """Of every quantized tensor of the float block, with the present factors."""
    batches, windows, length = block.targets.shape[:3]
    chosen = torch.linspace(0, length - 1, min(length, max(2, ROWS // (batches * windows))), device=block.targets.device).long()
    stands = torch.full((len(chosen),), (length - 1) / max(1, len(chosen) - 1), device=block.targets.device)
    stands[0] = 1.0
    rows: dict[Activation, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def watch(quant: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(quant, QuantLinear)
        factors, x = quant.factors(), inputs[0].float()
        u = x if factors is None else x * factors
        channels = u.flatten(0, -2)
        rows.setdefault(quant.activation, []).append((u[..., chosen, :].flatten(0, -2), channels.amin(0), channels.amax(0)))

    handles = [block.layers[name].register_forward_pre_hook(watch) for name, _ in activations_of(block.layers)]
    with unquantized(block.layers):
        for hidden in block.block.hidden:
            block.forward(hidden)
    set_mode(block.layers, block.mode)
    for handle in handles:
        handle.remove()
    every, found = stands.repeat(batches * windows), {}
    for activation, parts in rows.items():
        u, low, high = (list(part) for part in zip(*parts, strict=True))
        ends = torch.stack([t.min() for t in low]).mean(), torch.stack([t.max() for t in high]).mean()
        found[activation] = Sample(torch.cat(u), every, torch.stack(low).mean(0), torch.stack(high).mean(0), *ends)
    return found
