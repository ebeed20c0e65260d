"""What the tables of fewshot.py share: data sets, trainings, and the row of a test."""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import nn

from smidgen.fewshot.data import shape_of
from smidgen.fewshot.episodes import Queries, Sampler, Shots, Tasks
from smidgen.fewshot.measure import evaluated, norm_mode
from smidgen.fewshot.models import make
from smidgen.fewshot.train import train
from smidgen.fit import FitConfig
from smidgen.images import Images, load
from smidgen.run import Run

FILES = {
    "omniglot": "omniglot28", "cifar_fs": "cifar_fs_100", "gtsrb": "gtsrb_32", "fashion_mnist": "fashion_mnist_28",
    "flowers12": "flowers12_48", "sign_digits": "sign_digits_32", "mnist": "mnist_28",
}  # fmt: skip
BALANCES: tuple[Queries, ...] = ("balanced", "dirichlet")
SIGMAS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)  # of label propagation, in units of the mean spread of validation tasks
TEST = 1_000_003  # seed of test tasks: the same for every method and seed of training
AT_ONCE = 8  # tasks of a batch in tests and validations; another number draws other tasks


def data(options: argparse.Namespace, name: str, split: str | None = None, size: int | None = None, channels: int | None = None) -> Images:
    """A stored data set, on the device."""
    images = load(options.data / "fewshot" / name / f"{FILES[name]}.npz", split, size, channels)
    return replace(images, name=name).to(options.device)


@dataclass(frozen=True)
class Trained:
    """A model and what a row says of its making."""

    model: nn.Module
    steps: int = 0
    kept: int = 0
    "The update it is the state of."
    tasks: int = 0
    seconds: float = 0.0
    augment: str = ""
    start: str = ""
    "Where training started, if not where it always does."
    chosen: str = ""
    "What was chosen on validation tasks."
    batch_norm: str = ""
    "Mode of a model that is looked up; of others it is seen."

    def row(self) -> dict:
        """All but the model."""
        columns = {name: value for name, value in vars(self).items() if name != "model"}
        return columns | {"seconds": round(self.seconds, 1), "batch_norm": self.batch_norm or norm_mode(self.model)}

    def variant(self, model: nn.Module, chosen: str) -> "Trained":
        """The same training with another answer."""
        return replace(self, model=model.eval(), chosen=chosen)


def halving(steps: int, halvings: int, seed: int, weight_decay: float = 0.0) -> FitConfig:
    """TPN's schedule: 1e-3, halved `halvings` times, in stretches of equal length."""
    every = max(1, -(-steps // (halvings + 1)))
    return FitConfig(steps=steps, learning_rate=1e-3, schedule="steps", decay=0.5, decay_every=every, weight_decay=weight_decay, seed=seed)


def untrained(method: str, sampler: Tasks, seed: int, device: torch.device) -> nn.Module:
    """A method of `smidgen fewshot train`."""
    name, *given = method.partition("@")[0].split("+")
    settings = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in given)}
    torch.manual_seed(seed)
    return make(name, shape_of(sampler.images), sampler.ways, settings).to(device)


def trained(method: str, sampler: Tasks, validation: Tasks, config: FitConfig, options: argparse.Namespace) -> Trained:
    """A method, as it was best on validation tasks."""
    return fitted(untrained(method, sampler, config.seed, options.device), sampler, validation, config, options, options.graphs)


def fitted(
    model: nn.Module, sampler: Tasks, validation: Tasks, config: FitConfig, options: argparse.Namespace, graphs: bool = False, **groups
) -> Trained:
    """Trains a method in place."""
    config = replace(config, clip=None, precision="float32", keep_best=True)
    started = time.monotonic()
    with scratch(config) as run:
        result = train(model, sampler, config, run, validation, options.validation, graphs=graphs, **groups)
    augment = " ".join(sampler.augment)
    return Trained(model.eval(), config.steps, result.kept, sampler.tasks, time.monotonic() - started, augment)


@contextmanager
def scratch(config: FitConfig) -> Iterator[Run]:
    """A run whose folder nobody keeps."""
    with tempfile.TemporaryDirectory() as place, Run("fewshot train", config, Path(place) / "run") as run:
        yield run


def measured(made: Trained, method: str, images: Images, ways: int, shots: Shots, balance: Queries, options: argparse.Namespace) -> dict:
    """A row: accuracy on the test tasks of a data set."""
    sampler = Sampler(images, ways, shots, options.queries, balance, AT_ONCE, TEST)
    result = evaluated(made.model, sampler, options.episodes)
    figures = {"accuracy": round(result.accuracy, 4), "interval": round(result.interval, 4), "episodes": options.episodes}
    setting = {"method": method, "tested": images.name, "ways": ways, "shots": shots, "queries": balance}
    return setting | figures | made.row()


def some(sampler: Sampler, options: argparse.Namespace) -> list:
    """As many tasks as a validation has."""
    return [sampler(i) for i in range(-(-options.validation // sampler.tasks))]
