"""Walks a decoder block by block.

Only one block has weights at a time; its inputs are the outputs of the blocks before it, as quantized. Why not a
traced graph (torch.fx, as llm-compressor): tracing is where users of new architectures get stuck. A decoder is a
list of blocks called one after the other with the same arguments, and attention in `transformers` goes through one
function that can be replaced by name; nothing more is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant import attention
from smidgen.quant.checkpoint import Checkpoint, unload
from smidgen.quant.families import FAMILIES, Family
from smidgen.quant.linear import LINEAR, weight_of
from smidgen.quant.memory import release

Inputs = Literal["quantized", "float", "both"]
BATCHES = 8  # at least, where there are so many sequences: the last can be held out
BATCH_TOKENS = 2048  # tokens in one forward pass of a block: what it makes then stays in the processor's cache
ON_CUDA = 8  # times as many there, where the time goes into starting kernels


@dataclass
class Matrix:
    """Rows of a linear layer that are solved together."""

    layer: str
    role: str | None
    "query, key or value where the family's attention is known, else None."
    module: nn.Module = field(repr=False)
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def name(self) -> str:
        """Layer, and the role where a fused layer holds several."""
        return self.layer if self.rows == slice(None) else f"{self.layer}[{self.role}]"

    def weight(self) -> Float[Tensor, "out in"]:
        """The rows' weights as a view, whichever way the layer stores them."""
        return weight_of(self.module)[self.rows]


@dataclass
class Block:
    """One decoder block with its weights, and what flows into it."""

    name: str
    index: int
    module: nn.Module = field(repr=False)
    hidden: Float[Tensor, "batches batch length width"] = field(repr=False)
    arguments: dict[str, Any] = field(repr=False)
    family: Family | None
    precision: torch.dtype
    "Type of the forward passes; statistics are float32 all the same."
    reference: Float[Tensor, "batches batch length width"] | None = field(default=None, repr=False)
    "The inputs in the unquantized model, where those are followed too; the same tensor as `hidden` if only they are."

    def pre_norm(self) -> bool:
        """Whether norms read the residual stream, and not what follows it."""
        switch = self.family.pre_norm if self.family else None
        return switch is None or vars(self.module)[switch]

    def matrices(self) -> list[Matrix]:
        """Every linear layer, fused ones split into query, key and value."""
        return [matrix for name, layer in self.module.named_modules() if isinstance(layer, LINEAR) for matrix in self._split(name, layer)]

    def _split(self, name: str, layer: nn.Module) -> list[Matrix]:
        if self.family is None or not name.startswith(self.family.attention.module + "."):
            return [Matrix(name, None, layer)]
        attention = self.family.attention
        leaf = name.removeprefix(attention.module + ".")
        projections = {"query": attention.query, "key": attention.key, "value": attention.value}
        roles = [role for role, projection in projections.items() if leaf == projection]
        if len(roles) < 2:
            return [Matrix(name, roles[0] if roles else None, layer)]
        size = len(weight_of(layer)) // len(roles)
        return [Matrix(name, role, layer, slice(i * size, (i + 1) * size)) for i, role in enumerate(roles)]

    @torch.no_grad()
    def run(self, hidden: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        """One forward pass."""
        with torch.autocast(hidden.device.type, self.precision, enabled=self.precision != torch.float32):
            out = self.module(hidden, **self.arguments)
        return (out[0] if isinstance(out, tuple) else out).float()


def decoder_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its path: the longest list of modules of one class that hold linear layers."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(m) for m in module}) == 1
        and any(isinstance(m, LINEAR) for m in module[0].modules())
    ]
    if not lists:
        raise UserError(f"{type(model).__name__}: no list of decoder blocks found, so it cannot be quantized block by block")
    return max(lists, key=lambda pair: len(pair[1]))


def widest(model: PreTrainedModel) -> int:
    """The most inputs any linear layer of the blocks has."""
    return max(weight_of(m).shape[1] for m in decoder_list(model)[1].modules() if isinstance(m, LINEAR))


def family_of(model: PreTrainedModel) -> Family | None:
    """The model's family, None if it is not in `families.py`."""
    return FAMILIES.get(model.config.model_type)


def walk(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    tokens: Int[Tensor, "n length"] | None,
    device: torch.device,
    precision: torch.dtype,
    inputs: Inputs = "quantized",
) -> Iterator[Block]:
    """Yields each block with its weights and inputs; when resumed, the next inputs pass through what was done to it.

    With `inputs` "float" they are those of the unquantized model instead, with "both" its stream is followed beside
    (`Block.reference`); `collect` then advances every stream. Without `tokens` nothing is run and blocks have no inputs.
    """
    path, blocks = decoder_list(model)
    model.config._attn_implementation = attention.NAME
    hidden, arguments = torch.empty(0, 0, 0, 0), [{}] * len(blocks)
    if tokens is not None:
        hidden, arguments = _block_inputs(checkpoint, model, path, blocks, tokens, device)
    reference = {"quantized": None, "float": hidden, "both": hidden.clone()}[inputs]
    for index, module in enumerate(blocks):
        name = f"{path}.{index}"
        checkpoint.load(module, name, device)
        block = Block(name, index, module, hidden, arguments[index], family_of(model), precision, reference)
        yield block
        if index + 1 < len(blocks) and reference is None:
            for batch in hidden:
                batch.copy_(block.run(batch))
        unload(module)
        release()


class _Catcher(nn.Module):
    """Stands in for a block: keeps the arguments it is called with, computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.hidden: list[Tensor] = []

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(a is not None for a in args):
            kwargs["attention_mask"] = next(a for a in args if isinstance(a, Tensor))
        self.arguments, self.hidden = kwargs, [hidden]
        return hidden


def _block_inputs(
    checkpoint: Checkpoint, model: PreTrainedModel, path: str, blocks: nn.ModuleList, tokens: Tensor, device: torch.device
) -> tuple[Float[Tensor, "batches batch length width"], list[dict[str, Any]]]:
    """Runs everything before the blocks; returns their common input and each block's other arguments."""
    body = model.base_model
    checkpoint.load(body, model.base_model_prefix, device, skip=(path + ".",))
    kept = list(blocks)
    catchers = [_Catcher() for _ in kept]
    at_once = BATCH_TOKENS * (ON_CUDA if device.type == "cuda" else 1)
    most = max(1, min(at_once // tokens.shape[1], len(tokens) // BATCHES))
    size = max(s for s in range(1, most + 1) if len(tokens) % s == 0)
    hidden = []
    try:
        for i, catcher in enumerate(catchers):
            blocks[i] = catcher
        for batch in tokens.view(-1, size, tokens.shape[1]):
            body(batch.to(device), use_cache=False)
            hidden.append(catchers[0].hidden[0].float())
    finally:
        for i, block in enumerate(kept):
            blocks[i] = block
    unload(body)
    return torch.stack(hidden), [c.arguments for c in catchers]
