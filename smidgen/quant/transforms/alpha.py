"""One positive factor per channel between a producer and its consumers: what Quadapter, SmoothQuant and equalization have in common.

    y = Q_a(alpha * x) Q_w(W / alpha)^T + b,    alpha = exp(a)

x are the channels a producer makes (a norm, or the rows of a linear layer) and W the weights of every consumer of them, (out, in).
Without quantizers nothing changes; with them alpha decides which channels get the range's resolution and which the weights'. Folded,
the producer's rows are multiplied by alpha and the columns of W divided by it: the same operations on the same numbers, and no alpha.

    kind      producer -> consumers                                exact because
    norm      norm's gain and bias -> q, k, v or gate, up          a norm is affine in its gain and bias (Gemma's gain is 1 + weight)
    heads     v -> output projection                               attention mixes tokens, not channels
    product   up -> down                                           activation(gate) * up is linear in up
    relu      fc1 -> fc2                                           relu(alpha x) = alpha relu(x) for alpha > 0

Not foldable, so refused: GELU (not homogeneous), the head (tied, it is the embedding; untied, it is not quantized), norms whose output
the residual stream keeps. alpha times a constant is the same model where ranges follow the values, so a has mean 0 at every site.
Which of these sites the Quadapter paper uses is not known to us; two in a GPT-2 block fit the norms.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant.blocks import Block, decoder_list, family_of
from smidgen.quant.families import Fold
from smidgen.quant.linear import LINEAR, weight_of
from smidgen.quant.replay import Recorded
from smidgen.quant.simulate import Mode, QuantLinear, Scheme, activations_of, install, restore, set_mode, simulate_block
from smidgen.quant.transforms.zfold import channels, foldable, storable

KINDS = ("norm", "heads", "product", "relu")
ABSENT = {
    "norm": "its norms' outputs stay in the residual stream",
    "heads": "the family has none",
    "product": "its MLP is not gated",
    "relu": "only a relu passes positive factors on, and there is none between two of its layers (GELU does not)",
}
FEW = 4  # batches that candidates are tried on, about
SMALLEST = 1e-5  # of a largest absolute value, so that channels of zeros have logarithms


@dataclass
class Site:
    """Where a factor per channel sits."""

    fold: Fold
    a: nn.Parameter
    "Logarithms of the factors, (channels,); the very object every consumer has as `alpha`."
    source: Int[Tensor, "columns"]
    "The channel every column of the consumers reads."
    live: Tensor
    "Channels that can take a factor: not those whose gain is 0."
    consumers: list[QuantLinear] = field(repr=False)
    producer: nn.Module = field(repr=False)

    @torch.no_grad()
    def set(self, a: Float[Tensor, "channels"]) -> None:
        """Takes new logarithms; their mean becomes 0."""
        self.a.copy_(torch.where(self.live, a - a[self.live].sum() / self.live.sum().clamp(min=1), 0.0))

    @torch.no_grad()
    def store(self, dtype: torch.dtype) -> None:
        """Rounds to factors with which the gain can be stored in `dtype`, so that folding them later changes nothing."""
        if not isinstance(self.producer, LINEAR):
            factors = storable(self.producer.get_parameter("weight"), self.a.exp(), dtype, self.fold.offset)
            self.a.copy_(factors.log())

    def largest_weights(self) -> Float[Tensor, "channels"]:
        """max |W_j| over the rows of all consumers, of every channel's columns."""
        columns = torch.stack([q.weight.detach().abs().amax(0).float() for q in self.consumers]).amax(0)
        return self.per_channel(columns)

    def per_channel(self, columns: Float[Tensor, "columns"]) -> Float[Tensor, "channels"]:
        """The largest of the columns that share a channel."""
        return columns.new_zeros(len(self.a)).scatter_reduce_(0, self.source, columns, "amax")


def check(model: PreTrainedModel, kinds: tuple[str, ...]) -> None:
    """Refuses sites that the model lacks or that cannot take factors; works without weights."""
    if "head" in kinds:
        tied = model.config.get_text_config().tie_word_embeddings
        why = "it is tied to the embedding, which they would change too" if tied else "it is not quantized and gains nothing by them"
        raise UserError(f"the head takes no factors: {why}; leave it out of the sites")
    for block in _blocks(model):
        legal(block, kinds)


def kinds_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The kinds of sites that every block has; works without weights."""
    found = [{_kind(block, fold) for fold in block.family.folds} if block.family else set() for block in _blocks(model)]
    return tuple(kind for kind in KINDS if all(kind in kinds for kinds in found))


def legal(block: Block, kinds: tuple[str, ...]) -> list[Fold]:
    """The sites of these kinds in a block; a UserError where the family has none of a kind."""
    if not kinds:
        return []
    if block.family is None:
        raise UserError(f"{block.name}: the layers of this family of models are not known, so no factors can be folded into them")
    found = [_kind(block, fold) for fold in block.family.folds]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"'{kind}' is no kind of site; choose among {', '.join(KINDS)}")
        if kind not in found:
            raise UserError(f"{block.name} has no site of kind '{kind}': {ABSENT[kind]}; leave it out of the sites")
    return [fold for fold, kind in zip(block.family.folds, found, strict=True) if kind in kinds]


def _kind(block: Block, fold: Fold) -> str | None:
    if not foldable(block, fold):
        return None
    if not isinstance(block.module.get_submodule(fold.before), LINEAR):
        return "norm"
    return {"relu": "relu", "heads": "heads", "nothing": "product"}[fold.through]


@dataclass
class Adapted:
    """A block whose linear layers are simulated, with factors at its sites; weights are never changed."""

    block: Block
    layers: dict[str, QuantLinear]
    "By name inside the block."
    sites: list[Site]
    targets: Float[Tensor, "batches batch length width"] = field(repr=False)
    "The float block's outputs."
    mode: Mode
    _clips: list[nn.Parameter | None] | None = field(default=None, init=False, repr=False)
    _graphs: dict[bool, Recorded] = field(default_factory=dict, init=False, repr=False)

    def forward(self, hidden: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        """The simulated block, differentiable, in float32: bfloat16's 8 bits would round as coarsely as the quantizers."""
        out = self.block.module(hidden, **self.block.arguments)
        return out[0] if isinstance(out, tuple) else out

    def loss(self, hidden: Float[Tensor, "batch length width"], targets: Float[Tensor, "batch length width"]) -> Float[Tensor, ""]:
        """Mean squared error of the outputs."""
        return (self.forward(hidden) - targets).square().mean()

    @torch.no_grad()
    def error(self, few: bool = False) -> float:
        """Mean loss over all batches, or over a few to choose by; leaves the mean ranges those of this pass.

        On a CUDA device a graph from the second call on, for as long as it is the same parameters that clip.
        """
        clips = [activation.reach for _, activation in activations_of(self.layers)] + [quant.shrink for quant in self.layers.values()]
        if not self.targets.is_cuda or self._clips is None or any(a is not b for a, b in zip(clips, self._clips, strict=True)):
            self._clips, self._graphs = clips, {}
            return float(self._error(few))
        if few not in self._graphs:
            self._graphs[few] = Recorded(partial(self._error, few))
        return float(self._graphs[few]())

    def _error(self, few: bool) -> Float[Tensor, ""]:
        for _, activation in activations_of(self.layers):
            activation.forget()
        every = max(1, len(self.targets) // FEW) if few else 1
        return torch.stack([self.loss(self.block.hidden[i], self.targets[i]) for i in range(0, len(self.targets), every)]).mean()

    @cached_property
    def energy(self) -> float:
        """Mean square of what the block should return."""
        return float(self.targets.square().mean())

    @torch.no_grad()
    def largest_inputs(self) -> list[Float[Tensor, "_"]]:
        """max |x_j| over all tokens, of every channel of every site, in the float block."""
        largest = [torch.zeros(len(s.source), device=s.a.device) for s in self.sites]

        def watch(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                torch.maximum(largest[i], inputs[0].abs().flatten(0, -2).amax(0).float(), out=largest[i])

            return hook

        handles = [s.consumers[0].layer.register_forward_pre_hook(watch(i)) for i, s in enumerate(self.sites)]
        restore(self.block.module, self.layers)
        try:
            for hidden in self.block.hidden:
                self.block.module(hidden, **self.block.arguments)
        finally:
            install(self.block.module, self.layers)
            for handle in handles:
                handle.remove()
        return [site.per_channel(columns) for site, columns in zip(self.sites, largest, strict=True)]


def adapted(block: Block, scheme: Scheme, kinds: tuple[str, ...]) -> Adapted:
    """Simulates a block, with a = 0 at its sites; `released` undoes it."""
    folds = legal(block, kinds)
    sources = [source_of(block, fold) for fold in folds]
    targets = torch.stack([block.run(hidden) for hidden in block.hidden])
    layers = simulate_block(block.module, block.family, scheme)
    block.module.requires_grad_(False)
    device = block.hidden.device
    mode: Mode = "token" if scheme.per_token else "batch"
    set_mode(layers, mode)
    sites = []
    for fold, source in zip(folds, sources, strict=True):
        producer = block.module.get_submodule(fold.before)
        producer = layers[fold.before].layer if isinstance(producer, QuantLinear) else producer
        a = nn.Parameter(torch.zeros(int(source.max()) + 1, device=device))
        live = torch.ones_like(a, dtype=torch.bool) if isinstance(producer, LINEAR) else producer.get_parameter("weight") + fold.offset != 0
        consumers = [layers[name] for name in fold.after]
        share(consumers, a, source)
        sites.append(Site(fold, a, source, live, consumers, producer))
    return Adapted(block, layers, sites, targets, mode)


def released(adapted: Adapted) -> None:
    """The block as it was."""
    restore(adapted.block.module, adapted.layers)


def source_of(block: Block, fold: Fold) -> Int[Tensor, "columns"]:
    """The channel every column of a site's consumers reads."""
    return channels(block, fold, weight_of(block.module.get_submodule(fold.after[0])).shape[1])


def share(consumers: list[QuantLinear], a: nn.Parameter, source: Int[Tensor, "columns"]) -> None:
    """Gives all consumers of a site the very same factors."""
    for quant in consumers:
        quant.alpha = a
        quant.source = None if len(source) == len(a) else source


@contextmanager
def bare(model: PreTrainedModel, layers: dict[str, QuantLinear]) -> Iterator[list[Block]]:
    """The blocks of a model with their own layers, for as long as the context lasts."""
    restore(model, layers)
    try:
        yield _blocks(model)
    finally:
        install(model, layers)


def _blocks(model: PreTrainedModel) -> list[Block]:
    path, modules = decoder_list(model)
    hidden = torch.empty(0, 0, 0, 0, device=next(modules.parameters()).device)
    return [Block(f"{path}.{i}", i, module, hidden, {}, family_of(model), torch.float32) for i, module in enumerate(modules)]
