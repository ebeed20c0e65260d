"""`smidgen symbolic evaluate`: a model on questions it has not seen, and whether it knows when it is wrong.

    accuracy          share of all questions whose whole answer the network has right: the paper's metric
    exact_accuracy    the same of the exact back end, whatever its score; a question it cannot read counts as wrong
    answered          share of questions answered at all, by the network, by the exact back end, and by both together as `solve` does
    answered_accuracy share of right ones among those
    calibration_error of the probabilities the network's answers are given with

`interval` is 1.96 standard errors. Groups are the task's own, of bAbI its twenty tasks; one with an error over 5 % counts as failed. With
`--split ood` the calibration is that of dev questions still; that is the point.
"""

import re
import time
from collections import Counter
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cyclopts import Parameter

from smidgen.errors import UserError, check_seed
from smidgen.run import Run
from smidgen.symbolic.answering import By, Network, Said, Solved, decide, text_of
from smidgen.symbolic.card import Card
from smidgen.symbolic.confidence import calibration_error
from smidgen.symbolic.layout import cells, weights
from smidgen.symbolic.runtime import Exported, exported_file, open_exported
from smidgen.symbolic.tasks import Batch, Examples, Task, open_task

FAILED = 0.05  # errors from which a group is not solved
DETAIL = re.compile(r"'.*?'|\d[\d.]*")  # of a reason, not its kind
REASONS = 8  # not to answer, that are logged
COUNT = 10_000  # questions, where none is given
CHUNK = 500  # of them at once
HARD = 2000  # questions that are laid out by likeliest actions too


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen symbolic evaluate`."""

    model: Path
    "A run of smidgen symbolic train or export, or a .onnx file."
    _: KW_ONLY
    task: str | None = None
    "Of the questions; none: the model's own."
    split: str = "id"
    "Of the task: id, ood, dev, train."
    data: Path | None = None
    "The bAbI archive or folder."
    questions: int | None = None
    "How many; none: 10,000, or all there are."
    examples: int = 6
    "Questions kept for the report, with their grids."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/symbolic/evaluate."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where a trained model computes."
    seed: int = 0
    "Chooses the questions."

    def check(self) -> None:
        """Refuses what cannot work."""
        if self.questions is not None and self.questions < 1:
            raise UserError(f"--questions must be positive, got {self.questions}")
        if self.examples < 0:
            raise UserError(f"--examples must not be negative, got {self.examples}")
        check_seed(self.seed)


def command(config: Config) -> dict[str, Any]:
    """Measure a trained or exported model."""
    with Run("symbolic evaluate", config, config.output, f"{config.model.stem}-{config.split}") as run:
        return main(config, run)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Load, draw, answer, count."""
    config.check()
    network, name = opened(config)
    card = network.card
    task = open_task(config.task or name, config.data)
    for note in task.notes:
        run.say(note)
    examples, batch = questions(task, card, config)
    started = time.monotonic()
    said = answered(network, batch, run)
    seconds = time.monotonic() - started
    right = np.array([text_of(one, card) == target for one, target in zip(said, examples.targets, strict=True)])
    asked = list(zip(examples.inputs, said, strict=True))
    solved: dict[By, list[Solved]] = {by: [decide(question, one, card, by) for question, one in asked] for by in procedures(card)}
    best = solved["auto" if "auto" in solved else "network"]
    kept = zip(best[: config.examples], said, examples.targets, strict=False)
    run.save("examples.json", {"examples": [shown(card, *one) for one in kept]})
    for reason, count in Counter(DETAIL.sub("…", s.reason) for s in best if s.answer is None).most_common(REASONS):
        run.log(reason=reason, count=count)
    return run.finish(
        accuracy=float(right.mean()),
        accuracy_interval=1.96 * float(right.std()) / len(right) ** 0.5,
        **selective(solved, examples.targets),
        calibration_error=calibration_error(np.array([s.confidence for s in solved["network"]]), right),
        **grouped(task, examples, right),
        **hard_layouts(network, batch, right),
        questions=len(batch),
        longest_question=int(batch.lengths.max()),
        task=task.name,
        split=config.split,
        notes=list(task.notes),
        model=card.model,
        rules=len(card.rules),
        risk=card.network.risk,
        evaluate_seconds=seconds,
        seed=config.seed,
    )


def opened(config: Config) -> tuple[Network, str]:
    """The model and the name of its task."""
    file = exported_file(config.model)
    if file is not None:
        if config.device == "cuda":
            raise UserError("--device cuda: an exported model runs on the processor; leave --device out")
        network = open_exported(file)
        return network, network.card.task
    from smidgen.precision import pick_device
    from smidgen.symbolic.settle import open_trained
    from smidgen.symbolic.stored import describe

    return open_trained(config.model, pick_device(config.device)), describe(config.model).task


def questions(task: Task, card: Card, config: Config) -> tuple[Examples, Batch]:
    """As text, and as the model reads them."""
    size = task.splits.get(config.split)
    count = config.questions if config.questions is not None else size or COUNT
    examples = task.examples(config.split, count, config.seed)
    return examples, replace(task, tokens=card.tokens, answers=card.answers).encode(examples)


def answered(network: Network, batch: Batch, run: Run) -> list[Said]:
    """What the network says of every question."""
    parts = [np.arange(i, min(i + CHUNK, len(batch))) for i in range(0, len(batch), CHUNK)]
    return [one for part in run.track(parts, "questions", len(parts)) for one in network.many(batch.take(part))]


def procedures(card: Card) -> tuple[By, ...]:
    """Who can be asked."""
    return ("network",) if card.exact is None else ("network", "exact", "auto")


def selective(solved: dict[By, list[Solved]], targets: list[str]) -> dict[str, float | None]:
    """Shares of questions answered, and of right ones among them."""
    found: dict[str, float | None] = {}
    for by, outcomes in solved.items():
        given = [s.answer == target for s, target in zip(outcomes, targets, strict=True) if s.answer is not None]
        found[f"answered_{by}"] = len(given) / len(outcomes)
        found[f"answered_accuracy_{by}"] = sum(given) / len(given) if given else None
    if "exact" in solved:
        right = [target in (s.answer, s.guess) for s, target in zip(solved["exact"], targets, strict=True)]
        found["exact_accuracy"] = sum(right) / len(right)
    return found


def grouped(task: Task, examples: Examples, right: np.ndarray) -> dict[str, Any]:
    """Accuracy of every group there is."""
    if len(task.groups) == 1:
        return {}
    place = np.array(examples.groups)
    accuracy = {name: float(right[place == i].mean()) for i, name in enumerate(task.groups) if (place == i).any()}
    return {
        "accuracy_by_group": accuracy,
        "questions_by_group": {name: int((place == task.groups.index(name)).sum()) for name in accuracy},
        "groups": len(accuracy),
        "groups_failed": sum(1 - value > FAILED for value in accuracy.values()),
    }


def hard_layouts(network: Network, batch: Batch, right: np.ndarray) -> dict[str, float]:
    """What likeliest actions alone would answer, of a trained model with a soft layout: how crisp it is."""
    if isinstance(network, Exported):
        return {}
    from smidgen.symbolic.settle import with_hard_layout

    count = min(HARD, len(batch))
    part = batch.take(np.arange(count))
    hard = with_hard_layout(network, part)
    return {} if hard is None else {"accuracy_hard": float(hard.mean()), "accuracy_soft": float(right[:count].mean())}


def shown(card: Card, solved: Solved, said: Said, target: str) -> dict[str, Any]:
    """A question for the report, with its grid."""
    symbols = [*card.tokens.split(solved.question), "$"]
    found = {
        "symbols": symbols,
        "answer": solved.answer,
        "guess": solved.guess,
        "target": target,
        "by": solved.by,
        "confidence": solved.confidence,
        "reason": solved.reason,
        "network": text_of(said, card),
    }
    if said.actions is None or card.rows is None or card.columns is None:
        return found
    laid = cells(weights(said.actions[None], card.rows, card.columns)[0])
    return found | {"actions": said.actions.round(4).tolist(), "cells": laid.token.tolist(), "weights": laid.weight.round(4).tolist()}
