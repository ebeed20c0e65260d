"""A method's accuracy on tasks, and what can be seen from outside of how it comes about.

    accuracy    a = 1/E sum_e a_e                     a_e: share of the queries of episode e classified right
    interval    1.96 s / sqrt(E), s^2 = 1/E sum_e (a_e - a)^2     half the width of the 95% interval of the mean

Episodes are numbered and seeded by their number, so those of process r of P are r, r + P, r + 2P, ...: however many processes share the
work, the episodes, and with them all figures, are the same.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, Tasks, accuracy
from smidgen.fewshot.methods import Shows, Validates
from smidgen.fit import seed_of
from smidgen.run import Run

BINS = ((1, 1), (2, 5), (6, 10), (11, 20), (21, 30), (31, 40), (41, 50))  # shots, in tables and figures
INSIDES = 200  # episodes whose insides are kept
Z = 1.96  # standard deviations to either side that hold 95% of a normal distribution


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
    shown: dict[int, list[dict[str, Any]]] = {}
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
            shown[i] = [{"episode": i * sampler.tasks + t} | row for t, row in enumerate(_figures(method, episode, sampler.seed, i)[:kept])]
    for m, training in modes.items():
        m.training = training
    parts = _gathered((accuracies, shown, confusion, by_shots))
    accuracies, shown = ({i: row for part in parts for i, row in part[k].items()} for k in (0, 1))
    right, queries = np.sum([part[3] for part in parts], 0)
    return Result(
        np.array([a for i in sorted(accuracies) for a in accuracies[i]]),
        np.sum([part[2] for part in parts], 0),
        {shots: (int(right[shots]), int(queries[shots])) for shots in np.flatnonzero(queries).tolist()},
        [row for i in sorted(shown) for row in shown[i]],
    )


def predicted(
    method: nn.Module, episode: Episode, seed: int = 0, i: int = 0, *, validation: bool = False
) -> Float[Tensor, "tasks queries ways"]:
    """Probabilities of batch number i, the same whatever was drawn before."""
    device = episode.query_x.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, i))
        if validation and isinstance(method, Validates):
            return method.validate(episode)
        return method.predict(episode)  # pyright: ignore  a Method


def norm_mode(method: nn.Module) -> str:
    """What batch norm normalises by at test time: statistics of the training, or of the batch, queries and all."""
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
    shown = {name: values for name, values in insides(method, episode, seed, i).items() if name in ("omega", "gamma", "weights")}
    shots = episode.shots().int().tolist()
    return [{"shots": shots[t]} | {name: values[t].tolist() for name, values in shown.items()} for t in range(len(shots))]


def insides(method: Shows, episode: Episode, seed: int, i: int) -> dict[str, Tensor]:
    """What a method shows of batch number i, on the processor."""
    device = episode.query_x.device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, i))
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
