"""`smidgen fewshot evaluate`: a trained method's accuracy on tasks of classes it has not seen (notes 1.1, 1.3, 5.4).

    accuracy    a = 1/E sum_e a_e                     a_e: share of the queries of episode e classified right
    interval    1.96 s / sqrt(E), s^2 = 1/E sum_e (a_e - a)^2     half the width of the 95% interval of the mean

Episodes are numbered and seeded by their number, so those of process r of P are r, r + P, r + 2P, ...: however many processes share the
work, the episodes, and with them all figures, are the same.

Two things flatter a figure and are stated with it. Batch statistics in batch norm let queries inform each other, and so do transductive
methods; whether they do is measured, by asking about one query alone. And as many queries of every class is knowledge that such methods
use: `--queries dirichlet` draws them unevenly.
"""

import base64
import io
import os
import time
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cyclopts import Parameter
from jaxtyping import Float, Int
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.data import load_images, shape_of
from smidgen.fewshot.episodes import Episode, Queries, Sampler, Shots, Tasks, accuracy
from smidgen.fewshot.methods import Shows, Validates
from smidgen.fewshot.models import describe, load, trained_folder
from smidgen.fit import is_first_process, own_device, process_run
from smidgen.precision import pick_device
from smidgen.run import Run

BINS = ((1, 1), (2, 5), (6, 10), (11, 20), (21, 30), (31, 40), (41, 50))  # shots, in tables and figures (notes 3.6)
SHOWN_SHOTS, SHOWN_QUERIES = 5, 6  # images per class of an example
INSIDES = 200  # episodes whose insides are kept
LARGE = 64  # classes up to which a whole confusion is kept; of more, those most often mistaken
Z = 1.96  # standard deviations to either side that hold 95% of a normal distribution


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
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed must be between 0 and 2147483647, got {self.seed}")


@dataclass(frozen=True)
class Result:
    """What came of the episodes."""

    accuracies: Float[np.ndarray, "episodes"]
    "Of each, 0 .. 1."
    confusion: Int[np.ndarray, "classes classes"]
    "Queries, by their class and the class predicted, counted over all episodes."
    by_shots: dict[int, tuple[int, int]]
    "Shots of a query's class -> queries right, queries."
    insides: list[dict[str, Any]]
    "Of the first episodes: shots of every class, and what small figures the method shows."

    @property
    def accuracy(self) -> float:
        """Mean over episodes."""
        return float(self.accuracies.mean())

    @property
    def interval(self) -> float:
        """Half the width of the 95% interval of the mean.

        >>> Result(np.array([0.5, 1.0, 1.0, 0.5]), np.zeros((1, 1), int), {}, []).interval
        0.245
        """
        return Z * float(self.accuracies.std()) / len(self.accuracies) ** 0.5

    def binned(self) -> dict[str, dict[str, float]]:
        """Accuracy over the queries whose class has 1, 2-5, 6-10, ... shots, and their number; bins without queries are left out."""
        rows = {}
        for low, high in (*BINS, (BINS[-1][1] + 1, max([*self.by_shots, BINS[-1][1] + 1]))):
            inside = [counts for shots, counts in self.by_shots.items() if low <= shots <= high]
            right, queries = sum(r for r, _ in inside), sum(n for _, n in inside)
            if queries:
                rows[f"{low}" if low == high else f"{low}-{high}"] = {"accuracy": right / queries, "queries": queries}
        return rows


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


@torch.no_grad()
def evaluated(method: nn.Module, sampler: Tasks, episodes: int, run: Run | None = None, *, validation: bool = False) -> Result:
    """A method on the first episodes of a sampler, in evaluation mode; shared by all processes, which all get the whole result.

    With `validation` methods that have a cheaper answer for it (`Validates`) give that one, and insides are left out.

    Methods that draw random numbers find torch's generator seeded by the number of the batch.
    """
    rank, processes = _process(sampler.device)
    batches = -(-episodes // sampler.tasks)
    mine = range(rank, batches, processes)
    numbers = mine if run is None else run.track(mine, "episodes", max(1, len(mine)))
    classes = len(sampler.classes)
    confusion, by_shots = np.zeros((classes, classes), np.int64), np.zeros((2, sampler.most + 1), np.int64)
    accuracies: dict[int, list[float]] = {}
    insides: dict[int, list[dict[str, Any]]] = {}
    modes = {m: m.training for m in method.modules()}
    method.eval()
    for i in numbers:
        episode, kept = sampler(i), min(sampler.tasks, episodes - i * sampler.tasks)
        probabilities = predicted(method, episode, sampler.seed, i, validation=validation)
        if not bool(probabilities[episode.query_y >= 0].isfinite().all()):
            raise UserError(f"the method's probabilities of episode {i * sampler.tasks} are not finite; its training diverged")
        accuracies[i] = accuracy(probabilities, episode).double()[:kept].tolist()
        _count(probabilities[:kept], episode, confusion, by_shots)
        if i * sampler.tasks < INSIDES and not validation:
            insides[i] = [
                {"episode": i * sampler.tasks + t} | row for t, row in enumerate(_figures(method, episode, sampler.seed, i)[:kept])
            ]
    for m, training in modes.items():
        m.training = training
    parts = _gathered((accuracies, insides, confusion, by_shots))
    accuracies, insides = ({i: row for part in parts for i, row in part[k].items()} for k in (0, 1))
    right, queries = np.sum([part[3] for part in parts], 0)
    return Result(
        np.array([a for i in sorted(accuracies) for a in accuracies[i]]),
        np.sum([part[2] for part in parts], 0),
        {shots: (int(right[shots]), int(queries[shots])) for shots in np.flatnonzero(queries).tolist()},
        [row for i in sorted(insides) for row in insides[i]],
    )


def predicted(
    method: nn.Module, episode: Episode, seed: int = 0, i: int = 0, *, validation: bool = False
) -> Float[Tensor, "tasks queries ways"]:
    """Probabilities of batch number i, the same whatever was drawn before."""
    device = episode.query_x.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 2_654_435_761 + i) % 2**32)
        if validation and isinstance(method, Validates):
            return method.validate(episode)
        return method.predict(episode)  # pyright: ignore  a Method


def norm_mode(method: nn.Module) -> str:
    """What batch norm normalises by at test time: statistics of the training, or of the batch, queries and all (notes 1.3)."""
    from smidgen.fewshot.methods.inner import Classifier

    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | Classifier)]
    running = {not isinstance(m, Classifier) and m.running_mean is not None for m in norms}
    return {(): "none", (True,): "running statistics", (False,): "batch statistics"}.get(tuple(running), "running and batch statistics")


@torch.no_grad()
def transductive(method: nn.Module, episode: Episode) -> bool:
    """Whether what is said of a query depends on the other queries: asked about the first one alone, does the method say the same?"""
    alone = replace(episode, query_x=episode.query_x[:, :1], query_y=episode.query_y[:, :1])
    together, alone = predicted(method, episode)[:, :1], predicted(method, alone)
    return not torch.allclose(together, alone, rtol=0, atol=1e-3)


def _count(probabilities: Tensor, episode: Episode, confusion: np.ndarray, by_shots: np.ndarray) -> None:
    """Adds the queries of a batch, those of padding left out."""
    kept = len(probabilities)
    assert episode.classes is not None, "samplers tell the classes"
    real = episode.query_y[:kept] >= 0
    truth = episode.query_y[:kept].clamp(min=0)
    guess = probabilities.argmax(-1)
    classes, shots = episode.classes[:kept], episode.shots()[:kept].long()
    pairs = (classes.gather(1, truth)[real].cpu().numpy(), classes.gather(1, guess)[real].cpu().numpy())
    np.add.at(confusion, pairs, 1)
    own = shots.gather(1, truth)[real].cpu().numpy()
    np.add.at(by_shots[0], own, (guess == truth)[real].cpu().numpy())
    np.add.at(by_shots[1], own, 1)


def _figures(method: nn.Module, episode: Episode, seed: int, i: int) -> list[dict[str, Any]]:
    """A row per task: shots, and those insides that are small: one number per class, layer or member."""
    if not isinstance(method, Shows):
        return []
    shown = {name: values for name, values in _insides(method, episode, seed, i).items() if name in ("omega", "gamma", "weights")}
    shots = episode.shots().int().tolist()
    return [{"shots": shots[t]} | {name: values[t].tolist() for name, values in shown.items()} for t in range(len(shots))]


def _insides(method: Shows, episode: Episode, seed: int, i: int) -> dict[str, Tensor]:
    device = episode.query_x.device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 2_654_435_761 + i) % 2**32)
        return {name: torch.as_tensor(values).detach().float().cpu() for name, values in method.insides(episode).items()}


def _process(device: torch.device) -> tuple[int, int]:
    """This process's number, and how many there are."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return state.process_index, state.num_processes


def _gathered(part: Any) -> list[Any]:
    """Every process's, in their order."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return [part]
    from accelerate.utils import gather_object

    return gather_object([part])


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
        insides = _insides(method, episode, sampler.seed, i) if isinstance(method, Shows) else {}
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
                "insides": {name: _rounded(values[0]) for name, values in insides.items()},
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
