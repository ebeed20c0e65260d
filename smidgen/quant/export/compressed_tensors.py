"""compressed-tensors checkpoints, "pack-quantized": loaded by transformers, vLLM and SGLang.

Per quantized layer, shape (out, in), `b` bits:

    weight_packed       int32 (out, ceil(in b / 32))        codes, see pack.py
    weight_scale        (out, groups)
    weight_zero_point   int32 (ceil(out b / 32), groups)    packed along `out`; asymmetric grids only
    weight_shape        int64 (2,)

The library's integers are signed, ours start at 0: its value is code - 2^(b-1), its zero point zero - 2^(b-1), and
since it adds 2^(b-1) again before packing, what is packed are our codes and our zeros.

Shards are written while blocks are being solved.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.checkpoint import Checkpoint, index
from smidgen.quant.export.rest import Rest
from smidgen.quant.formats import must_be_uniform
from smidgen.quant.pack import pack, unpack
from smidgen.quant.shards import Shards

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")  # of a quantized layer


@dataclass
class CompressedTensors:
    """Writes one checkpoint into `folder`: `add` per block, then `finish`."""

    folder: Path
    checkpoint: Checkpoint
    model: PreTrainedModel
    "The skeleton: says which parameters exist."
    layers: dict[str, Grid] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shards = Shards(self.folder)
        self.rest = Rest(self.checkpoint)

    @staticmethod
    def check(model: PreTrainedModel, layers: list[str], grid: Grid) -> None:
        """Raises a UserError before any work if the format cannot hold these layers on this grid."""
        must_be_uniform(grid, "compressed-tensors checkpoints")
        for name in layers:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise UserError(f"compressed-tensors holds Linear layers only, {name} is a {type(layer).__name__}; use --export none")
            grid.groups(layer.in_features)

    def add(self, weights: dict[str, QWeight], module: nn.Module, path: str) -> None:
        """Takes a block: its quantized layers by full name, and through `module` at `path` its other parameters."""
        tensors: dict[str, Tensor] = {}
        for name, q in weights.items():
            self.layers[name] = q.grid
            self.rest.done.add(f"{name}.weight")
            tensors |= {f"{name}.{key}": value for key, value in packed(q).items()}
        self.shards.add(tensors | self.rest.of_block(module, path))

    def finish(self) -> None:
        """Writes what belongs to no block, the configuration and the tokenizer."""
        self.shards.add(self.rest.of_model(self.model))
        self.shards.finish()
        self.rest.describe(self.folder, self.model, self.checkpoint.dtype(), self._quantization_config())

    def _quantization_config(self) -> dict[str, Any]:
        from compressed_tensors.quantization import QuantizationConfig

        linear = {n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        by_grid: dict[Grid, list[str]] = {}
        for name, grid in self.layers.items():
            by_grid.setdefault(grid, []).append(name)
        config = QuantizationConfig.model_validate(
            {
                "config_groups": {
                    f"group_{i}": {
                        "targets": ["Linear"] if len(by_grid) == 1 else sorted(names),
                        "weights": weight_scheme(grid),
                        "format": "pack-quantized",
                    }
                    for i, (grid, names) in enumerate(sorted(by_grid.items(), key=lambda pair: pair[0].bits))
                },
                "ignore": sorted(linear - set(self.layers)),
                "format": "pack-quantized",
                "quantization_status": "compressed",
            }
        )
        # `dequantize`: transformers 5.23 with compressed-tensors 0.20 expects unpacked zero points otherwise, and refuses
        # every asymmetric checkpoint; loading then yields ordinary layers. Other runtimes ignore the key.
        return config.model_dump(mode="json") | {"quant_method": "compressed-tensors", "dequantize": True}


def weight_scheme(grid: Grid) -> dict[str, Any]:
    """The format's words for a grid."""
    return {
        "num_bits": grid.bits,
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group is None else "group",
        "group_size": grid.group,
    }


def packed(q: QWeight) -> dict[str, Tensor]:
    """The tensors of one layer."""
    grid = q.grid
    dtype = getattr(torch, grid.scale_dtype)
    codes = q.codes.cpu()
    tensors = {
        "weight_packed": torch.from_numpy(pack(codes.numpy(), grid.bits)),
        "weight_scale": q.scale.to("cpu", dtype),
        "weight_shape": torch.tensor(codes.shape),
    }
    if not grid.symmetric:
        zero = q.zero.to("cpu", torch.uint8).numpy()
        tensors["weight_zero_point"] = torch.from_numpy(pack(zero.T.copy(), grid.bits).T.copy())
    return tensors


class Packed:
    """The quantized layers of a written artifact, read one at a time."""

    def __init__(self, folder: Path) -> None:
        config = _quantization_config(folder)
        if config.get("quant_method") != "compressed-tensors" or config.get("format") != "pack-quantized":
            raise UserError(f"{folder} is no artifact of smidgen: its config.json has no pack-quantized compressed-tensors weights")
        self.folder = folder
        self.files = index(folder)
        self.schemes = {target: group["weights"] for group in config["config_groups"].values() for target in group["targets"]}
        self.layers = [name.removesuffix(".weight_packed") for name in self.files if name.endswith(".weight_packed")]
        if not self.layers:
            raise UserError(f"{folder}: no quantized layers; the weights do not belong to this config.json")

    def grid(self, layer: str) -> Grid:
        """The grid a layer was solved on."""
        scheme = self.schemes.get(layer) or self.schemes["Linear"]
        stored = str(self._tensor(f"{layer}.weight_scale").dtype).removeprefix("torch.")
        return Grid(scheme["num_bits"], scheme["group_size"] if scheme["strategy"] == "group" else None, scheme["symmetric"], stored)

    def read(self, layer: str) -> QWeight:
        """The opposite of `packed`."""
        grid = self.grid(layer)
        wanted = [p for p in PARTS if not (grid.symmetric and p == "weight_zero_point")]
        parts = {part: self._tensor(f"{layer}.{part}") for part in wanted}
        rows, columns = parts["weight_shape"].tolist()
        codes = torch.from_numpy(unpack(parts["weight_packed"].numpy(), grid.bits, columns))
        scale = parts["weight_scale"].float()
        zero = torch.full_like(scale, 2 ** (grid.bits - 1))
        if not grid.symmetric:
            zero = torch.from_numpy(unpack(parts["weight_zero_point"].T.contiguous().numpy(), grid.bits, rows)).T.float()
        return QWeight(codes, scale, zero, grid)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"{self.folder}: the weights lack {name}; the artifact is damaged")
        with safe_open(self.files[name], "pt") as tensors:
            return tensors.get_tensor(name)


def _quantization_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    try:
        return json.loads(file.read_text()).get("quantization_config") or {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error


def is_mixed(folder: Path) -> bool:
    """Whether an artifact has layers of unequal bits.

    The format holds them, but transformers 5.23 unpacks every layer by the first group's bits.
    """
    return len(_quantization_config(folder).get("config_groups") or {}) > 1


def load_mixed(folder: Path, dtype: torch.dtype) -> Any:
    """An artifact, whose layers may have unequal bits, as ordinary layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    packed = Packed(folder)
    config = AutoConfig.from_pretrained(folder)
    delattr(config, "quantization_config")
    tensors: dict[str, Tensor] = {f"{layer}.weight": packed.read(layer).dequantize() for layer in packed.layers}
    for file in folder.glob("*.safetensors"):
        tensors |= {n: t for n, t in load_file(file).items() if n.rpartition(".")[2] not in PARTS}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict({n: t.to(dtype) for n, t in tensors.items()}, strict=False)
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise UserError(f"{folder}: the weights do not fit the model: {', '.join([*missing, *unexpected][:3])}")
    model.tie_weights()
    return model
