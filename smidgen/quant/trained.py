"""A model trained for quantization, with its ranges, in a folder: float weights as `from_pretrained` reads them, and two files beside."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.ranges import Range
from smidgen.quant.simulate import QuantLinear, Scheme, activations_of, restore, simulate

TRAINED = "trained"  # folder of the run: the float weights, and the ranges they were trained with
RANGES = "ranges.safetensors"
DESCRIPTION = "quantization.json"


def save(folder: Path, model: PreTrainedModel, layers: dict[str, QuantLinear], tokenizer: Any) -> None:
    """Writes the trained weights, unrounded, as any library reads them, and beside them the ranges `load` puts back."""
    tensors, kinds = {}, {}
    for name, activation in activations_of(layers):
        tensors |= _state(f"{name}.input", activation.range, kinds)
    for name, quant in layers.items():
        tensors |= _state(f"{name}.weight", quant.range, kinds)
    scheme = next(iter(layers.values())).scheme
    save_file(tensors, folder / RANGES)
    (folder / DESCRIPTION).write_text(json.dumps({"scheme": asdict(scheme), "ranges": kinds}, indent=1) + "\n")
    restore(model, layers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path, device: torch.device) -> tuple[PreTrainedModel, dict[str, QuantLinear]]:
    """The simulated model that `save` wrote, bit for bit."""
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} holds no trained model: it has no {DESCRIPTION}; give the folder {TRAINED} of a run of smidgen qat")
    model = Checkpoint(folder, folder.name).model(torch.float32, device)
    described = json.loads((folder / DESCRIPTION).read_text())
    tensors = load_file(folder / RANGES)
    layers = simulate(model, Scheme(**described["scheme"]))
    for name, activation in activations_of(layers):
        how = described["ranges"][f"{name}.input"]
        one = torch.ones(())
        _restore(activation.fix(-one, one, how["kind"], how["link"]), f"{name}.input", tensors)
    for name, quant in layers.items():
        how = described["ranges"][f"{name}.weight"]
        _restore(quant.learn_range(how["kind"], how["link"]), f"{name}.weight", tensors)
    for quant in layers.values():  # new ranges are on the processor
        quant.to(device)
    return model, layers


def _state(name: str, r: Range | None, kinds: dict[str, dict[str, str]]) -> dict[str, Tensor]:
    assert r is not None
    kinds[name] = {"kind": r.kind, "link": r.link}
    return {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in r.state_dict().items()}


def _restore(r: Range, name: str, tensors: dict[str, Tensor]) -> None:
    r.load_state_dict({key: tensors[f"{name}.{key}"] for key in r.state_dict()})
