"""`smidgen fewshot export`: a few-shot predictor as one file for a device, compared with torch and timed (predictor.py says what is in it).

smidgen fewshot export RUN --to onnx                     a method that `smidgen fewshot train` trained
smidgen fewshot export efficientnet-lite0 --to onnx      nothing trained: the frozen network and the prototypes of `fewshot predict`
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from cyclopts import Parameter

from smidgen.backbones import LITE, LITE_SIZE
from smidgen.errors import UserError, check_seed
from smidgen.fewshot.data import GLYPHS, load_images, shape_of
from smidgen.fewshot.episodes import Episode, Sampler
from smidgen.fewshot.models import Description, describe, load, trained_folder
from smidgen.fewshot.predict import prototypes_over_lite
from smidgen.fewshot.predictor import OUTPUT, Exportable, Predictor, answers, difference, export, exportable, opened, tasks
from smidgen.run import Run

if TYPE_CHECKING:
    import onnxruntime

MODEL = "model.onnx"


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen fewshot export`."""

    model: Path
    "A run of smidgen fewshot train, or the folder trained in it; or efficientnet-lite0, which needs no training."
    _: KW_ONLY
    to: Literal["onnx"] = "onnx"
    "For ONNX Runtime, and whatever else reads ONNX."
    bits: int | None = None
    "8: the backbone in eight bits, its ranges from tasks of --data; none: as it is."
    data: str | None = None
    "Images to calibrate on and to compare with torch on, as for training; none: compared on noise."
    calibration_split: str = "train"
    "Its classes that ranges are taken from."
    split: str = "test"
    "Its classes that accuracy is compared on."
    calibration: int = 16
    "Tasks that ranges are taken from."
    episodes: int = 100
    "Tasks that accuracy is compared on."
    ways: int | None = None
    "Classes of these tasks; none: as trained; 5 of efficientnet-lite0."
    shots: int | None = None
    "Labelled images of each; none: as trained; 5 of efficientnet-lite0, and of methods trained on any number."
    queries: int = 15
    "Images of each class to be classified in these tasks."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/fewshot/export."
    seed: int = 0
    "Chooses the tasks."

    def check(self) -> None:
        """Refuses what cannot work."""
        least = {"calibration": 1, "episodes": 1, "queries": 1, "ways": 2, "shots": 1}
        for name, value in ((name, vars(self)[name]) for name in least):
            if value is not None and value < least[name]:
                raise UserError(f"--{name} must be {'positive' if least[name] == 1 else 'at least 2'}, got {value}")
        check_seed(self.seed)
        for name in ("split", "episodes", "calibration_split", "calibration"):
            if self.data is None and vars(self)[name] != vars(type(self))[name]:
                raise UserError(f"--{name.replace('_', '-')} is about --data; give that, too, or leave it out")
        if self.bits == 8 and self.data is None:
            raise UserError("--bits 8 takes the ranges of activations from real images: give some with --data, such as those trained on")


def command(config: Config) -> dict[str, Any]:
    """Write a trained method as one file that a device runs, and measure that file."""
    with Run("fewshot export", config, config.output, f"{config.model.name}-{config.to}") as run:
        return main(config, run)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Load, write, read back, compare, time."""
    config.check()
    described, method = chosen(config.model)
    calibration, tests = drawn(config, described)
    artifact = run.partial("artifact")
    written = export(method, artifact / MODEL, calibration, config.bits)
    session = opened(written.path)
    predictor, (first, *_) = Predictor(copy.deepcopy(method)).eval(), tasks(tests[0])
    ours, theirs = answers(predictor, session, run.track((feed for e in tests for feed in tasks(e)), "tasks", len(tests)))
    deviation, agreement = difference(ours, theirs)
    milliseconds = latency(session, first)
    run.keep(artifact)
    figures = {} if config.data is None else {"accuracy": right(theirs, tests), "accuracy_torch": right(ours, tests)}
    return run.finish(
        **figures,
        deviation=deviation,
        agreement=agreement,
        size_bytes=written.size_bytes,
        latency_ms_per_image=milliseconds / sum(len(first[name]) for name in ("support_images", "query_images")),
        latency_ms_per_task=milliseconds,
        task_images=[len(first[name]) for name in ("support_images", "query_images")],
        bits=config.bits or 32,
        episodes=len(tests),
        method=described.name,
        ways=first["support_labels"].shape[1],
        data=config.data or "noise",
        model=str(config.model),
        artifact=str(run.folder / "artifact" / MODEL),
        seed=config.seed,
    )


def chosen(model: Path) -> tuple[Description, Exportable]:
    """A trained method, or the one that needs no training."""
    if str(model) == LITE:
        return Description("prototypes", (3, LITE_SIZE, LITE_SIZE), 5, 5), prototypes_over_lite()
    folder = trained_folder(model)
    return describe(folder), exportable(load(folder))


@dataclass(frozen=True)
class Drawn(Sequence[Episode]):
    """The first tasks of a sampler, drawn when they are asked for: large photographs fill the memory."""

    sampler: Sampler
    count: int

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, i: int) -> Episode: ...
    @overload
    def __getitem__(self, i: slice) -> list[Episode]: ...
    def __getitem__(self, i: int | slice) -> Episode | list[Episode]:
        numbers = range(self.count)[i]
        return self.sampler(numbers) if isinstance(numbers, int) else [self.sampler(n) for n in numbers]


def drawn(config: Config, described: Description) -> tuple[Sequence[Episode], Sequence[Episode]]:
    """Tasks to calibrate on and tasks to compare on."""
    shots = config.shots or (described.shots if isinstance(described.shots, int) else 5)
    ways = config.ways or described.ways
    if config.data is None:
        random = torch.Generator().manual_seed(config.seed)
        y = [torch.arange(ways).repeat_interleave(n)[None] for n in (shots, config.queries)]
        x = [torch.rand(1, part.shape[1], *described.shape, generator=random) for part in y]
        noise = [Episode(x[0], y[0], x[1], y[1], ways)]
        return noise, noise
    channels, height, _ = described.shape
    parts = []
    for i, (split, count) in enumerate(((config.split, config.episodes), (config.calibration_split, config.calibration))):
        images = load_images(config.data, split, *((None, None) if config.data == GLYPHS else (height, channels)))
        described.check(shape_of(images), config.data)
        parts.append(Drawn(Sampler(images, ways, shots, config.queries, seed=config.seed + i), count))
    tests, calibration = parts
    return calibration, tests


def right(found: list[np.ndarray], episodes: Sequence[Episode]) -> float:
    """Accuracy, mean over tasks."""
    truth = [episode.query_y[0].numpy() for episode in episodes]
    return float(np.mean([(p.argmax(-1) == y).mean() for p, y in zip(found, truth, strict=True)]))


def latency(session: "onnxruntime.InferenceSession", feed: dict[str, np.ndarray], seconds: float = 1.0) -> float:
    """Milliseconds of a call, the median of as many as fit into the time, three to warm up not counted."""
    taken: list[float] = []
    while len(taken) < 6 or sum(taken) < seconds:
        started = time.perf_counter()
        session.run([OUTPUT], feed)
        taken.append(time.perf_counter() - started)
    return 1000 * float(np.median(taken[3:]))
