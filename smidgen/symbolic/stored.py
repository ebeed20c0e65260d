"""Trained models in a folder.

FOLDER/model.json           name, options, task, vocabularies, longest question trained on
FOLDER/model.safetensors    parameters and buffers
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.symbolic.models import Sizes, make
from smidgen.symbolic.vocabulary import Vocabulary

TRAINED = "trained"  # folder of a run of `smidgen symbolic train`
DESCRIPTION, TENSORS = "model.json", "model.safetensors"


@dataclass(frozen=True)
class Description:
    """What a folder says of the model in it."""

    name: str
    task: str
    tokens: Vocabulary
    answers: Vocabulary
    slots: int | None
    "Longest target of the task, its end included; none: labels."
    length: int
    "Tokens of the longest input trained on."
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """An untrained model."""
        return make(self.name, Sizes(len(self.tokens), len(self.answers), self.slots), self.options)


def save(folder: Path, model: nn.Module, description: Description) -> None:
    """Writes a model that `load` makes again."""
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}, folder / TENSORS)
    (folder / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(folder: Path) -> Description:
    """What a folder, or a run's, holds."""
    folder = trained_folder(folder)
    if not (folder / DESCRIPTION).is_file() or not (folder / TENSORS).is_file():
        raise UserError(f"{folder} holds no trained model: it has no {DESCRIPTION} and {TENSORS}; give a run of smidgen symbolic train")
    try:
        read = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        vocabularies = {name: Vocabulary(tuple(read[name]["symbols"]), read[name]["unit"]) for name in ("tokens", "answers")}
        return Description(**read | vocabularies)
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{folder / DESCRIPTION}: damaged, or of another version") from error


def load(folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model that `save` wrote, in evaluation mode."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = trained_folder(folder)
    model = describe(folder).make()
    try:
        model.load_state_dict(load_file(folder / TENSORS))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / TENSORS}: damaged, or not of the model {DESCRIPTION} tells of") from error
    return model.to(device).eval()


def trained_folder(path: Path) -> Path:
    """Where the model is, of a run or of its folder."""
    return path / TRAINED if (path / TRAINED).is_dir() else path
