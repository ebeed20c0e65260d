"""The pages of `smidgen search train`, `distill` and `evaluate`."""

import math
from typing import Any

from smidgen import plots
from smidgen.errors import UserError
from smidgen.report.finished import Finished
from smidgen.report.page import Cell, Figure, Section, Table
from smidgen.report.run import facts
from smidgen.report.words import DASH, finite, number, show

KINDS = ("contextual", "keyword", "typo", "all")
FIGURES = ("hit@1", "hit@3", "hit@5", "hit@10", "mrr@10", "ndcg@10")
STEPS = {  # of distillation, in words
    "teacher": "teacher",
    "narrow": "vectors narrowed",
    "smaller": "fewer layers, pieces and positions",
    "distilled": "distilled",
    "written": "written, weights rounded",
    "indexed": "index in 8 bits",
    "fused": "spelling and trigrams beside meaning",
}
COSTS = (
    "Queries held out from training; every row is the one above with one step more. Cosine: of the queries' vectors with the teacher's. "
    "Overlap: share of the teacher's ten best features that stay among the ten best."
)
CHOSEN = "Weight of the trained network against the one it started from, and how well the held-out queries then do; the best one is kept."
LOSS = "As logged; batches differ."
RANKED = "Share of queries with a right feature among the first k; MRR: mean of 1 / its rank, 0 beyond the tenth."
NONE = (
    "AUROC: chance that an answerable query's best score beats that of one nothing fits. False show: share of these answered all the same."
)
TIME = "One thread, from text to ranked features, tokenizer included. Cold: opening the folder and the first answer."
MISSED = "The right feature not first, the worst ones first; and queries that nothing fits but that were shown an answer."
MOST = 40  # missed queries listed
TIMES = {"latency_ms_p50": "p50", "latency_ms_p95": "p95", "latency_ms_p99": "p99", "open_ms": "opening", "cold_ms": "cold"}
SHOWN = {*KINDS, *TIMES, "none", "size_bytes_by_file"}


def search_training(run: Finished) -> list[Section]:
    """Choice of the interpolation, loss."""
    chosen = [(float(weight), value) for weight, value in run.per_text("held_out_mrr").items()]
    headline = Section("Relevance model", facts=facts(run, {"held_out_mrr"}))
    figures = [Figure(plots.lines({"held out": chosen}, "weight", "MRR@10", "Interpolation"), CHOSEN)] if len(chosen) > 1 else []
    return [headline, *([Section("Between start and end", figures=figures)] if figures else []), *loss(run)]


def search_distillation(run: Finished) -> list[Section]:
    """What every step cost, and where the bytes are."""
    return [
        *costs(run),
        Section("Figures", facts=facts(run, {"costs", "calibration", "size_bytes_by_file"}) | threshold(run.metrics.get("calibration"))),
        *files(run),
        *loss(run),
    ]


def search_evaluation(run: Finished) -> list[Section]:
    """Figures per kind, nothing fits, time and size, what was missed."""
    rows = [[Cell(kind), *(Cell(share(run.metrics[kind].get(f)), numeric=True) for f in FIGURES)] for kind in KINDS if kind in run.metrics]
    none = run.metrics.get("none") or {}
    times = {words: f"{number(run.metrics.get(name))} ms" for name, words in TIMES.items()}
    return [
        Section("Ranking", note=RANKED, table=Table(["queries", *FIGURES], rows)),
        Section("Nothing fits", note=NONE, facts={name.replace("_", " "): share(value) for name, value in none.items()}, half=True),
        Section("Time", note=TIME, facts=times, half=True),
        *files(run),
        Section("Figures", facts=facts(run, SHOWN)),
        *missed(run),
    ]


def costs(run: Finished) -> list[Section]:
    """A row per step; columns are what the run measured."""
    rows = run.metrics.get("costs")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise UserError(f"{run.folder / 'metrics.json'}: damaged, 'costs' does not hold a row for each step")
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    cells = [[Cell(STEPS.get(str(row["step"])) or str(row["step"])), *(cell(name, row.get(name)) for name in columns)] for row in rows]
    head = ["step", *(name.replace("_bytes", " (MB)").replace("_", " ") for name in columns)]
    return [Section("What every step cost", note=COSTS, table=Table(head, cells))] if rows else []


def cell(name: str, value: Any) -> Cell:
    """Shares to three digits, everything else as anywhere."""
    return Cell(show(name, value) if "_bytes" in name or "_ms" in name else share(value), numeric=True)


def share(value: Any) -> str:
    """A share of 1 to three digits."""
    return DASH if math.isnan(finite(value)) else f"{finite(value):.3f}"


def threshold(calibration: Any) -> dict[str, str]:
    """What "nothing fits" costs, on the queries its threshold was fitted on."""
    if not isinstance(calibration, dict):
        return {"nothing fits": "no threshold: every query is shown an answer"}
    names = {"answer_rate": "answered, of answerable queries", "false_show": "answered, of those nothing fits", "auroc": "AUROC"}
    return {words: share(calibration.get(name)) for name, words in names.items()}


def files(run: Finished) -> list[Section]:
    """Bytes by file."""
    sizes = {name: size / 1e6 for name, size in run.per_text("size_bytes_by_file").items()}
    picture = [Figure(plots.bars(sizes, "MB", "Size of the files"), "All that a device needs.")] if sizes else []
    return [Section("Size", figures=picture, half=True)] if picture else []


def loss(run: Finished) -> list[Section]:
    """Loss against steps."""
    points = [(row["step"], finite(row["loss"])) for row in run.steps if "loss" in row and math.isfinite(finite(row["loss"]))]
    return [Section("Loss", figures=[Figure(plots.by_step({"loss": points}, "loss", "Training loss"), LOSS)])] if len(points) > 1 else []


def missed(run: Finished) -> list[Section]:
    """Queries not answered right at once."""
    rows = [row for row in run.steps if (row["rank"] or 0) > 1 or (row["rank"] is None and row["shown"])]
    rows.sort(key=lambda row: -(row["rank"] or math.inf))
    cells = [
        [
            Cell(row["query"]),
            Cell(row["kind"]),
            Cell(number(row["rank"]), numeric=True),
            Cell(row["title"]),
            Cell(", ".join(row["relevant"])),
        ]
        for row in rows[:MOST]
    ]
    note = MISSED + (f" {MOST} of {len(rows)}." if len(rows) > MOST else "")
    return [Section("Missed", note=note, table=Table(["query", "kind", "rank", "came first", "right"], cells))] if cells else []
