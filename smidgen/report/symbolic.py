"""The pages of `smidgen symbolic train`, `evaluate` and `export`.

Read besides what every run has, of an evaluation: examples.json, questions with what became of every token (symbols, actions, cells,
weights) and what was answered.
"""

import math
from collections.abc import Iterator
from typing import Any

from smidgen import plots
from smidgen.errors import UserError
from smidgen.report.fewshot import percent
from smidgen.report.finished import Finished, read_json
from smidgen.report.page import Cell, Figure, Section, Table
from smidgen.report.run import facts
from smidgen.report.words import finite, number

SELECTED = "The state of the best validation is the one kept; smidgen symbolic evaluate measures on questions of the test splits."
FOLLOWED = "Share of dev questions whose whole answer is right; certainty: mean probability of a token's likeliest action."
LOSS = "Loss of the questions trained on, as logged."
ANSWERED = (
    "Whoever is less sure than its threshold gives no answer. The exact back end calculates with the numbers it reads off the layout. "
    "Both: its answer where it is sure enough, else the network's."
)
GROUPS = "Share of right answers of the network, by kind of question."
REASONS = "Why questions were not answered."
ACTIONS = "Probabilities of every token's list action; $ is the end."
CELLS = "The likeliest token of every cell, as dark as it is probable; row 0 is the newest, slot 0 the newest of a row."
COMPARED = "The written file and torch on the same questions, on one thread."
LONGEST = 160  # tokens whose actions are drawn
TRAINING_SHOWN = {"validation_accuracy", "validation_accuracy_before", "validation_certainty"}
EXPORT_SHOWN = {"agreement", "agreement_decided", "accuracy", "latency_ms_p50", "latency_ms_p95", "size_bytes"}
EXPORT_SHOWN |= {"dev_accuracy_soft", "dev_accuracy_hard"}
WHO = {"network": "network", "exact": "exact back end", "auto": "both"}


def symbolic_training(run: Finished) -> list[Section]:
    """Headline and learning curves."""
    rows = [
        [Cell("before training"), Cell(percent(run.metrics.get("validation_accuracy_before")), numeric=True)],
        [Cell("best"), Cell(percent(run.metrics.get("validation_accuracy")), numeric=True, best=True)],
    ]
    table = Table(["", "right answers to dev questions"], rows)
    return [Section("Validation", note=SELECTED, table=table, facts=facts(run, TRAINING_SHOWN)), *curves(run)]


def curves(run: Finished) -> list[Section]:
    """Accuracy, certainty and loss against steps."""
    measured = {
        name: [(row["step"], 100 * finite(row[name])) for row in run.steps if name in row and math.isfinite(finite(row[name]))]
        for name in ("accuracy", "certainty")
    }
    loss = [(row["step"], finite(row["loss"])) for row in run.steps if "loss" in row and math.isfinite(finite(row["loss"]))]
    figures = []
    if len(measured["accuracy"]) > 1:
        series = {name: points for name, points in measured.items() if points}
        figures.append(Figure(plots.lines(series, "step", "%", "Validation"), FOLLOWED))
    if len(loss) > 1:
        figures.append(Figure(plots.by_step({"loss": loss}, "loss", "Training loss"), LOSS))
    return [Section("Learning curves", figures=figures)] if figures else []


def symbolic_evaluation(run: Finished) -> list[Section]:
    """Headline, who answers, groups, why not, and questions with their grids."""
    metrics = run.metrics
    accuracy = f"{percent(metrics.get('accuracy'))} ± {100 * finite(metrics.get('accuracy_interval')):.2f}"
    rows = [[Cell("network"), Cell(accuracy, numeric=True, best=True)]]
    if "exact_accuracy" in metrics:
        rows.append([Cell("exact back end"), Cell(percent(metrics["exact_accuracy"]), numeric=True)])
    if "accuracy_hard" in metrics:
        rows.append([Cell("network, each token where its likeliest action puts it"), Cell(percent(metrics["accuracy_hard"]), numeric=True)])
    told = "Of all questions, ± 1.96 standard errors; whoever is not sure is asked for a guess."
    table = Table(["whole answer right", "of questions"], rows)
    headline = Section("Accuracy", note=told, table=table, facts=facts(run, shown(metrics)))
    return [headline, *answered(run), *groups(run), *reasons(run), *questions(run)]


def shown(metrics: dict[str, Any]) -> set[str]:
    """Metrics that have a table of their own."""
    own = ("accuracy", "answered_", "exact_accuracy", "questions_by_group")
    return {name for name in metrics if name.startswith(own)}


def answered(run: Finished) -> list[Section]:
    """How much of it is answered, and how well."""
    rows = []
    for by, name in WHO.items():
        if f"answered_{by}" in run.metrics:
            values = (run.metrics[f"answered_{by}"], run.metrics.get(f"answered_accuracy_{by}"))
            rows.append([Cell(name), *(Cell(percent(value), numeric=True) for value in values)])
    return [Section("Answered, or not", note=ANSWERED, table=Table(["", "answered", "right of these"], rows))] if rows else []


def groups(run: Finished) -> list[Section]:
    """A row each."""
    accuracy, count = run.per_text("accuracy_by_group"), run.per_text("questions_by_group")
    if not accuracy:
        return []
    rows = [[Cell(name), Cell(percent(value), numeric=True), Cell.of("questions", count.get(name))] for name, value in accuracy.items()]
    return [Section("By kind of question", note=GROUPS, table=Table(["", "right", "questions"], rows))]


def reasons(run: Finished) -> list[Section]:
    """A row each."""
    rows = [[Cell(str(row["reason"])), Cell.of("questions", row.get("count"))] for row in run.steps if "reason" in row]
    return [Section("No answer", note=REASONS, table=Table(["", "questions"], rows))] if rows else []


def questions(run: Finished) -> list[Section]:
    """Questions as they were laid out."""
    path = run.folder / "examples.json"
    if not path.exists():
        return []
    try:
        figures = [figure for i, example in enumerate(read_json(path)["examples"]) for figure in laid_out(example, i + 1)]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: damaged, a question in it lacks {error}") from error
    return [Section("Questions", figures=figures)] if figures else []


def laid_out(example: dict[str, Any], place: int) -> Iterator[Figure]:
    """What became of a question's tokens, and the grid."""
    if "actions" not in example:
        return
    symbols, title = example["symbols"], f"Question {place}"
    if len(symbols) <= LONGEST:
        yield Figure(plots.shares(symbols, example["actions"], ("top-list-update", "new-list-push", "no-op"), f"{title}, actions"), ACTIONS)
    rows = [
        [(symbols[token] if token >= 0 else "", finite(weight)) for token, weight in zip(tokens, weights, strict=True)]
        for tokens, weights in zip(example["cells"], example["weights"], strict=True)
    ]
    yield Figure(plots.cells(rows, f"{title}, grid"), f"{title}: {verdict(example)} {CELLS}")


def verdict(example: dict[str, Any]) -> str:
    """What was said, and what is right."""
    right = "right" if example["target"] in (example["answer"], example["guess"]) else f"the answer is {example['target']}"
    if example["answer"] is None:
        guess = "" if example["guess"] is None else f", it would have said {example['guess']}"
        return f"no answer ({example['reason']}){guess}: {right}."
    return f"{example['answer']}, by the {WHO[example['by']]}, probability {number(finite(example['confidence']))}: {right}."


def symbolic_export(run: Finished) -> list[Section]:
    """The file beside torch."""
    metrics = run.metrics
    rows = [
        [Cell("network says the same"), Cell(percent(metrics.get("agreement")), numeric=True)],
        [Cell("answered the same, or not at all by either"), Cell(percent(metrics.get("agreement_decided")), numeric=True)],
        [Cell("whole answer right"), Cell(percent(metrics.get("accuracy")), numeric=True)],
        [Cell("dev answers right in torch, soft layout"), Cell(percent(metrics.get("dev_accuracy_soft")), numeric=True)],
        [Cell("dev answers right in torch, hard layout"), Cell(percent(metrics.get("dev_accuracy_hard")), numeric=True)],
        [Cell("size, MB"), Cell.of("size_bytes", metrics.get("size_bytes"))],
        [Cell("time of a question, ms, median"), Cell.of("latency_ms_p50", metrics.get("latency_ms_p50"))],
        [Cell("time of a question, ms, 95th percentile"), Cell.of("latency_ms_p95", metrics.get("latency_ms_p95"))],
    ]
    return [Section("Exported", note=COMPARED, table=Table(["", ""], rows), facts=facts(run, EXPORT_SHOWN))]
