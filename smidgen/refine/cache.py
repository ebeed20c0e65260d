"""What an interrupted `smidgen refine` need not do again: tensors by the content of all they were made of."""

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smidgen.run import PARTIAL

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Cache:
    """A folder of such tensors."""

    folder: Path

    def kept(self, name: str, made_of: Sequence[Tensor | str], make: Callable[[], Tensors]) -> Tensors:
        """Those of before if they were made of the same, else new ones; damaged files are made again."""
        file = self.folder / f"{name}-{digest(made_of)}.pt"
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            made = {key: value.detach().cpu() for key, value in make().items()}
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(file.name + PARTIAL)
            torch.save(made, partial)
            partial.replace(file)
            return made


def digest(parts: Sequence[Tensor | str]) -> str:
    """Of the content."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else np.ascontiguousarray(part.detach().cpu().numpy()).tobytes()
        total.update(f"{len(raw)} {'' if isinstance(part, str) else tuple(part.shape)} ".encode() + raw)
    return total.hexdigest()[:24]
