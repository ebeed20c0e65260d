"""Walks a decoder block by block.

Only one block has weights at a time; its inputs are the outputs of the blocks before it, as quantized. Why not a
traced graph (torch.fx, as llm-compressor): tracing is where users of new architectures get stuck. A decoder is a
list of blocks called one after the other with the same arguments, and attention in `transformers` goes through one
function that can be replaced by name; nothing more is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from smidgen.errors import UserError
from smidgen.quant import attention
from smidgen.quant.checkpoint import Checkpoint, unload
from smidgen.quant.families import ATTENTION, Attention
from smidgen.quant.memory import release

BATCH_TOKENS = 2048  # tokens in one forward pass of a block: what it makes then stays in the processor's cache


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
    attention: Attention | None
    precision: torch.dtype
    "Type of the forward passes; statistics are float32 all the same."

    def matrices(self) -> list[Matrix]:
        """Every linear layer, fused ones split into query, key and value."""
        return [
            matrix
            for name, layer in self.module.named_modules()
            if isinstance(layer, nn.Linear | Conv1D)
            for matrix in self._split(name, layer)
        ]

    def _split(self, name: str, layer: nn.Module) -> list[Matrix]:
        family = self.attention
        if family is None or not name.startswith(family.module + "."):
            return [Matrix(name, None, layer)]
        leaf = name.removeprefix(family.module + ".")
        roles = [role for role in ("query", "key", "value") if leaf == getattr(family, role)]
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


def weight_of(layer: nn.Module) -> Float[Tensor, "out in"]:
    """A linear layer's weight as (out, in), a view; GPT-2 stores it the other way round."""
    w = layer.get_parameter("weight")
    return w.T if isinstance(layer, Conv1D) else w


def forward_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def decoder_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its path: the longest list of modules of one class that hold linear layers."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(m) for m in module}) == 1
        and any(isinstance(m, nn.Linear | Conv1D) for m in module[0].modules())
    ]
    if not lists:
        raise UserError(f"{type(model).__name__}: no list of decoder blocks found, so it cannot be quantized block by block")
    return max(lists, key=lambda pair: len(pair[1]))


def attention_of(model: PreTrainedModel) -> Attention | None:
    """The family's attention, None if it is not in `families.py`."""
    return ATTENTION.get(model.config.model_type)


def walk(
    checkpoint: Checkpoint, model: PreTrainedModel, tokens: Int[Tensor, "n length"] | None, device: torch.device, precision: torch.dtype
) -> Iterator[Block]:
    """Yields each block with its weights and inputs; when resumed, the next inputs pass through what was done to it.

    Without `tokens` nothing is run and blocks have no inputs.
    """
    path, blocks = decoder_list(model)
    model.config._attn_implementation = attention.NAME
    hidden, arguments = torch.empty(0, 0, 0, 0), [{}] * len(blocks)
    if tokens is not None:
        hidden, arguments = _block_inputs(checkpoint, model, path, blocks, tokens, device)
    for index, module in enumerate(blocks):
        name = f"{path}.{index}"
        checkpoint.load(module, name, device)
        block = Block(name, index, module, hidden, arguments[index], attention_of(model), precision)
        yield block
        if index + 1 < len(blocks):
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
    size = max(s for s in range(1, len(tokens) + 1) if len(tokens) % s == 0 and s <= max(1, BATCH_TOKENS // tokens.shape[1]))
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
