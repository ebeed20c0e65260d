"""The same integers in another format: `smidgen convert`.

An artifact is read back block by block, and every exporter is given what it was given when the artifact was solved. Nothing is
quantized again: a format that cannot hold the codes on their grid refuses before anything is written.
"""

from collections import defaultdict
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from cyclopts import Parameter

from smidgen.errors import UserError
from smidgen.grid import Grid
from smidgen.quant.blocks import decoder_list
from smidgen.quant.checkpoint import Checkpoint, unload
from smidgen.quant.export import EXPORTERS, check_formats, formats
from smidgen.quant.export.compressed_tensors import Packed
from smidgen.quant.generate import size
from smidgen.run import Run


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen convert`."""

    artifact: Path
    "The artifact, or the folder of the run that made it."
    _: KW_ONLY
    to: str
    "Formats, separated by commas."
    output: Path | None = None
    "Folder of the run, with a folder per format; by default a new one under runs/convert."


def command(config: Config) -> dict[str, Any]:
    """Write an artifact's integers in other formats."""
    with Run("convert", config, config.output, config.artifact.name) as run:
        return main(config, run)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Check every format, then give the artifact's blocks to all of them."""
    cpu = torch.device("cpu")
    folder = config.artifact / "artifact" if (config.artifact / "artifact").is_dir() else config.artifact
    packed = Packed(folder)
    checkpoint = Checkpoint(folder, folder.resolve().name)
    model = checkpoint.skeleton(cpu)
    names = formats(config.to)
    by_grid: dict[Grid, list[str]] = defaultdict(list)
    for layer in packed.layers:
        by_grid[packed.grid(layer)].append(layer)
    check_formats(model, names, by_grid)
    path, blocks = decoder_list(model)
    complete(len(blocks), packed.layers, path)
    exporters = {name: EXPORTERS[name](run.partial(name), checkpoint, checkpoint.skeleton(cpu)) for name in names}
    for i, block in enumerate(run.track(blocks, "blocks", len(blocks))):
        own = [layer for layer in packed.layers if layer.startswith(f"{path}.{i}.")]
        checkpoint.load(block, f"{path}.{i}", cpu, skip=tuple(f"{layer}.weight" for layer in own))
        weights = {layer: packed.read(layer) for layer in own}
        for exporter in exporters.values():
            exporter.add(weights, block, f"{path}.{i}")
        unload(block)
    written = {}
    for name, exporter in exporters.items():
        exporter.finish()
        written[name] = run.keep(exporter.folder)
        run.say(f"{name}: {written[name]}")
    return run.finish(
        artifact=str(folder),
        layers=len(packed.layers),
        written={name: str(path) for name, path in written.items()},
        size_bytes={name: size(path) for name, path in written.items()},
    )


def complete(blocks: int, layers: list[str], path: str) -> None:
    """Refuses an artifact some of whose layers are outside the blocks."""
    outside = [layer for layer in layers if not layer.startswith(tuple(f"{path}.{i}." for i in range(blocks)))]
    if outside:
        raise UserError(f"{outside[0]} is quantized but belongs to no block; only artifacts of smidgen quantize are converted")
