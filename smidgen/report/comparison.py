"""The page of several runs, a column each."""

import math
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from smidgen import plots
from smidgen.report.finished import Finished
from smidgen.report.page import Cell, Figure, Page, Section, Table
from smidgen.report.quantization import has_sqnr
from smidgen.report.run import again
from smidgen.report.words import LABELS, finite, flatten, is_number, label, metric_of, number, quantity, show, unit

# Which value of a metric is the best: the first pattern that matches. None or no match: no value is.
BETTER: tuple[tuple[str, Callable[[list[float]], float] | None], ...] = (
    ("*_float", None),
    *((name, min) for name in ("perplexity", "bits_per_weight", "*_bytes", "*_seconds", "*_ms*", "*loss", "*error")),
    *((name, max) for name in ("*accuracy*", "*sqnr*", "mrr*", "hit*", "exact_match*", "cosine*", "agreement*")),
)
MEAN = "Mean over the layers of each block, measured by each method's own loss on its calibration text."
MIXED = " Query, key and value layers are left out: methods weigh them by different losses."
UNCALIBRATED = " Runs without calibration text, such as RTN, have no SQNR and are not drawn."


def comparison(runs: list[Finished]) -> Page:
    """The page of several runs, a column each."""
    named = dict(zip(run_names(runs), runs, strict=True))
    models = dict.fromkeys(run.metric("model") for run in runs if "model" in run.metrics)
    quantized = {name: run for name, run in named.items() if run.job == "quantize"}
    sections = [
        metrics_section(named),
        *perplexity_sections(list(quantized.values())),
        *sqnr_sections(quantized),
        *difference_sections(named),
        Section("Repeat", code={name: again(run) for name, run in named.items()}),
    ]
    return Page("smidgen report", f"{len(runs)} runs compared", ", ".join(models), sections)


def run_names(runs: list[Finished]) -> list[str]:
    """Names that tell runs apart: those of their folders, without the time where that will do."""
    short = [re.sub(r"^\d{8}-\d{6}-", "", run.name) for run in runs]
    choices = short, [run.name for run in runs], [str(run.folder.resolve()) for run in runs]
    return next(names for names in choices if len(set(names)) == len(runs))


def metrics_section(runs: dict[str, Finished]) -> Section:
    """A row per metric, the best value marked; settings that all runs share are listed once, below."""
    columns = [flatten(run.metrics) for run in runs.values()]
    order = {name: i for i, name in enumerate(LABELS)}
    rows, shared = [], {}
    for path in sorted(dict.fromkeys(p for column in columns for p in column), key=lambda path: order.get(path[0], len(order))):
        values = [column.get(path) for column in columns]
        if judge(path[0]) is None and all(value == values[0] for value in values):
            shared[label(path)] = quantity(metric_of(path), values[0])
            continue
        measured = metric_of(path)
        title = label(path) + (f" ({unit(measured)})" if unit(measured) else "")
        rows.append([Cell(title), *(Cell(show(measured, v), best=b) for v, b in zip(values, best(path[0], values), strict=True))])
    return Section("Metrics", note="Green and bold: the best of the row.", table=Table(["", *runs], rows), facts=shared)


def judge(metric: str) -> Callable[[list[float]], float] | None:
    """What picks the best of a metric's values: min, max, or None where no value is better than another."""
    return next((choose for pattern, choose in BETTER if fnmatchcase(metric, pattern)), None)


def best(metric: str, values: list[Any]) -> list[bool]:
    """Which values are the best of a metric; none where all are equal, or no value is better than another."""
    choose = judge(metric)
    known = sorted({float(v) for v in values if is_number(v) and not math.isnan(v)})
    if choose is None or len(known) < 2:
        return [False] * len(values)
    return [is_number(v) and v == choose(known) for v in values]


def perplexity_sections(runs: list[Finished]) -> list[Section]:
    """Perplexity against bits per weight, a chart for every text that two runs share."""
    texts = dict.fromkeys(text for run in runs for text in run.per_text("perplexity"))
    figures = [figure for text in texts for figure in perplexity_figures(text, runs)]
    return [Section("Perplexity against bits per weight", figures=figures)] if figures else []


def perplexity_figures(text: str, runs: list[Finished]) -> Iterator[Figure]:
    """The chart of one text, if two runs have a point on it."""
    series: dict[str, list[tuple[float, float]]] = {}
    levels: dict[str, float] = {}
    lost = 0
    several = len({run.metric("model") for run in runs}) > 1
    for run in (run for run in runs if text in run.per_text("perplexity")):
        prefix = f"{run.metric('model')}, " if several else ""
        point = finite(run.metrics.get("bits_per_weight")), finite(run.per_text("perplexity")[text])
        if not all(map(math.isfinite, point)):
            lost += 1
            continue
        series.setdefault(prefix + run.metric("method"), []).append(point)
        level = finite(run.per_text("perplexity_float").get(text))
        if math.isfinite(level):
            levels[f"{prefix}before"] = level
    if sum(map(len, series.values())) > 1:
        caption = f"Perplexity on {text}." + (f" Not drawn, for lack of a finite figure: {lost} of the runs." if lost else "")
        yield Figure(plots.perplexity_by_bits(series, levels, f"Perplexity on {text}"), caption)


def sqnr_sections(runs: dict[str, Finished]) -> list[Section]:
    """Mean SQNR of every block, a line per run; over the layers whose loss is the same for all methods."""
    calibrated = {name: run for name, run in runs.items() if "activations" not in run.metrics and has_sqnr(run.layers())}
    mixed = len({run.metric("method") for run in calibrated.values()}) > 1
    series = {name: block_means([row for row in run.layers() if not (mixed and row.get("role"))]) for name, run in calibrated.items()}
    series = {name: points for name, points in series.items() if points}
    if len(series) < 2:
        return []
    picture = plots.by_block(series, "mean SQNR (dB), higher is better", "Mean SQNR of every block")
    caption = MEAN + (MIXED if mixed else "") + (UNCALIBRATED if len(calibrated) < len(runs) else "")
    return [Section("Error of every block", figures=[Figure(picture, caption)])]


def block_means(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(block, mean SQNR of its layers)."""
    blocks: dict[int, list[float]] = {}
    for row in rows:
        if math.isfinite(finite(row.get("sqnr_db"))):
            blocks.setdefault(row["block"], []).append(row["sqnr_db"])
    return [(float(block), sum(values) / len(values)) for block, values in sorted(blocks.items())]


def difference_sections(runs: dict[str, Finished]) -> list[Section]:
    """Options and environment in which the runs differ."""
    configs = [config_lines(run.config) for run in runs.values()]
    own = ["\n".join(line for line in lines if not all(line in other for other in configs)) for lines in configs]
    rows = [[Cell("config.yaml"), *map(Cell, own)]] if any(own) else []
    columns = [flatten({k: v for k, v in run.environment.items() if k != "command"}) for run in runs.values()]
    for path in dict.fromkeys(p for column in columns for p in column):
        values = [number(column.get(path)) for column in columns]
        if len(set(values)) > 1:
            rows.append([Cell(path[-1]), *map(Cell, values)])
    return [Section("Where the runs differ", table=Table(["", *runs], rows))] if rows else []


def config_lines(config: str) -> list[str]:
    """Lines of config.yaml, those of a group after its name: "boa: damp: 0.01"; without the run's folder."""
    lines, group = [], ""
    for line in config.splitlines():
        group = group if line[:1] in (" ", "-") else line
        lines.append(line if line == group else f"{group} {line.strip()}")
    return [line for line in lines if not line.startswith("output: ")]
