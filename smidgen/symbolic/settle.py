"""What a trained model learns after its weights: rules of the exact back end, and how sure its answers are.

Rules come from training questions, calibrations from dev questions that neither training nor the choice of the best state saw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from smidgen.errors import UserError
from smidgen.symbolic import exact
from smidgen.symbolic.answering import Network, Said
from smidgen.symbolic.card import Card
from smidgen.symbolic.confidence import Calibration, calibrate
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.predict import predict, right
from smidgen.symbolic.seq2grid import hard_layouts
from smidgen.symbolic.stored import load, trained_folder
from smidgen.symbolic.tasks import Batch, Examples, Task

CARD = "card.json"
RISK = 0.05  # share of wrong answers allowed, where none is given
RULE_QUESTIONS, DEV_QUESTIONS = 2000, 2000
SETTLING = 2  # added to the seed for these questions
CHUNK = 512  # questions at once


@dataclass(frozen=True)
class Trained:
    """A trained model with its card: a `Network`."""

    model: nn.Module
    card: Card

    def __call__(self, tokens: Int[np.ndarray, "tokens"]) -> Said:
        """One question."""
        return self.many(Batch(tokens[None], np.ones((1, len(tokens)), bool), np.zeros((1, 1), np.int64), np.zeros(1, np.int64)))[0]

    def many(self, batch: Batch) -> list[Said]:
        """Questions at once."""
        answers, found = predict(self.model, batch), actions(self.model, batch)
        laid = [None] * len(batch) if found is None else [row[:n].copy() for row, n in zip(found, batch.lengths.tolist(), strict=True)]
        return [Said(*one) for one in zip(map(np.asarray, answers.symbols), answers.log_probability.tolist(), laid, strict=True)]


def open_trained(folder: Path, device: torch.device | str = "cpu") -> Trained:
    """What `smidgen symbolic train` left."""
    folder = trained_folder(folder)
    model = load(folder, device)
    try:
        return Trained(model, Card.of((folder / CARD).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {CARD}; train the model again, or give the run's folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CARD}: damaged, or of another version") from error


def settle(model: nn.Module, name: str, task: Task, seed: int = 0, risk: float = RISK) -> Card:
    """The card of a trained model of that name, in evaluation mode."""
    dev = drawn(task, "dev", DEV_QUESTIONS, seed)
    batch = task.encode(dev)
    answers = predict(model, batch)
    network = calibrate(np.exp(answers.log_probability), right(answers, batch), risk)
    rules = learned(model, task, seed)
    return Card(
        name,
        task.name,
        task.tokens,
        task.answers,
        task.length,
        *grid_of(model),
        network,
        calibrated(model, rules, dev, batch, risk) if rules else None,
        rules,
    )


def learned(model: nn.Module, task: Task, seed: int) -> dict[str, exact.Rule]:
    """Rules of a model that lays characters out by itself; others have none."""
    if not isinstance(model, GridModel) or model.guided or task.classifies or task.tokens.unit != "characters":
        return {}
    train = drawn(task, "train", RULE_QUESTIONS, seed)
    return exact.learn(readings(model, train.inputs, task.encode(train)), train.targets)


def calibrated(model: nn.Module, rules: dict[str, exact.Rule], examples: Examples, batch: Batch, risk: float) -> Calibration:
    """Of the exact back end, on the questions it answers."""
    found = zip(outcomes(model, rules, examples.inputs, batch), examples.targets, strict=True)
    answered = [(o.score, o.answer == target) for o, target in found if o.answer is not None]
    score, correct = (np.array([pair[i] for pair in answered], kind) for i, kind in ((0, float), (1, bool)))
    return calibrate(score, correct, risk)


def outcomes(model: nn.Module, rules: Mapping[str, exact.Rule], inputs: Sequence[str], batch: Batch) -> list[exact.Outcome]:
    """What the exact back end makes of every question."""
    return [exact.answer(reading, rules) for reading in readings(model, inputs, batch)]


def readings(model: nn.Module, inputs: Sequence[str], batch: Batch) -> list[exact.Reading]:
    """What the layout of every question says."""
    rows, columns = grid_of(model)
    probabilities = actions(model, batch)
    assert probabilities is not None and rows is not None and columns is not None
    lengths = batch.lengths.tolist()
    return [exact.read(text, p[:n], rows, columns) for text, p, n in zip(inputs, probabilities, lengths, strict=True)]


@torch.no_grad()
def actions(model: nn.Module, batch: Batch) -> Float[np.ndarray, "n tokens 3"] | None:
    """Probabilities of every token's list actions, in either mode. None: a model without."""
    if not isinstance(model, GridModel):
        return None
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(batch), CHUNK):
        part = slice(start, start + CHUNK)
        tokens, mask = (torch.from_numpy(array[part]).to(device) for array in (batch.tokens, batch.mask))
        given = None if batch.actions is None else torch.from_numpy(batch.actions[part]).to(device)
        parts.append(model.module.probabilities(model.embedding(tokens, mask), mask, model.given(given)).double().cpu().numpy())
    return np.concatenate(parts)


def with_hard_layout(network: Network, batch: Batch) -> Bool[np.ndarray, "n"] | None:
    """Which questions a trained model has right if likeliest actions lay them out; none if it has no soft layout to begin with."""
    if not isinstance(network, Trained) or not isinstance(network.model, GridModel) or network.model.guided:
        return None
    with hard_layouts(network.model.module):
        return right(predict(network.model, batch), batch)


def grid_of(model: nn.Module) -> tuple[int, int] | tuple[None, None]:
    """Rows and columns."""
    return (model.module.rows, model.module.columns) if isinstance(model, GridModel) else (None, None)


def drawn(task: Task, split: str, count: int, seed: int) -> Examples:
    """So many examples, or all there are, other ones than training drew with this seed."""
    size = task.splits[split]
    return task.examples(split, count if size is None else min(count, size), seed + SETTLING)
