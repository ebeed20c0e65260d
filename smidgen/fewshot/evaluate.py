"""`smidgen fewshot evaluate`: a trained method's accuracy on tasks of classes it has not seen.

Two things flatter a figure and are stated with it. Batch statistics in batch norm let queries inform each other, and so do transductive
methods; whether they do is measured, by asking about one query alone. And as many queries of every class is knowledge that such methods
use: `--queries dirichlet` draws them unevenly.
"""

import base64
import io
import time
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cyclopts import Parameter
from jaxtyping import Float, Int
from torch import Tensor, nn

from smidgen.distributed import is_first_process, own_device, process_run
from smidgen.errors import UserError, check_seed
from smidgen.fewshot.data import load_images, shape_of
from smidgen.fewshot.episodes import Queries, Sampler, Shots, Tasks, accuracy
from smidgen.fewshot.measure import evaluated, insides, norm_mode, predicted, transductive
from smidgen.fewshot.methods import Shows
from smidgen.fewshot.models import describe, load, trained_folder
from smidgen.precision import pick_device
from smidgen.run import Run

SHOWN_SHOTS, SHOWN_QUERIES = 5, 6  # images per class of an example
LARGE = 64  # classes up to which a whole confusion is kept; of more, those most often mistaken


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen fewshot evaluate`."""

    model: Path
    "A run of smidgen fewshot train, or the folder trained in it."
    data: str
    "Images with labels, as for training: glyphs, a folder of class folders, a .npz or a .csv."
    _: KW_ONLY
    episodes: int = 600
    "Tasks drawn."
    ways: int | None = None
    "Classes of a task; none: as in training."
    shots: Shots | None = None
    "Labelled images of each: a number, or any, any-class, any-task (1 to 50, drawn); none: as in training."
    queries: Queries = "balanced"
    "Whether a task has as many queries of every class, or shares drawn from a Dirichlet distribution."
    queries_per_class: int = 15
    "Their number, or mean."
    split: str = "test"
    "Classes drawn from: train, val, test, or what the data calls its parts, or all."
    resize: bool = False
    "Bring images of another size, or grey ones, to what the model reads, rather than refuse them."
    skip_bad: bool = False
    "Leave files out that cannot be read, instead of stopping."
    tasks: int = 1
    "Tasks computed at once."
    examples: int = 3
    "Tasks kept for the report, with their images."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/fewshot/evaluate."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Chooses the tasks."

    def check(self) -> None:
        """Refuses what cannot work."""
        for name, value in (("episodes", self.episodes), ("tasks", self.tasks)):
            if value < 1:
                raise UserError(f"--{name} must be positive, got {value}")
        if self.examples < 0:
            raise UserError(f"--examples must not be negative, got {self.examples}")
        check_seed(self.seed)


def command(config: Config) -> dict[str, Any] | None:
    """Measure a trained method on tasks of new classes; under torchrun, on many devices."""
    label = f"{Path(config.model).stem}-{Path(config.data).stem}"
    with process_run("fewshot evaluate", config, config.output, label) as run:
        metrics = main(config, run)
    return metrics if is_first_process() else None


def main(config: Config, run: Run) -> dict[str, Any]:
    """Load, draw, predict, count."""
    config.check()
    device = own_device(pick_device(config.device))
    folder = trained_folder(config.model)
    described = describe(folder)
    channels, height, _ = described.shape
    images = load_images(config.data, config.split, *((height, channels) if config.resize else (None, None)), config.skip_bad)
    for path in images.skipped:
        run.say(f"skipped, cannot be read: {path}")
    described.check(shape_of(images), config.data)
    method = load(folder, device)
    ways = described.ways if config.ways is None else config.ways
    shots = described.shots if config.shots is None else config.shots
    sampler = Sampler(images.to(device), ways, shots, config.queries_per_class, config.queries, config.tasks, config.seed)

    started = time.monotonic()
    result = evaluated(method, sampler, config.episodes, run)
    seconds = time.monotonic() - started
    for row in result.insides:
        run.log(**row)
    run.save("confusion.json", confused(result.confusion, images.classes))
    run.save("examples.json", {"examples": examples(method, replace(sampler, tasks=1), config.examples)})
    return run.finish(
        accuracy=result.accuracy,
        accuracy_interval=result.interval,
        accuracy_by_shots={shots: row["accuracy"] for shots, row in result.binned().items()},
        queries_by_shots={shots: row["queries"] for shots, row in result.binned().items()},
        episodes=config.episodes,
        ways=ways,
        shots=shots,
        queries=config.queries,
        queries_per_class=config.queries_per_class,
        batch_norm=norm_mode(method),
        queries_inform_each_other=transductive(method, sampler(0)),
        method=described.name,
        trained_ways=described.ways,
        trained_shots=described.shots,
        trained_on=described.data,
        data=images.name,
        split=config.split,
        classes=len(images.classes),
        chance=1 / ways,
        evaluate_seconds=seconds,
        tasks_at_once=config.tasks,
        seed=config.seed,
        model=str(config.model),
        device=str(device),
    )


def confused(confusion: Int[np.ndarray, "classes classes"], names: tuple[str, ...]) -> dict[str, Any]:
    """What a report shows of a confusion: all of it, or, of many classes, those most often mistaken."""
    wrong = (confusion.sum(1) - confusion.diagonal()) / np.maximum(confusion.sum(1), 1)
    seen = np.flatnonzero(confusion.sum(1))
    chosen = np.sort(seen[np.argsort(-wrong[seen], kind="stable")[:LARGE]])
    part = confusion[np.ix_(chosen, chosen)]
    return {"classes": [names[c] for c in chosen], "counts": part.tolist(), "queries": confusion[chosen].sum(1).tolist(), "of": len(names)}


def examples(method: nn.Module, sampler: Tasks, count: int) -> list[dict[str, Any]]:
    """The first tasks, with some of their images as PNG data URIs, what was said of them, and the method's insides."""
    shown = []
    for i in range(count):
        episode = sampler(i)
        with torch.no_grad():
            probabilities = predicted(method, episode, sampler.seed, i)
        assert episode.classes is not None, "samplers tell the classes"
        names = [sampler.classes[c] for c in episode.classes[0].tolist()]
        inside = insides(method, episode, sampler.seed, i) if isinstance(method, Shows) else {}
        rows = []
        for way, name in enumerate(names):
            support = (episode.support_y[0] == way).nonzero()[:, 0].tolist()
            query = (episode.query_y[0] == way).nonzero()[:, 0].tolist()
            rows.append(
                {
                    "class": name,
                    "shots": len(support),
                    "support": [png(episode.support_x[0, k]) for k in support[:SHOWN_SHOTS]],
                    "queries": [
                        {
                            "png": png(episode.query_x[0, k]),
                            "predicted": names[int(probabilities[0, k].argmax())],
                            "probability": float(probabilities[0, k].max()),
                        }
                        for k in query[:SHOWN_QUERIES]
                    ],
                }
            )
        truth = torch.cat([episode.support_y[0], episode.query_y[0]]).tolist()
        shown.append(
            {
                "episode": i,
                "accuracy": float(accuracy(probabilities, episode)[0]),
                "rows": rows,
                "nodes": [-1 if y < 0 else y for y in truth],
                "support": int(episode.support_y.shape[1]),
                "insides": {name: _rounded(values[0]) for name, values in inside.items()},
            }
        )
    return shown


def _rounded(values: Tensor) -> Any:
    """As a list, to four decimals."""
    return np.round(values.double().numpy(), 4).tolist()


def png(image: Float[Tensor, "channels height width"]) -> str:
    """An image in [0, 1] as a data URI; grey, or the first three channels as colours."""
    from PIL import Image

    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3]).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
