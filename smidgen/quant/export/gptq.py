"""GPTQ checkpoints, "gptq_v2": loaded by GPTQModel, by transformers through it, and by vLLM and SGLang on GPUs.

The name is the layout's, that of the first AutoGPTQ; codes of any solver fit. Per quantized layer, shape (out, in), `b` bits:

    qweight    int32 (in b / 32, out)        codes, packed along `in`
    qzeros     int32 (groups, out b / 32)    zero points, packed along `out`; symmetric grids store 2^(b-1)
    scales     float16 (groups, out)
    g_idx      int32 (in,)                   group of every column, j // group

and value[o, j] = scales[g, o] * (code[o, j] - zero[g, o]) with g = g_idx[j]. Everything is transposed: a GPU's threads, each
with an output of its own, then read neighbouring words. A scale per row is group_size -1, one group.

Codes follow each other without gaps, low bit first, as in pack.py. At 2, 4 and 8 bits a word holds 16, 8 or 4 of them:

    bit 0                                           bit 31
    [c0][c1][c2][c3][c4][c5][c6][c7]                              4 bits

At 3 bits three words hold 32, and codes 10 and 21 lie across two of them:

    word 0   [c0][c1] ... [c9][c10, low 2 bits]
    word 1   [c10, high bit][c11] ... [c20][c21, low bit]
    word 2   [c21, high 2 bits][c22] ... [c31]

Older checkpoints ("gptq") store zero - 1 in qzeros, with which a zero of 0 wraps around; we write and read "gptq_v2" only,
which stores zero itself.

>>> codes = torch.zeros(8, 8, dtype=torch.uint8)
>>> codes[0] = torch.arange(1, 9)                        # the first row's codes: 1 2 3 4 5 6 7 8
>>> zero = torch.full((8, 1), 8.0)
>>> zero[0] = 7                                          # its zero point; 8 in the others
>>> parts = packed(QWeight(codes, torch.full((8, 1), 0.5), zero, Grid(4, scale_dtype="float16")))
>>> [f"{parts[p][0, 0].item() & 0xFFFFFFFF:08x}" for p in ("qweight", "qzeros")]
['87654321', '88888887']
>>> (parts["scales"][0, 0] * (3 - 7)).item()             # the third weight of the first row
-2.0
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen import __version__
from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export.rest import Rest
from smidgen.quant.formats import must_be_uniform
from smidgen.quant.pack import pack, unpack
from smidgen.quant.shards import Shards
from smidgen.quant.writing import writing

BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # and whole rows: what GPTQModel's kernels take
MULTIPLE = 32  # of both sizes of a layer: whole words of codes and of zero points, at any bits
PARTS = ("qweight", "qzeros", "scales", "g_idx")  # of a quantized layer


@dataclass
class Gptq:
    """Writes one checkpoint into `folder`: `add` per block, then `finish`."""

    folder: Path
    checkpoint: Checkpoint
    model: PreTrainedModel
    "The skeleton: says which parameters exist."
    grid: Grid | None = None
    "Of every layer; known from the first on."

    def __post_init__(self) -> None:
        self.shards = Shards(self.folder)
        self.rest = Rest(self.checkpoint)

    @staticmethod
    def check(model: PreTrainedModel, layers: list[str], grid: Grid) -> None:
        """Raises a UserError before any work if the format cannot hold these layers on this grid."""
        must_be_uniform(grid, "gptq checkpoints")
        if grid.bits not in BITS:
            nearest = min(BITS, key=lambda b: (abs(b - grid.bits), -b))
            raise UserError(f"gptq checkpoints hold 2, 3, 4 or 8 bits, not {grid.bits}; use --bits {nearest}")
        if grid.scale_dtype == "float32":
            raise UserError("gptq checkpoints store scales as float16, not float32; use --scale-dtype float16")
        columns = []
        for name in layers:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise UserError(f"gptq checkpoints hold Linear layers only, {name} is a {type(layer).__name__}; use --export none")
            if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                shape = f"{layer.out_features} x {layer.in_features}"
                raise UserError(
                    f"gptq checkpoints hold rows and columns in multiples of {MULTIPLE}, {name} is {shape}; use --export compressed-tensors"
                )
            columns.append(layer.in_features)
        if grid.group is not None and grid.group not in GROUPS:
            fitting = [g for g in GROUPS if not any(n % g for n in columns)]  # never empty: 16 divides 32
            nearest = min(fitting, key=lambda g: abs(g - (grid.group or 0)))
            raise UserError(f"gptq checkpoints hold groups of 16, 32, ... 1024 columns, not {grid.group}; use --group {nearest}")
        for n in columns:
            grid.groups(n)
        head = model.get_output_embeddings()
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and layer is not head and name not in layers:
                raise UserError(
                    f"gptq checkpoints quantize all Linear layers but the head, {name} would be left; use --export compressed-tensors"
                )

    def add(self, weights: dict[str, QWeight], module: nn.Module, path: str) -> None:
        """Takes a block: its quantized layers by full name, and through `module` at `path` its other parameters."""
        tensors: dict[str, Tensor] = {}
        for name, q in weights.items():
            self.grid = self.grid or q.grid
            if q.grid != self.grid:
                raise UserError(
                    f"gptq checkpoints have one grid, {name} has another: leave out --target-bpw or use --export compressed-tensors"
                )
            self.rest.done.add(f"{name}.weight")
            try:
                tensors |= {f"{name}.{key}": value for key, value in packed(q).items()}
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        self.shards.add(tensors | self.rest.of_block(module, path))

    def finish(self) -> None:
        """Writes what belongs to no block, the configuration and the tokenizer."""
        self.shards.add(self.rest.of_model(self.model))
        self.shards.finish()
        if self.grid is None:
            raise UserError(f"{self.checkpoint.folder}: no layer was quantized")
        quantization = quantization_config(self.grid)
        with writing(self.folder):
            (self.folder / "quantize_config.json").write_text(json.dumps(quantization, indent=1))
        dtype = torch.bfloat16 if self.checkpoint.dtype() == torch.bfloat16 else torch.float16  # kernels compute in 16 bits
        self.rest.describe(self.folder, self.model, dtype, quantization)


def quantization_config(grid: Grid) -> dict[str, Any]:
    """The format's words for a grid, in config.json and, for older readers, in quantize_config.json."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": grid.bits,
        "group_size": -1 if grid.group is None else grid.group,
        "sym": grid.symmetric,
        "desc_act": False,
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": [f"smidgen:{__version__}"]},
    }


def packed(q: QWeight) -> dict[str, Tensor]:
    """The tensors of one layer."""
    bits, columns = q.grid.bits, q.codes.shape[1]
    scale = q.scale.cpu()
    scales = scale.to(torch.float16)
    if not torch.equal(scales.to(scale.dtype), scale):
        raise UserError(f"scales from {scale.min():.1e} to {scale.max():.1e} are not all float16 numbers; use --scale-dtype float16")
    zero = q.zero.to("cpu", torch.uint8).T.contiguous()  # (groups, out)
    return {
        "qweight": torch.from_numpy(pack(q.codes.cpu().numpy(), bits)).T.contiguous(),
        "qzeros": torch.from_numpy(pack(zero.numpy(), bits)),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // scale.shape[1]),
    }


def unpacked(parts: dict[str, Tensor], grid: Grid) -> QWeight:
    """The opposite of `packed`; a UserError if the tensors do not fit together."""
    columns, rows = len(parts["g_idx"]), parts["scales"].shape[-1]
    groups = grid.groups(columns)
    expected = {
        "qweight": (torch.int32, (columns * grid.bits // 32, rows)),
        "qzeros": (torch.int32, (groups, rows * grid.bits // 32)),
        "scales": (torch.float16, (groups, rows)),
        "g_idx": (torch.int32, (columns,)),
    }
    for name, (dtype, shape) in expected.items():
        found = parts[name]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise UserError(f"{name} should be {dtype} {shape}, not {found.dtype} {tuple(found.shape)}")
    if not torch.equal(parts["g_idx"], torch.arange(columns, dtype=torch.int32) // (columns // groups)):
        raise UserError("g_idx is not in order; only checkpoints without act-order (desc_act) can be read")
    codes = torch.from_numpy(unpack(parts["qweight"].T.contiguous().numpy(), grid.bits, columns))
    zero = torch.from_numpy(unpack(parts["qzeros"].numpy(), grid.bits, rows)).T.float()
    scale = parts["scales"].T.float()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise UserError("scales are not all positive numbers")
    if grid.symmetric and not bool((zero == 2 ** (grid.bits - 1)).all()):
        raise UserError(f"a symmetric checkpoint has zero points other than {2 ** (grid.bits - 1)}")
    return QWeight(codes, scale.contiguous(), zero.contiguous(), grid)


def read(folder: Path) -> dict[str, QWeight]:
    """The quantized layers of a "gptq_v2" checkpoint by full name; a UserError if it is damaged or something else."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    except (ValueError, AttributeError) as error:  # not text, not JSON, or JSON that is no table
        raise UserError(f"{folder}: config.json is not usable: {error}") from error
    grid = _grid(folder, config)
    files = Checkpoint(folder, folder.name).files
    layers: dict[str, QWeight] = {}
    for name in sorted(n.removesuffix(".qweight") for n in files if n.endswith(".qweight")):
        parts: dict[str, Tensor] = {}
        for part in PARTS:
            if f"{name}.{part}" not in files:
                raise UserError(f"{folder}: the weights lack {name}.{part}")
            parts[part] = _tensor(files[f"{name}.{part}"], f"{name}.{part}")
        try:
            layers[name] = unpacked(parts, grid)
        except UserError as error:
            raise UserError(f"{folder}: {name}: {error}") from error
    if not layers:
        raise UserError(f"{folder}: config.json promises gptq layers and the weights have none")
    return layers


def _grid(folder: Path, config: dict[str, Any]) -> Grid:
    """The grid of a quantization_config that is ours to read."""
    if config.get("quant_method") != "gptq":
        raise UserError(f"{folder} is not a gptq checkpoint: its quant_method is {config.get('quant_method', 'not given')}")
    if config.get("checkpoint_format") != "gptq_v2":
        given = config.get("checkpoint_format", "not given")
        raise UserError(f"{folder}: checkpoint_format is {given}; only gptq_v2, which stores zero points as they are, can be read")
    if config.get("desc_act") or config.get("dynamic"):
        raise UserError(f"{folder}: act-order (desc_act) and settings per layer (dynamic) cannot be read")
    bits, group, symmetric = (config.get(key) for key in ("bits", "group_size", "sym"))
    if bits not in BITS or not isinstance(group, int) or group == 0 or group < -1 or not isinstance(symmetric, bool):
        raise UserError(f"{folder}: bits {bits}, group_size {group}, sym {symmetric} describe no gptq grid")
    return Grid(bits, None if group == -1 else group, symmetric, "float16")


def _tensor(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from error
