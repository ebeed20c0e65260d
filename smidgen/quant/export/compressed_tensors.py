"""compressed-tensors checkpoints, "pack-quantized": loaded by transformers, vLLM and SGLang.

Per quantized layer, shape (out, in), `b` bits:

    weight_packed       int32 (out, ceil(in b / 32))        codes, see pack.py
    weight_scale        (out, groups)
    weight_zero_point   int32 (ceil(out b / 32), groups)    packed along `out`; asymmetric grids only
    weight_shape        int64 (2,)

The library's integers are signed, ours start at 0: its value is code - 2^(b-1), its zero point zero - 2^(b-1), and
since it adds 2^(b-1) again before packing, what is packed are our codes and our zeros.

Shards are written while blocks are being solved, so that no more than `SHARD` bytes wait in memory.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.pack import pack

SHARD = 256 * 2**20  # bytes


@dataclass
class CompressedTensors:
    """Writes one checkpoint into `folder`: `add` per block, then `finish`."""

    folder: Path
    checkpoint: Checkpoint
    model: PreTrainedModel
    "The skeleton: says which parameters exist."
    grid: Grid
    waiting: dict[str, Tensor] = field(default_factory=dict)
    shards: list[list[str]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)

    @staticmethod
    def check(model: PreTrainedModel, layers: list[str], grid: Grid) -> None:
        """Raises a UserError before any work if the format cannot hold these layers on this grid."""
        for name in layers:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise UserError(f"compressed-tensors holds Linear layers only, {name} is a {type(layer).__name__}; use --export none")
            grid.groups(layer.in_features)

    def add(self, weights: dict[str, QWeight], module: nn.Module, path: str) -> None:
        """Takes a block: its quantized layers by full name, and through `module` at `path` its other parameters."""
        for name, q in weights.items():
            self.layers.add(name)
            self.done.add(f"{name}.weight")
            self.waiting |= {f"{name}.{key}": value for key, value in packed(q, self.grid).items()}
        self._copy([f"{path}.{n}" for n, _ in module.named_parameters()])
        if sum(t.nbytes for t in self.waiting.values()) > SHARD:
            self._flush()

    def finish(self) -> None:
        """Writes what belongs to no block, the configuration and the tokenizer."""
        tied = self.model.all_tied_weights_keys
        self._copy([n for n, _ in self.model.named_parameters(remove_duplicate=False) if n not in tied])
        self._flush()
        names = self._name_shards()
        total = sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))
        if len(set(names.values())) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": names}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config = self.checkpoint.config.to_diff_dict()
        config.pop("_name_or_path", None)
        config["architectures"] = [type(self.model).__name__]
        config["dtype"] = str(self.checkpoint.dtype()).removeprefix("torch.")
        config["quantization_config"] = self._quantization_config()
        (self.folder / "config.json").write_text(json.dumps(config, indent=1, default=str))
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(self.folder)
        self.checkpoint.tokenizer().save_pretrained(self.folder)

    def _copy(self, names: list[str]) -> None:
        """Unquantized parameters: 16-bit as they are, float32 matrices as float16."""
        names = [n for n in names if n not in self.done]
        self.done |= set(names)
        for name, value in self.checkpoint.read(names).items():
            self.waiting[name] = half(value, name)

    def _flush(self) -> None:
        if self.waiting:
            file = self.folder / f"shard-{len(self.shards)}.safetensors"
            save_file(self.waiting, file, metadata={"format": "pt"})
            file.chmod(0o644)  # safetensors writes through a private temporary file
            self.shards.append(list(self.waiting))
            self.waiting = {}

    def _name_shards(self) -> dict[str, str]:
        """Gives the shards their usual names; returns tensor -> file."""
        names = {}
        for i, tensors in enumerate(self.shards):
            file = f"model-{i + 1:05}-of-{len(self.shards):05}.safetensors" if len(self.shards) > 1 else "model.safetensors"
            (self.folder / f"shard-{i}.safetensors").rename(self.folder / file)
            names |= dict.fromkeys(tensors, file)
        return names

    def _quantization_config(self) -> dict[str, Any]:
        from compressed_tensors.quantization import QuantizationConfig

        group = self.grid.group
        weights = {
            "num_bits": self.grid.bits,
            "symmetric": self.grid.symmetric,
            "strategy": "channel" if group is None else "group",
            "group_size": group,
        }
        linear = {n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        config = QuantizationConfig.model_validate(
            {
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
                "ignore": sorted(linear - self.layers),
                "format": "pack-quantized",
                "quantization_status": "compressed",
            }
        )
        # `dequantize`: transformers 5.23 with compressed-tensors 0.20 expects unpacked zero points otherwise, and refuses
        # every asymmetric checkpoint; loading then yields ordinary layers. Other runtimes ignore the key.
        return config.model_dump(mode="json") | {"quant_method": "compressed-tensors", "dequantize": True}


def packed(q: QWeight, grid: Grid) -> dict[str, Tensor]:
    """The tensors of one layer."""
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


def half(value: Tensor, name: str) -> Tensor:
    """float32 matrices as float16; vectors (norms, biases) and 16-bit tensors unchanged."""
    if value.dtype != torch.float32 or value.ndim < 2:
        return value.clone()
    if not bool((value.abs() <= torch.finfo(torch.float16).max).all()):
        raise UserError(f"{name} holds NaN or values beyond float16")
    return value.half()
