"""`smidgen fewshot train`: learn, over many small tasks, to learn from few labels.

Every update is one batch of tasks of the training classes; tasks are numbered, so a run goes on from a checkpoint, and processes share
them, as `fit` does with any batches. Every so often the method is measured on tasks of the validation classes, always the same ones; the
state that was best there is the one kept. The test classes are not touched: `smidgen fewshot evaluate` is for them.

More shots in training than in use ("higher shot") is `--shots 5 --validation-shots 1`. Of several data sets every task comes
whole from one, drawn uniformly; they must have images of one shape (`--size`, `--channels`).

A mixture of meta-learners (`--method mxml`) has two stages: one member per data set, learned from four fifths of its training
classes, then the network that weighs them, from tasks of the other fifth, which no member has seen. Members are kept in RUN/members;
`--members` takes trained ones and goes straight to the second stage.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from cyclopts import Parameter
from torch import nn

from smidgen.cuda_graphs import replaying
from smidgen.distributed import is_first_process, own_device, process_run
from smidgen.errors import UserError
from smidgen.fewshot.augment import Augment
from smidgen.fewshot.data import Shape, load_images, shape_of
from smidgen.fewshot.episodes import Sampler, Shots, Tasks
from smidgen.fewshot.evaluate import examples
from smidgen.fewshot.graphs import Training
from smidgen.fewshot.measure import Result, evaluated, norm_mode
from smidgen.fewshot.methods.mxml import MxML
from smidgen.fewshot.methods.mxml_stages import train_members
from smidgen.fewshot.models import TRAINED, Description, describe, load, load_members, make, save, settle, trained_folder
from smidgen.fewshot.sets import SetsSampler, held_out, one_shape
from smidgen.fit import CHECKPOINT, FitConfig, FitResult, fit
from smidgen.images import Images
from smidgen.precision import pick_device
from smidgen.run import Run

__all__ = ["Config", "command", "load", "main", "train"]

VALIDATION = 1  # added to the seed for the tasks of validation
SHARE = 0.2  # of the training classes, for the weights of a mixture
MEMBER, MEMBERS = "normalised-protonet", "members"
HALVED: dict[str, Any] = {"schedule": "steps", "decay": 0.5, "decay_every": 10_000}
SCHEDULES: dict[str, dict[str, Any]] = {name: {"schedule": "constant"} for name in ("maml", "meta-sgd", "btaml")}


@dataclass(frozen=True)
class Source:
    """What comes first on the command line: a base of its own, whose fields come before those of the bases named before it."""

    data: tuple[str, ...]
    "Images with labels, divided by class: glyphs (from the package), a folder of class folders, a .npz or a .csv; one or several."


@Parameter(name="*")
@dataclass(frozen=True)
class Config(FitConfig, Source):
    """Options of `smidgen fewshot train`."""

    _: KW_ONLY
    method: str = "protonet"
    "By name; a wrong one is answered with the list."
    option: dict[str, int | float | bool | str] = field(default_factory=dict)
    "Of the method, as --option.width 32; a wrong one is answered with the list."
    members: tuple[Path, ...] = ()
    "Of --method mxml: runs of --method normalised-protonet. The classes trained on now should be new to them."
    weight_steps: int | None = None
    "Of --method mxml: updates of the second stage; none: --steps."
    weight_learning_rate: float | None = None
    "Of --method mxml: of the second stage; none: 1e-4."
    ways: int = 5
    "Classes of a task."
    shots: Shots = 1
    "Labelled images of each: a number, or any, any-class, any-task (1 to 50, drawn)."
    queries: int = 15
    "Images of each to be classified."
    tasks: int = 1
    "Tasks per update and process; of a validation as many are computed at once."
    augment: tuple[Augment, ...] = ()
    "How training images are varied: flip, crop, colour, affine, or several of them."
    steps: int = 10_000
    learning_rate: float = 1e-3
    schedule: Literal["method", "cosine", "constant", "steps"] = "method"  # pyright: ignore[reportIncompatibleVariableOverride]
    "Of the learning rate; method: its paper's, halved every 10,000 updates, of inner loops constant, of mixtures a tenth after 70%."
    clip: float | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    keep_best: bool = True
    validation_episodes: int = 200
    "Tasks of a validation."
    validation_ways: int | None = None
    "Classes of these; none: as in training."
    validation_shots: Shots | None = None
    "Labelled images of each; none: as in training."
    size: int | None = None
    "Side of the square images, in pixels, that photos are brought to; none: as they are, all alike."
    channels: Literal[1, 3] | None = None
    "1 makes all images grey, 3 colour; none: as they are, all alike."
    train_split: str = "train"
    "Classes trained on: train, or what the data calls its parts, or all."
    validation_data: tuple[str, ...] = ()
    "Images measured on meanwhile; none: of the same data."
    validation_split: str = "val"
    "Classes measured on."
    hold_out: float | None = None
    "Share of the classes, the last ones, that is measured on instead of trained on, of data that has no splits."
    skip_bad: bool = False
    "Leave files out that cannot be read, instead of stopping."
    examples: int = 3
    "Validation tasks kept for the report, with their images."
    graph: bool = False
    "Launch an update as CUDA graphs instead of a thousand kernels: pays where launching is the limit, as with inner loops."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/fewshot/train."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."

    def check(self, evaluates: bool = True) -> None:
        """Refuses what cannot work."""
        for name, value in (("tasks", self.tasks), ("validation-episodes", self.validation_episodes)):
            if value < 1:
                raise UserError(f"--{name} must be positive, got {value}")
        if self.examples < 0:
            raise UserError(f"--examples must not be negative, got {self.examples}")
        of_mixtures = {"members": self.members, "weight-steps": self.weight_steps, "weight-learning-rate": self.weight_learning_rate}
        for name, value in of_mixtures.items():
            if value not in (None, ()) and self.method != "mxml":
                raise UserError(f"--{name}: only for --method mxml, not for {self.method}")
        if self.method == "mxml" and not self.members and self.resume is not None:
            raise UserError("--resume: the first stage of mxml cannot be gone on with; train members as runs of their own, with --members")
        if self.graph and self.method == "mxml":
            raise UserError("--graph: not for mxml, whose members are trained in a stage of their own")
        if self.schedule == "method" and (self.decay, self.decay_every) != (FitConfig.decay, FitConfig.decay_every):
            raise UserError("--decay and --decay-every are of --schedule steps, not of method, which is the paper's")
        if self.hold_out is not None and (self.validation_data or (self.train_split, self.validation_split) != ("train", "val")):
            raise UserError("--hold-out divides the classes itself; leave --train-split, --validation-split and --validation-data out")
        self.training().check(evaluates)

    def training(self) -> FitConfig:
        """What the training loop has to know."""
        schedule: dict[str, Any] = {"schedule": self.schedule}
        if self.schedule == "method":
            mixed = {"schedule": "steps", "decay": 0.1, "decay_every": max(1, 7 * self.steps // 10)}
            schedule = mixed if self.method in ("mxml", MEMBER) else SCHEDULES.get(self.method, HALVED)
        return self.alone(**schedule)

    def weighing(self) -> FitConfig:
        """The same of a mixture's second stage."""
        steps = self.steps if self.weight_steps is None else self.weight_steps
        rate = 1e-4 if self.weight_learning_rate is None else self.weight_learning_rate
        return replace(replace(self, steps=steps).training(), learning_rate=rate)


def command(config: Config) -> dict[str, Any] | None:
    """Train a few-shot method on tasks; under torchrun, on many devices."""
    label = f"{config.method}-{'-'.join(Path(name).stem for name in config.data)}-{config.ways}w{config.shots}s"
    with process_run("fewshot train", replace(config, resume=None), config.output, label) as run:
        metrics = main(config, run)
    return metrics if is_first_process() else None


def main(config: Config, run: Run) -> dict[str, Any]:
    """Load, make, train, keep the best, save."""
    config.check()
    device = own_device(pick_device(config.device))
    if config.graph:
        check_graphs(device, config)
    sets, held = ([images.to(device) for images in part] for part in read(config, run))
    validation = validating(config, held)
    torch.manual_seed(config.seed)
    started = time.monotonic()
    method, description, tasks = made(config, sets, held, run, device)
    fitting = config.weighing() if config.method == "mxml" else config.training()
    result = train(method, tasks, fitting, run, validation, config.validation_episodes, graphs=config.graph)
    seconds = time.monotonic() - started

    first, kept = result.evaluation(0), result.evaluation(result.kept)
    if settle(method, sets):
        kept = figures(evaluated(method, validation, config.validation_episodes))
        run.log(settled=True, **kept)
    folder = run.partial(TRAINED)
    save(folder, method, description)
    run.keep(folder)
    (run.folder / CHECKPOINT).unlink(missing_ok=True)
    run.save("examples.json", {"examples": examples(method.eval(), replace(validation, tasks=1), config.examples)})
    return run.finish(
        validation_accuracy=kept["accuracy"],
        validation_accuracy_interval=kept["accuracy_interval"],
        validation_accuracy_before=first["accuracy"],
        validation_episodes=config.validation_episodes,
        validation_ways=validation.ways,
        validation_shots=validation.shots,
        steps=result.step,
        kept_step=result.kept,
        stopped=result.stopped,
        method=config.method,
        ways=config.ways,
        shots=config.shots,
        queries_per_class=config.queries,
        tasks=config.tasks,
        batch_norm=norm_mode(method),
        data=description.data,
        train_classes=sum(len(images.classes) for images in sets),
        validation_classes=len(validation.classes),
        chance=1 / validation.ways,
        parameters=sum(p.numel() for p in method.parameters()),
        train_seconds=seconds,
        seed=config.seed,
        device=str(device),
    )


def read(config: Config, run: Run) -> tuple[list[Images], list[Images]]:
    """Sets to train on and sets to measure on, all of one shape."""
    how = config.size, config.channels, config.skip_bad
    if config.hold_out is not None:
        parts = [held_out(load_images(name, "all", *how), config.hold_out) for name in config.data]
        sets, held = ([part[i] for part in parts] for i in range(2))
    else:
        sets = [load_images(name, config.train_split, *how) for name in config.data]
        held = [load_images(name, config.validation_split, *how) for name in config.validation_data or config.data]
    one_shape([*sets, *held])
    for path in (path for images in (*sets, *held) for path in images.skipped):
        run.say(f"skipped, cannot be read: {path}")
    return sets, held


def sampling(config: Config, sets: Sequence[Images]) -> Tasks:
    """Tasks to train on."""
    options = {"tasks": config.tasks, "seed": config.seed, "augment": config.augment}
    if len(sets) == 1:
        return Sampler(sets[0], config.ways, config.shots, config.queries, **options)
    return SetsSampler(tuple(sets), config.ways, config.shots, config.queries, **options)


def validating(config: Config, sets: Sequence[Images]) -> Tasks:
    """Tasks to measure on."""
    ways = config.ways if config.validation_ways is None else config.validation_ways
    shots = config.shots if config.validation_shots is None else config.validation_shots
    return replace(sampling(config, sets), ways=ways, shots=shots, seed=config.seed + VALIDATION, augment=())


def made(config: Config, sets: list[Images], held: list[Images], run: Run, device: torch.device) -> tuple[nn.Module, Description, Tasks]:
    """A method, its description and the tasks it is still to be trained on."""
    shape, options = shape_of(sets[0]), dict[str, Any](config.option)
    trained: Sequence[Path] = [trained_folder(folder) for folder in config.members]
    if config.method == "mxml" and not trained:
        sets, rest = ([part[i] for part in (held_out(images, SHARE) for images in sets)] for i in range(2))
        of_members = {name: options.pop(name) for name in ("width", "norm") if name in options}
        trained = stage_one(config, sets, held, of_members, run, device)
        sets = rest
    if trained:
        options["members"] = chosen_members(trained, shape)
    names = " ".join(images.name for images in sets)
    description = Description(config.method, shape, config.ways, config.shots, options, names)
    method = make(config.method, shape, config.ways, options)
    if trained:
        load_members(method, trained)
    return method.to(device), description, sampling(config, sets)


def stage_one(
    config: Config, sets: list[Images], held: list[Images], options: dict[str, Any], run: Run, device: torch.device
) -> list[Path]:
    """The members of a mixture, one per data set, kept in the run's folder."""
    shape = shape_of(sets[0])
    members = [make(MEMBER, shape, config.ways, options).to(device) for _ in sets]
    samplers = [sampling(config, [images]) for images in sets]
    validation = [validating(config, [images]) for images in held] if len(held) == len(sets) else []
    fitted = replace(config.training(), keep_best=bool(validation), patience=config.patience if validation else None)
    episodes = -(-config.validation_episodes // config.tasks)
    train_members(members, samplers, fitted, run, validation, episodes)  # pyright: ignore  modules that are Members
    folder, places = run.partial(MEMBERS), []
    for i, (member, images) in enumerate(zip(members, sets, strict=True)):
        (folder / str(i)).mkdir()
        save(folder / str(i), member, Description(MEMBER, shape, config.ways, config.shots, options, images.name))
        places.append(run.folder / MEMBERS / str(i))
    run.keep(folder)
    (run.folder / CHECKPOINT).unlink(missing_ok=True)
    return places


def chosen_members(folders: Sequence[Path], shape: Shape) -> list[dict[str, Any]]:
    """The option of a mixture that says what its members are."""
    described = [describe(folder) for folder in folders]
    for member, folder in zip(described, folders, strict=True):
        if member.shape != shape:
            raise UserError(
                f"--members {folder} reads images of {'x'.join(map(str, member.shape))}, the data has {'x'.join(map(str, shape))}"
            )
    return [{"name": member.name, "options": dict(member.options)} for member in described]


def figures(result: Result) -> dict[str, float]:
    """What the log has of a validation; `held_out`, the share of errors, is what the best state has least of."""
    return {"held_out": 1 - result.accuracy, "accuracy": result.accuracy, "accuracy_interval": result.interval}


def check_graphs(device: torch.device, config: FitConfig) -> None:
    """Of several batches per update, the second's gradient would overwrite the first's."""
    if device.type != "cuda" or config.accumulation > 1 or os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--graph needs one CUDA device, and no --accumulation; leave it out")


def train(
    method: nn.Module,
    tasks: Tasks,
    config: FitConfig,
    run: Run,
    validation: Tasks,
    episodes: int,
    *,
    groups: Any = None,
    graphs: bool = False,
) -> FitResult:
    """Trains a method in place; with `keep_best`, or patience, it ends in the state of the best validation.

    `groups` are parameter groups as `fit` has them. `graphs`: by CUDA graphs (graphs.py).
    """

    def measure(model: nn.Module) -> dict[str, Any]:
        assert isinstance(model, Training)
        return figures(evaluated(model.method, validation, episodes, validation=True))

    if groups is None and isinstance(method, MxML):
        groups = [{"params": method.network.parameters()}]  # members are frozen
    training = Training(method.train())
    if graphs:
        check_graphs(tasks.device, config)
        training.capture(tasks)
    with replaying() if graphs else nullcontext():
        return fit(training, lambda model, episode: model(episode), tasks, config, run, groups=groups, evaluate=measure)
