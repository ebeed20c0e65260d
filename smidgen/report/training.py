"""The page of `smidgen qat`: perplexity against steps, in and out of domain, and what became of the ranges."""

import math
from typing import Any

from smidgen import plots
from smidgen.report.finished import Finished
from smidgen.report.page import Cell, Figure, Section, Table
from smidgen.report.run import facts
from smidgen.report.words import finite, ratio

SHOWN = {"perplexity", "perplexity_before", "perplexity_float", "model"}
FIRST = 1  # where step 0 is drawn: the axis of steps is logarithmic
FOLLOWED = (
    "Perplexity of the simulated model at every evaluation; the first point is before training. Text like the training text may go on "
    "falling while other text turns up: that is what training on little data costs."
)
CLIPPED = "Inputs of linear layers whose ranges changed most, relative to the range before; clipped: the share of values beyond the ends."
MOST = 12  # ranges listed


def training(run: Finished) -> list[Section]:
    """Headline, curves and ranges."""
    before, start, after = (run.per_text(name) for name in ("perplexity_float", "perplexity_before", "perplexity"))
    rows = []
    for text, value in after.items():
        figures = [Cell.of("perplexity", v) for v in (before.get(text), start.get(text), value)]
        rows.append([Cell(text), *figures, Cell(ratio(before.get(text), value), numeric=True)])
    table = Table(["perplexity", "float", "quantized, untrained", "trained", "trained ÷ float"], rows)
    return [Section("Before and after", table=table, facts=facts(run, SHOWN)), *curves(run), *ranges(run)]


def curves(run: Finished) -> list[Section]:
    """A figure per text: they differ too much in level to share an axis."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in run.steps:
        for text, value in (row.get("perplexity") or {}).items():
            if math.isfinite(finite(value)):
                series.setdefault(text, []).append((max(FIRST, row["step"]), finite(value)))
    figures = [Figure(plots.by_step({text: points}, "perplexity", f"Perplexity on {text}"), FOLLOWED) for text, points in series.items()]
    return [Section("Perplexity against steps", figures=figures)] if figures else []


def ranges(run: Finished) -> list[Section]:
    """Ranges of activations before and after."""
    rows = [row for row in run.steps if "activation" in row]
    worst = sorted(rows, key=change, reverse=True)[:MOST]
    cells = [
        [Cell(row["activation"]), *(Cell.of(name, row[when][name]) for when in ("before", "after") for name in ("low", "high", "clipped"))]
        for row in worst
    ]
    head = ["activation", "low before", "high before", "clipped before", "low after", "high after", "clipped after"]
    return [Section("Ranges of activations", note=CLIPPED, table=Table(head, cells))] if cells else []


def change(row: dict[str, Any]) -> float:
    """How far the ends moved, relative to the range before."""
    before, after = row["before"], row["after"]
    return (abs(before["low"] - after["low"]) + abs(before["high"] - after["high"])) / max(before["high"] - before["low"], 1e-12)
