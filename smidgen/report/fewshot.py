"""The pages of `smidgen fewshot train` and `smidgen fewshot evaluate`.

Read besides what every run has, where they are there: confusion.json (classes, counts, queries) and examples.json (tasks with their images
as data URIs, what was said of them, and insides: what fewshot/methods/__init__.py lists).
"""

import math
from collections.abc import Iterator
from typing import Any

from smidgen import plots
from smidgen.errors import UserError
from smidgen.report.finished import Finished, read_json
from smidgen.report.page import Cell, Figure, Section, Table
from smidgen.report.run import facts
from smidgen.report.words import finite, number

SELECTED = (
    "The state of the best validation is the one kept, so its accuracy is a little too good; "
    "smidgen fewshot evaluate measures on classes never seen."
)
FOLLOWED = "Accuracy on the same tasks of the validation classes at every validation, with the 95% interval of its mean over tasks."
LOSS = "Loss of the tasks trained on, as logged; tasks differ, so it jumps."
BY_SHOTS = "Accuracy over all queries whose class had so many labelled images in its task."
CONFUSED = (
    "Rows: the query's class; columns: the class predicted, as shares of the row's queries. Two classes meet only in tasks that drew both."
)
EXAMPLE = "Framed in orange: classified wrong, with what was said of it. Not all images of a task are drawn."
GRAPH = "Propagation graph: squares are labelled images, dots those to be classified, colours their true classes; darker edges weigh more."
GAMMA = "Factor of each layer's learning rate against the number of labelled images of a task."
OMEGA = "Weight of a class in the loss, times the number of classes, against its share of the labelled images: at 1 it counts as ever."
WEIGHTS = "Weight of each member of the mixture, mean over the tasks kept."
SHOWN = {"accuracy", "accuracy_interval", "accuracy_by_shots", "queries_by_shots", "chance"}
TRAINING_SHOWN = {"validation_accuracy", "validation_accuracy_interval", "validation_accuracy_before", "chance"}
EDGES = 1500  # of a graph, the strongest


def fewshot_training(run: Finished) -> list[Section]:
    """Headline, learning curves, examples."""
    metrics = run.metrics
    rows = [
        [Cell("before training"), Cell(percent(metrics.get("validation_accuracy_before")), numeric=True)],
        [Cell("best"), Cell(interval(metrics, "validation_accuracy"), numeric=True, best=True)],
        [Cell("chance"), Cell(percent(metrics.get("chance")), numeric=True)],
    ]
    table = Table(["", "accuracy on validation tasks"], rows)
    headline = Section("Validation", note=SELECTED, table=table, facts=facts(run, TRAINING_SHOWN))
    return [headline, *curves(run), *episodes(run)]


def fewshot_evaluation(run: Finished) -> list[Section]:
    """Headline, accuracy against shots, confusion, insides, examples."""
    metrics = run.metrics
    rows = [
        [Cell("accuracy, mean over tasks"), Cell(interval(metrics, "accuracy"), numeric=True, best=True)],
        [Cell("chance"), Cell(percent(metrics.get("chance")), numeric=True)],
    ]
    headline = Section("Accuracy", note=stated(metrics), table=Table(["", "of queries"], rows), facts=facts(run, SHOWN))
    return [headline, *against_shots(run), *confusion(run), *balancing(run), *members(run), *episodes(run)]


def percent(fraction: Any) -> str:
    """For people: 0.875 is 87.50%."""
    value = finite(fraction)
    return "–" if math.isnan(value) else f"{100 * value:.2f}%"


def interval(metrics: dict[str, Any], name: str) -> str:
    """A mean and half its 95% interval."""
    return f"{percent(metrics.get(name))} ± {100 * finite(metrics.get(f'{name}_interval')):.2f}"


def stated(metrics: dict[str, Any]) -> str:
    """What an accuracy of this kind has to be told with."""
    informs = (
        "inform each other, which needs them to arrive together" if metrics.get("queries_inform_each_other") else "are judged one by one"
    )
    return (
        f"Mean ± 1.96 standard errors over {number(metrics.get('episodes'))} tasks. Batch norm: {metrics.get('batch_norm')}. "
        f"Queries: {metrics.get('queries')}, {number(metrics.get('queries_per_class'))} per class on average; they {informs}."
    )


def curves(run: Finished) -> list[Section]:
    """Loss and validation accuracy against steps."""
    accuracy = [(row["step"], finite(row["accuracy"]), finite(row.get("accuracy_interval"))) for row in run.steps if "accuracy" in row]
    loss = [(row["step"], finite(row["loss"])) for row in run.steps if "loss" in row and math.isfinite(finite(row["loss"]))]
    figures = []
    if len(accuracy) > 1:
        points = {"validation": [(step, 100 * value) for step, value, _ in accuracy]}
        error = {"validation": [100 * off for *_, off in accuracy]}
        figures.append(Figure(plots.lines(points, "step", "accuracy (%)", "Validation accuracy", error), FOLLOWED))
    if len(loss) > 1:
        figures.append(Figure(plots.by_step({"loss": loss}, "loss", "Training loss"), LOSS))
    return [Section("Learning curves", figures=figures)] if figures else []


def against_shots(run: Finished) -> list[Section]:
    """A table, and a line where there is more than one number of shots."""
    by_shots, queries = run.per_text("accuracy_by_shots"), run.per_text("queries_by_shots")
    rows = [[Cell(shots), Cell(percent(value), numeric=True), Cell.of("queries", queries.get(shots))] for shots, value in by_shots.items()]
    points = [(sum(map(float, shots.split("-"))) / len(shots.split("-")), 100 * value) for shots, value in by_shots.items()]
    figures = (
        [Figure(plots.lines({"accuracy": points}, "shots", "accuracy (%)", "Accuracy against shots"), BY_SHOTS)] if len(points) > 1 else []
    )
    return [Section("Accuracy against shots", note=BY_SHOTS, table=Table(["shots", "accuracy", "queries"], rows), figures=figures)]


def confusion(run: Finished) -> list[Section]:
    """The heat map."""
    path = run.folder / "confusion.json"
    if not path.exists():
        return []
    shown = read_json(path)
    try:
        names, of = shown["classes"], shown["of"]
        shares = [[count / max(1, total) for count in row] for row, total in zip(shown["counts"], shown["queries"], strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged, it lacks classes, counts or queries") from error
    note = f" The {len(names)} of {of} classes most often mistaken." if len(names) < of else ""
    return [Section("Confusion", figures=[Figure(plots.heat_map(shares, names, names, "Confusion of classes", "class"), CONFUSED + note)])]


def balancing(run: Finished) -> list[Section]:
    """Balancing variables of Bayesian TAML against sizes."""
    layers: dict[str, list[tuple[float, float]]] = {}
    classes: list[tuple[float, float]] = []
    for row in run.steps:
        shots = row.get("shots", [])
        for layer, value in enumerate(row.get("gamma", [])):
            layers.setdefault(f"layer {layer + 1}", []).append((sum(shots), value))
        if "omega" in row:
            classes += [(n / sum(shots), len(shots) * value) for n, value in zip(shots, row["omega"], strict=True)]
    figures = []
    if layers:
        figures.append(Figure(plots.dots(layers, "labelled images of the task", "exp(gamma)", "Learning rates by task size"), GAMMA))
    if classes:
        picture = plots.dots({"classes": classes}, "share of the labelled images", "classes x omega", "Class weights by class size")
        figures.append(Figure(picture, OMEGA))
    return [Section("Balancing variables", figures=figures)] if figures else []


def members(run: Finished) -> list[Section]:
    """Mean weights of a mixture."""
    rows = [row["weights"] for row in run.steps if "weights" in row]
    if not rows:
        return []
    means = {f"member {i + 1}": sum(column) / len(column) for i, column in enumerate(zip(*rows, strict=True))}
    return [Section("Mixture", figures=[Figure(plots.bars(means, "weight", "Weights of the mixture"), WEIGHTS)], half=True)]


def episodes(run: Finished) -> list[Section]:
    """Example tasks, drawn, with the graph where there is one."""
    path = run.folder / "examples.json"
    if not path.exists():
        return []
    try:
        figures = [figure for task in read_json(path)["examples"] for figure in example(task)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged, a task in it lacks {error}") from error
    return [Section("Episodes", figures=figures)] if figures else []


def example(task: dict[str, Any]) -> Iterator[Figure]:
    """One task."""
    rows = []
    for row in task["rows"]:
        asked = [(q["png"], q["predicted"], q["predicted"] != row["class"]) for q in row["queries"]]
        labelled = [(uri, "", False) for uri in row["support"]]
        rows.append((row["class"], labelled, asked))
    title = f"Task {task['episode'] + 1}"
    sizes = ", ".join(str(row["shots"]) for row in task["rows"])
    yield Figure(plots.thumbnails(rows, title), f"{title}: {percent(task['accuracy'])} right, {sizes} labelled images per class. {EXAMPLE}")
    if "graph" in task["insides"]:
        weights = task["insides"]["graph"]
        edges = [(a, b, w) for a, row in enumerate(weights) for b, w in enumerate(row) if a < b and w > 0]
        edges = sorted(edges, key=lambda edge: edge[2])[-EDGES:]
        top = max((w for *_, w in edges), default=1.0)
        picture = plots.graph([(a, b, w / top) for a, b, w in edges], task["nodes"], task["support"], f"{title}, graph")
        yield Figure(picture, GRAPH)
