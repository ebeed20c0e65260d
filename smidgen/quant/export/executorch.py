"""ExecuTorch programs for XNNPACK, with 8-bit activations ("8da4w"): model.pte, run on phones without torch.

    model.pte    forward(tokens int64 (1, n), positions int64 (n,)) -> logits (1, n, vocab), with its own cache of keys and
                 values; get_max_seq_len() and get_vocab_size() are constants
    tokenizer and config.json beside it

XNNPACK has no weight-only products: inputs of quantized layers are rounded per token to int8, while the model runs, to a
scale and zero point of their own. It recognises the three operations of `DynamicLinear` and puts one kernel in their place.
Its weights are signed and their zero point is 0, so grids have to be symmetric; code - 2^(b-1) is stored in

    int4, two per byte, low bits first, each plus 8; bfloat16 scales per group of 32 n columns    2 to 4 bits
    int8; a float32 scale per row                                                                 5 to 8 bits

A program is traced from a whole model, so unlike other formats this one holds the model in memory, in float32.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export.rest import write_config
from smidgen.quant.writing import writing

BLOCK = 32  # XNNPACK's 4-bit groups are multiples of this many columns


@dataclass
class ExecuTorch:
    """Writes one program into `folder`: `add` per block, then `finish`."""

    folder: Path
    checkpoint: Checkpoint
    model: PreTrainedModel
    "The skeleton; it is filled and its quantized layers are replaced."
    length: int = 1024
    "Tokens the cache holds, if the model's positions reach so far."

    def __post_init__(self) -> None:
        self.tokenizer = self.checkpoint.tokenizer()

    @staticmethod
    def check(model: PreTrainedModel, layers: list[str], grid: Grid) -> None:
        """Raises a UserError before any work if the format cannot hold these layers on this grid."""
        imported()
        if not grid.symmetric:
            raise UserError("executorch's XNNPACK holds symmetric grids only; use --symmetric")
        if grid.bits > 4 and grid.group is not None:
            raise UserError(f"executorch's XNNPACK holds groups at 2 to 4 bits only, not at {grid.bits}; use --group none or --bits 4")
        if grid.bits <= 4 and grid.scale_dtype != "bfloat16":
            raise UserError(
                f"executorch's XNNPACK stores scales of 4-bit weights as bfloat16, not {grid.scale_dtype}; use --scale-dtype bfloat16"
            )
        for name in layers:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise UserError(f"executorch holds Linear layers only, {name} is a {type(layer).__name__}; use --export none")
            grid.groups(layer.in_features)
            if grid.bits <= 4 and (grid.group or layer.in_features) % BLOCK:
                raise UserError(f"executorch's XNNPACK holds groups of a multiple of {BLOCK} columns, at {name} too; use --group {BLOCK}")

    def add(self, weights: dict[str, QWeight], module: nn.Module, path: str) -> None:
        """Takes a block: its quantized layers by full name, and through `module` at `path` its other parameters."""
        given = {f"{path}.{n}": p for n, p in module.named_parameters() if not p.is_meta}
        for name, q in weights.items():
            layer = self.model.get_submodule(name)
            bias = None
            if f"{name}.bias" in dict(self.model.named_parameters()):
                bias = given.get(f"{name}.bias", self.checkpoint.read([f"{name}.bias"])[f"{name}.bias"]).detach().cpu().float()
            assert isinstance(layer, nn.Linear)  # `check` saw to it
            self.model.set_submodule(name, DynamicLinear(q, bias))
        self._fill({n: p.detach() for n, p in given.items() if f"{n.rpartition('.')[0]}" not in weights})

    def finish(self) -> None:
        """Reads what belongs to no block, traces the program and writes it, last of all files."""
        tied = self.model.all_tied_weights_keys
        empty = [n for n, p in self.model.named_parameters(remove_duplicate=False) if p.is_meta and n not in tied]
        self._fill(self.checkpoint.read(empty))
        self.model.tie_weights()
        length = min(self.length, self.model.config.max_position_embeddings)
        program = lowered(Decoder(self.model.eval(), length), length, self.model.config.vocab_size)
        write_config(self.folder, self.checkpoint, self.tokenizer, {})
        with writing(self.folder):
            (self.folder / "model.pte").write_bytes(program)

    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            path, _, part = name.rpartition(".")
            parameter = nn.Parameter(value.to("cpu", torch.float32), requires_grad=False)
            self.model.get_submodule(path).register_parameter(part, parameter)


class DynamicLinear(nn.Module):
    """A linear layer in the operations XNNPACK recognises: inputs rounded per token, codes times scales, product."""

    def __init__(self, q: QWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.top = 7 if q.grid.bits <= 4 else 127
        self.group = q.codes.shape[1] // q.scale.shape[1]
        self.register_buffer("codes", (q.codes.cpu().int() - 2 ** (q.grid.bits - 1)).to(torch.int8))
        self.register_buffer("scale", q.scale.detach().cpu().float())
        self.register_buffer("zero", torch.zeros(q.scale.shape, dtype=torch.int8))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        """The product with the rounded inputs."""
        from torchao.quantization.quant_primitives import (  # pyright: ignore[reportMissingImports]
            MappingType,
            choose_qparams_affine,
            dequantize_affine,
            quantize_affine,
        )

        token: Any = (1,) * (x.ndim - 1) + (x.shape[-1],)
        scale, zero = choose_qparams_affine(x, MappingType.ASYMMETRIC, token, torch.int8, -128, 127, zero_point_dtype=torch.int8)
        rounded = quantize_affine(x, token, scale, zero, torch.int8, -128, 127)
        x = dequantize_affine(rounded, token, scale, zero, torch.int8, -128, 127, output_dtype=torch.float32)
        codes, scale, zero = (self.get_buffer(n) for n in ("codes", "scale", "zero"))
        low, high = -self.top - 1, self.top
        w = dequantize_affine(codes, (1, self.group), scale, zero, torch.int8, low, high, output_dtype=torch.float32)
        return nn.functional.linear(x, w, self.bias)


class Decoder(nn.Module):
    """The model with its cache as buffers, which a program changes in place."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__()
        from transformers import StaticCache
        from transformers.configuration_utils import get_head_shapes

        self.model = model
        self.cache: Any = StaticCache(config=model.config, max_cache_len=length)
        heads, size = get_head_shapes(model.config)
        self.cache.early_initialization(1, heads, size, torch.float32, torch.device("cpu"))
        for i, layer in enumerate(self.cache.layers):
            self.register_buffer(f"keys_{i}", torch.zeros_like(layer.keys))
            self.register_buffer(f"values_{i}", torch.zeros_like(layer.values))

    def forward(self, tokens: Int[Tensor, "1 n"], positions: Int[Tensor, "n"]) -> Float[Tensor, "1 n vocab"]:
        """Logits of tokens at consecutive positions, given those before, which the cache holds."""
        for i, layer in enumerate(self.cache.layers):  # the tracer sees buffers only where they are asked for by name
            layer.keys, layer.values = self.get_buffer(f"keys_{i}"), self.get_buffer(f"values_{i}")
            layer.cumulative_length = positions[0].clone()
        return self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True).logits


def imported() -> None:
    """A UserError if the packages are not installed."""
    try:
        import executorch.exir  # pyright: ignore[reportMissingImports]  # noqa: F401
        import torchao  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError as error:
        raise UserError(f"executorch programs need {error.name}: pip install 'smidgen[executorch]'") from error


@torch.no_grad()
def lowered(decoder: Decoder, length: int, vocabulary: int) -> bytes:
    """The program, its heavy operations handed to XNNPACK."""
    imported()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

    n = torch.export.Dim("n", min=1, max=length)
    example = (torch.zeros(1, 3, dtype=torch.long), torch.arange(3))
    traced = torch.export.export(decoder, example, dynamic_shapes=({1: n}, {0: n}), strict=False)
    edge = to_edge_transform_and_lower(
        traced,
        partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={"get_max_seq_len": length, "get_vocab_size": vocabulary},
    )
    return edge.to_executorch().buffer
