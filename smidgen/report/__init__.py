"""A finished run, or several side by side, as one page: `smidgen report`.

Reads files of run folders and imports no job, so a run stays readable whatever becomes of the code that made it.
The page needs nothing but itself: pictures are inline SVG (`plots.py`); no script, no font, no link to fetch.

A page is a list of sections, which `templates/report.html` draws. `JOBS` says which sections the runs of a job have;
a job that is not in it gets a table of its metrics.
"""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from smidgen.errors import UserError
from smidgen.report.comparison import comparison
from smidgen.report.fewshot import fewshot_evaluation, fewshot_training
from smidgen.report.finished import Finished
from smidgen.report.learned_ranges import learned_ranges
from smidgen.report.page import Page, render
from smidgen.report.quantization import evaluation, quantization, summary
from smidgen.report.refine import refinement
from smidgen.report.run import generic, provenance
from smidgen.report.search import search_distillation, search_evaluation, search_training
from smidgen.report.symbolic import symbolic_evaluation, symbolic_export, symbolic_training
from smidgen.report.training import training
from smidgen.run import PARTIAL

JOBS = {
    "quantize": quantization,
    "evaluate": evaluation,
    "qat": training,
    "lab ranges": learned_ranges,
    "fewshot train": fewshot_training,
    "fewshot evaluate": fewshot_evaluation,
    "symbolic train": symbolic_training,
    "symbolic evaluate": symbolic_evaluation,
    "symbolic export": symbolic_export,
    "refine": refinement,
    "search train": search_training,
    "search distill": search_distillation,
    "search evaluate": search_evaluation,
}


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen report`."""

    run: Annotated[tuple[Path, ...], Parameter(negative=())]
    "Folders of finished runs: one for its own page, several to compare them."
    _: KW_ONLY
    output: Path | None = None
    "The page, NAME.html; by default report.html in the run's folder, or beside the last of several."


def command(config: Config) -> dict[str, Any]:
    """Write a page that shows one run, or compares several."""
    page = write_report(list(config.run), config.output)
    return {"report": str(page), "runs": [str(folder) for folder in config.run]}


def write_report(folders: list[Path], output: Path | None = None) -> Path:
    """Writes the page of one run, or of several side by side; returns its path."""
    if output is not None and output.suffix != ".html":
        raise UserError(f"--output {output}: the name of a page ends in .html")
    runs = [Finished.read(folder) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError("the same run is given twice")
    page = single(runs[0]) if len(runs) == 1 else comparison(runs)
    path = output or (folders[0] if len(runs) == 1 else parent(folders[-1])) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_text(render(page), encoding="utf-8")
        return partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def single(run: Finished) -> Page:
    """The page of one run."""
    title = run.metric("model") if "model" in run.metrics else run.name
    sections = JOBS.get(run.job, generic)(run)
    return Page(f"smidgen {run.job}", title, summary(run) if run.job == "quantize" else "", sections + provenance(run))


def parent(folder: Path) -> Path:
    """The folder above, also of '.' and '..'."""
    return folder.resolve().parent if folder.name in ("", "..") else folder.parent
