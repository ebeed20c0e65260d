"""Exporters: each writes what one family of runtimes loads, and says beforehand what it can hold."""

from pathlib import Path
from typing import Any, Protocol

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.export.compressed_tensors import CompressedTensors
from smidgen.quant.export.executorch import ExecuTorch
from smidgen.quant.export.gguf import Gguf
from smidgen.quant.export.gptq import Gptq
from smidgen.quant.export.onnx import Onnx


class Exporter(Protocol):
    """Writes one model into `folder`: `add` per block, in order, then `finish`."""

    folder: Path

    def __init__(self, folder: Path, checkpoint: Any, model: Any) -> None: ...

    @staticmethod
    def check(model: Any, layers: list[str], grid: Grid) -> None:
        """Raises a UserError before any work if the format cannot hold these layers on this grid, naming the nearest it can."""
        ...

    def add(self, weights: dict[str, QWeight], module: Any, path: str) -> None:
        """Takes a block: its quantized layers by full name, and through `module` at `path` its other parameters."""
        ...

    def finish(self) -> None:
        """Writes what belongs to no block."""
        ...


EXPORTERS: dict[str, type[Exporter]] = {
    "compressed-tensors": CompressedTensors,
    "gguf": Gguf,
    "gptq": Gptq,
    "onnx": Onnx,
    "executorch": ExecuTorch,
}

ONE_GRID = ("gptq",)  # formats whose layers all have the same


def check_formats(model: Any, names: list[str], by_grid: dict[Grid, list[str]]) -> None:
    """Raises a UserError before any work if one of the formats cannot hold the layers on these grids."""
    for name in names:
        if name in ONE_GRID and len(by_grid) > 1:
            raise UserError(f"{name} checkpoints have one grid for all layers; use --export compressed-tensors, or leave out --target-bpw")
        for grid, layers in by_grid.items():
            EXPORTERS[name].check(model, layers, grid)


def formats(names: str) -> list[str]:
    """The formats in "a,b,c", each once; a UserError for one that is not known."""
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in EXPORTERS]
    if unknown or not wanted:
        raise UserError(f"no such format: {', '.join(unknown) or '(none given)'}; there are {', '.join(EXPORTERS)}")
    return wanted
