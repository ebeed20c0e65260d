"""What a checkpoint keeps unquantized, read once and written as it is stored, and what makes weights a model folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.writing import writing


@dataclass
class Rest:
    """The parameters nobody has written yet: 16-bit types as they are, float32 matrices as float16."""

    checkpoint: Checkpoint
    done: set[str] = field(default_factory=set)
    "Names of what is written, quantized or not."

    def __post_init__(self) -> None:
        self.tokenizer = self.checkpoint.tokenizer()  # a model folder without one is refused before any work

    def of_block(self, module: nn.Module, path: str) -> dict[str, Tensor]:
        """Those of a block, with the values they have in `module`; what is on the meta device there is read."""
        parameters = {f"{path}.{n}": p for n, p in module.named_parameters()}
        return self._read(list(parameters), {n: p for n, p in parameters.items() if not p.is_meta})

    def of_model(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Those that belong to no block; tied ones once."""
        tied = model.all_tied_weights_keys
        return self._read([n for n, _ in model.named_parameters(remove_duplicate=False) if n not in tied], {})

    def describe(self, folder: Path, model: PreTrainedModel, dtype: torch.dtype, quantization: dict[str, Any]) -> None:
        """Writes tokenizer and configuration of a checkpoint that transformers loads."""
        if model.generation_config is not None:
            with writing(folder):
                model.generation_config.save_pretrained(folder)
        about = {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization}
        write_config(folder, self.checkpoint, self.tokenizer, about)

    def _read(self, names: list[str], changed: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [n for n in names if n not in self.done]
        self.done |= set(names)
        read = self.checkpoint.read(names)
        return {n: half(changed[n].to("cpu", value.dtype) if n in changed else value, n) for n, value in read.items()}


def write_config(folder: Path, checkpoint: Checkpoint, tokenizer: Any, about: dict[str, Any]) -> None:
    """The tokenizer and config.json, that of the checkpoint with what is new `about` the weights; it comes last."""
    config = {k: v for k, v in checkpoint.config.to_diff_dict().items() if k not in ("_name_or_path", "quantization_config")}
    with writing(folder):
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config | about, indent=1, default=str))


def half(value: Tensor, name: str) -> Tensor:
    """float32 matrices as float16; vectors (norms, biases) and 16-bit tensors unchanged."""
    if value.dtype != torch.float32 or value.ndim < 2:
        return value.clone()
    if not bool((value.abs() <= torch.finfo(torch.float16).max).all()):
        raise UserError(f"{name} holds NaN or values beyond float16")
    return value.half()
