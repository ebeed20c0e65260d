"""The page of `smidgen lab ranges`."""

import math
from typing import Any

from smidgen import plots
from smidgen.report.finished import Finished
from smidgen.report.page import Cell, Figure, Section, Table
from smidgen.report.run import facts
from smidgen.report.words import DASH, finite, number

VERDICTS = (
    "Mean of the last tenth of the steps, as a multiple of the best loss that a grid of ends reaches. Converges: never above 1.3 times it "
    "in the last tenth. Oscillates: rises past 1.3 again there, or to more than twice what it had come down to. Diverges: ends above "
    "where it started. Slow: still falling by 2 % from tenth to tenth. Sticks: rests above 1.3."
)


def learned_ranges(run: Finished) -> list[Section]:
    """A run of `smidgen lab ranges`."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in run.cases():
        settings.setdefault(f"{row['data']}, {row['bits']} bits, rate {row['rate']:g}, start {row['start']}", []).append(row)
    forms = list(dict.fromkeys(row["form"] for rows in settings.values() for row in rows))
    named = {name: rows for name, rows in settings.items() if rows[0].get("case")} or settings
    figures = [Figure(*curves(name, rows)) for name, rows in named.items()]
    return [
        Section(
            "How every case ended", note=VERDICTS, table=Table(["", *forms], [verdicts(n, rows, forms) for n, rows in settings.items()])
        ),
        Section("Loss over reference, step by step", figures=figures),
        Section("Figures", facts=facts(run, set())),
    ]


def verdicts(name: str, rows: list[dict[str, Any]], forms: list[str]) -> list[Cell]:
    """A setting's row of the table: verdict and mean ratio of the tail, form by form."""
    by_form = {row["form"]: row for row in rows}
    found = [by_form.get(form) for form in forms]
    cells = [Cell(f"{r['verdict']}\n{number(r['ratio_tail'])}", best=r["verdict"] == "converges") if r else Cell(DASH) for r in found]
    return [Cell(name), *cells]


def curves(name: str, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """The picture of a setting and what is said under it."""
    series = {row["form"]: [(step, value) for step, value in row["curve"] if math.isfinite(finite(value))] for row in rows}
    case = f"{rows[0]['case']}: " if rows[0].get("case") else ""
    ends = ", ".join(f"{row['form']} [{number(row['low'])}, {number(row['high'])}]" for row in rows)
    return plots.by_step({form: points for form, points in series.items() if points}, "loss over reference", case + name), (
        f"{case}{name}. Ends at last: {ends}."
    )
