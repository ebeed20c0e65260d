"""`smidgen fewshot train`: learn, over many small tasks, to learn from few labels.

Every update is one batch of tasks of the training classes; tasks are numbered, so a run goes on from a checkpoint, and processes share
them, as `fit` does with any batches. Every so often the method is measured on tasks of the validation classes, always the same ones; the
state that was best there is the one kept. The test classes are not touched: `smidgen fewshot evaluate` is for them.

More shots in training than in use ("higher shot", notes 2.4) is `--shots 5 --validation-shots 1`.
"""

import time
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from cyclopts import Parameter
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.data import Shape, load_images, shape_of
from smidgen.fewshot.episodes import Episode, Sampler, Shots, Tasks
from smidgen.fewshot.evaluate import Result, evaluated, examples, norm_mode
from smidgen.fewshot.methods.mxml import MxML
from smidgen.fewshot.models import TRAINED, Description, describe, load, load_members, make, save, settle, trained_folder
from smidgen.fit import CHECKPOINT, FitConfig, FitResult, fit, is_first_process, own_device, process_run
from smidgen.precision import pick_device
from smidgen.run import Run

__all__ = ["Config", "command", "load", "main", "train"]

EVALUATIONS = 20  # of a training, where their interval is not given
VALIDATION = 1  # added to the seed for the tasks of validation


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen fewshot train`."""

    data: str
    "Images with labels, divided by class: glyphs (from the package), a folder of class folders, a .npz or a .csv."
    _: KW_ONLY
    method: str = "protonet"
    "By name; a wrong one is answered with the list."
    option: Mapping[str, int | float | bool | str] = field(default_factory=dict)
    "Of the method, as --option.width 32; a wrong one is answered with the list."
    members: tuple[Path, ...] = ()
    "Of --method mxml: runs of --method normalised-protonet. The classes trained on now should be new to them."
    ways: int = 5
    "Classes of a task."
    shots: Shots = 1
    "Labelled images of each: a number, or any, any-class, any-task (1 to 50, drawn)."
    queries: int = 15
    "Images of each to be classified."
    tasks: int = 1
    "Tasks per update and process."
    steps: int = 10_000
    "Updates."
    learning_rate: float = 1e-3
    "Of Adam."
    schedule: Literal["cosine", "constant"] = "cosine"
    "Of the learning rate."
    warmup: int = 0
    "Updates over which the learning rate grows from 0."
    weight_decay: float = 0.0
    "Of all parameters."
    clip: float | None = None
    "Largest norm of the gradient; none: as it is."
    accumulation: int = 1
    "Batches of tasks per update and process."
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    "Of matrix products and convolutions."
    validate_every: int | None = None
    "Updates between validations; none: twenty in all."
    validation_episodes: int = 200
    "Tasks of a validation."
    validation_ways: int | None = None
    "Classes of these; none: as in training."
    validation_shots: Shots | None = None
    "Labelled images of each; none: as in training."
    patience: int | None = None
    "Validations without a higher accuracy before training stops; none: train to the end. The best state is kept either way."
    size: int | None = None
    "Side of the square images, in pixels, that photos are brought to; none: as they are, all alike."
    train_split: str = "train"
    "Classes trained on: train, or what the data calls its parts, or all."
    validation_data: str | None = None
    "Images measured on meanwhile; none: of the same data."
    validation_split: str = "val"
    "Classes measured on."
    examples: int = 3
    "Validation tasks kept for the report, with their images."
    checkpoint_every: int | None = None
    "Updates between checkpoints; none: only when interrupted."
    resume: Path | None = None
    "Folder of an unfinished run to go on from, with its options."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/fewshot/train."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Chooses the first parameters and the tasks."

    def check(self) -> None:
        """Refuses what cannot work."""
        for name, value in (("tasks", self.tasks), ("validation-episodes", self.validation_episodes)):
            if value < 1:
                raise UserError(f"--{name} must be positive, got {value}")
        if self.examples < 0:
            raise UserError(f"--examples must not be negative, got {self.examples}")
        if self.members and self.method != "mxml":
            raise UserError(f"--members are of --method mxml, not of {self.method}")
        self.fit().check(evaluates=True)

    def fit(self) -> FitConfig:
        """What the training loop has to know; it keeps the best state only if it has patience, so it has enough for all validations."""
        return FitConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
            accumulation=self.accumulation,
            precision=self.precision,
            evaluate_every=self.validate_every,
            patience=self.patience,
            keep_best=True,
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
            resume=self.resume,
        )


def command(config: Config) -> dict[str, Any] | None:
    """Train a few-shot method on tasks; under torchrun, on many devices."""
    label = f"{config.method}-{Path(config.data).stem}-{config.ways}w{config.shots}s"
    with process_run("fewshot train", replace(config, resume=None), config.output, label) as run:
        metrics = main(config, run)
    return metrics if is_first_process() else None


def main(config: Config, run: Run) -> dict[str, Any]:
    """Load, make, train, keep the best, save."""
    config.check()
    device = own_device(pick_device(config.device))
    images = load_images(config.data, config.train_split, config.size)
    shape, other = shape_of(images), config.validation_data or config.data
    held_out = load_images(other, config.validation_split, config.size)
    torch.manual_seed(config.seed)
    options = dict(config.option) | chosen_members(config, shape)
    description = Description(config.method, shape, config.ways, config.shots, options, images.name)
    description.check(shape_of(held_out), other)
    method = make(config.method, shape, config.ways, options)
    if config.members:
        load_members(method, [trained_folder(folder) for folder in config.members])
    method = method.to(device)
    tasks = Sampler(images.to(device), config.ways, config.shots, config.queries, tasks=config.tasks, seed=config.seed)
    ways = config.ways if config.validation_ways is None else config.validation_ways
    shots = config.shots if config.validation_shots is None else config.validation_shots
    validation = Sampler(held_out.to(device), ways, shots, config.queries, seed=config.seed + VALIDATION)

    started = time.monotonic()
    result = train(method, tasks, config.fit(), run, validation, config.validation_episodes)
    seconds = time.monotonic() - started

    first, kept = result.evaluation(0), result.evaluation(result.kept)
    if settle(method, tasks.images):
        kept = figures(evaluated(method, validation, config.validation_episodes))
        run.log(settled=True, **kept)
    folder = run.partial(TRAINED)
    save(folder, method, description)
    run.keep(folder)
    (run.folder / CHECKPOINT).unlink(missing_ok=True)
    run.save("examples.json", {"examples": examples(method.eval(), validation, config.examples)})
    return run.finish(
        validation_accuracy=kept["accuracy"],
        validation_accuracy_interval=kept["accuracy_interval"],
        validation_accuracy_before=first["accuracy"],
        validation_episodes=config.validation_episodes,
        validation_ways=ways,
        validation_shots=shots,
        steps=result.step,
        kept_step=result.kept,
        stopped=result.stopped,
        method=config.method,
        ways=config.ways,
        shots=config.shots,
        queries_per_class=config.queries,
        tasks=config.tasks,
        batch_norm=norm_mode(method),
        data=images.name,
        train_classes=len(images.classes),
        validation_classes=len(held_out.classes),
        chance=1 / ways,
        parameters=sum(p.numel() for p in method.parameters()),
        train_seconds=seconds,
        seed=config.seed,
        device=str(device),
    )


def chosen_members(config: Config, shape: Shape) -> dict[str, Any]:
    """The option of a mixture that says what its members are."""
    described = [describe(trained_folder(folder)) for folder in config.members]
    for member, folder in zip(described, config.members, strict=True):
        if member.shape != shape:
            raise UserError(
                f"--members {folder} reads images of {'x'.join(map(str, member.shape))}, the data has {'x'.join(map(str, shape))}"
            )
    return {"members": [{"name": member.name, "options": dict(member.options)} for member in described]} if described else {}


def figures(result: Result) -> dict[str, float]:
    """What the log has of a validation; `held_out`, the share of errors, is what the best state has least of."""
    return {"held_out": 1 - result.accuracy, "accuracy": result.accuracy, "accuracy_interval": result.interval}


class Training(nn.Module):
    """A method whose forward pass is its loss: what spreads a model over processes hears of forward passes only."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method
        self.graphs: tuple[nn.Module, ...] = ()  # in a tuple, or its parameters would be there twice

    def forward(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean over tasks."""
        if self.graphs and self.training:
            return self.graphs[0](episode.support_x, episode.support_y, episode.query_x, episode.query_y)
        return self.method.loss(episode)  # pyright: ignore  a Method

    def capture(self, episode: Episode) -> None:
        """Makes CUDA graphs of the loss and its gradient, for tasks of just this size and without padding.

        A small network starts a thousand kernels per update, which takes longer than they run; two graphs start them all.
        """
        example = episode.support_x, episode.support_y, episode.query_x, episode.query_y
        self.graphs = (torch.cuda.make_graphed_callables(_Plain(self.method, episode.ways), example),)


class _Plain(nn.Module):
    """The loss as a function of tensors alone."""

    def __init__(self, method: nn.Module, ways: int) -> None:
        super().__init__()
        self.method, self.ways = method, ways

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Float[Tensor, ""]:
        return self.method.loss(Episode(support_x, support_y, query_x, query_y, self.ways))  # pyright: ignore  a Method


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

    `groups` are parameter groups as `fit` has them. `graphs`: by CUDA graphs, for which all tasks must have one size and no padding.
    """

    def measure(model: nn.Module) -> dict[str, Any]:
        assert isinstance(model, Training)
        return figures(evaluated(model.method, validation, episodes, validation=True))

    if groups is None and isinstance(method, MxML):
        groups = [{"params": method.network.parameters()}]  # members are frozen
    training = Training(method.train())
    if graphs:
        if tasks.device.type != "cuda" or config.accumulation > 1:  # a second backward pass would overwrite the gradient of the first
            raise UserError("CUDA graphs need a CUDA device, and one batch of tasks per update")
        training.capture(tasks(0))
    return fit(training, lambda model, episode: model(episode), tasks, config, run, groups=groups, evaluate=measure)
