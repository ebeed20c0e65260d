"""A finished run, or several side by side, as one page: `smidgen report`.

Reads files of run folders and imports no job, so a run stays readable whatever becomes of the code that made it.
The page needs nothing but itself: pictures are inline SVG (`plots.py`); no script, no font, no link to fetch.

A page is a list of sections, which `templates/report.html` draws. `JOBS` says which sections the runs of a job have;
a job that is not in it gets a table of its metrics.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from smidgen import plots
from smidgen.errors import UserError
from smidgen.run import PARTIAL

DASH = "–"
METHODS = {"rtn": "RTN", "gptq": "GPTQ", "boa": "BoA"}
WEAKEST = 5  # matrices listed as the weakest

# Metrics in words, in the order of a comparison; others follow under their own names.
LABELS = {
    "model": "model",
    "method": "method",
    "bits": "bits",
    "group": "group",
    "symmetric": "symmetric",
    "perplexity": "perplexity",
    "perplexity_float": "perplexity before",
    "bits_per_weight": "bits per quantized weight",
    "size_bytes": "size",
    "size_bytes_float": "size before",
    "quantize_seconds": "quantize time",
    "peak_memory_bytes": "peak memory",
    "high_precision": "left in high precision",
    "precision": "computed in",
}
# Which value of a metric is the best: the first pattern that matches. None or no match: no value is.
BETTER: tuple[tuple[str, Callable[[list[float]], float] | None], ...] = (
    ("*_float", None),
    *((name, min) for name in ("perplexity", "bits_per_weight", "*_bytes", "*_seconds", "*_ms*", "*loss", "*error")),
    *((name, max) for name in ("*accuracy*", "*sqnr*", "mrr*", "hit*", "exact_match*")),
)
SQNR = (
    "Signal-to-quantization-noise ratio: the energy of a layer's output over that of its error, as the method's own loss "
    "measures them on the calibration text. Gaps: layers without any error, or without any output."
)
RELATIVE = "Size of a matrix's error relative to the matrix, ‖Ŵ − W‖ / ‖W‖. Without calibration text nothing is known of the outputs."
MEAN = "Mean over the layers of each block, measured by each method's own loss on its calibration text."
MIXED = " Query, key and value layers are left out: methods weigh them by different losses."
VERDICTS = (
    "Mean of the last tenth of the steps, as a multiple of the best loss that a grid of ends reaches. Converges: never above 1.3 times it "
    "in the last tenth. Oscillates: rises past 1.3 again there, or to more than twice what it had come down to. Diverges: ends above "
    "where it started. Slow: still falling by 2 % from tenth to tenth. Sticks: rests above 1.3."
)
UNCALIBRATED = " Runs without calibration text, such as RTN, have no SQNR and are not drawn."


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


def parent(folder: Path) -> Path:
    """The folder above, also of '.' and '..'."""
    return folder.resolve().parent if folder.name in ("", "..") else folder.parent


# --- run folders -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """What the files of a finished run say."""

    folder: Path
    config: str
    "config.yaml as it stands."
    environment: dict[str, Any]
    metrics: dict[str, Any]
    steps: list[dict[str, Any]]
    samples: dict[str, Any]
    "Prompt -> text, before and after; empty if the run kept none."

    @staticmethod
    def read(folder: Path) -> "Finished":
        """Reads a run folder; an error names the damaged file and line."""
        check_finished(folder)
        steps, samples = folder / "steps.jsonl", folder / "samples.json"
        return Finished(
            folder,
            read_text(folder / "config.yaml"),
            read_json(folder / "environment.json"),
            read_json(folder / "metrics.json"),
            read_rows(steps) if steps.exists() else [],
            read_json(samples) if samples.exists() else {},
        )

    @property
    def job(self) -> str:
        """The command that made the run."""
        return str(self.environment.get("job", "run"))

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    def metric(self, name: str) -> str:
        """A metric in words."""
        return show(name, self.metrics.get(name))

    def per_text(self, name: str) -> dict[str, int | float]:
        """A metric that has a number for each text; empty if the run lacks it."""
        values = self.metrics.get(name, {})
        if not isinstance(values, dict) or not all(is_number(v) for v in values.values()):
            raise UserError(f"{self.folder / 'metrics.json'}: damaged, '{name}' does not hold a number for each text")
        return values

    def layers(self) -> list[dict[str, Any]]:
        """The rows of steps.jsonl, checked to be about layers."""
        for line, row in enumerate(self.steps, start=1):
            if type(row.get("block")) is not int or not isinstance(row.get("layer"), str):
                raise UserError(f"{self.folder / 'steps.jsonl'}, line {line}: damaged, it lacks a block or layer")
        return self.steps

    def cases(self) -> list[dict[str, Any]]:
        """The rows of steps.jsonl, checked to be about cases of `smidgen lab ranges`."""
        for line, row in enumerate(self.steps, start=1):
            lacking = {"data", "bits", "rate", "start", "form", "verdict", "ratio_tail", "low", "high", "curve"} - row.keys()
            if lacking:
                raise UserError(f"{self.folder / 'steps.jsonl'}, line {line}: damaged, it lacks {', '.join(sorted(lacking))}")
        return self.steps


def check_finished(folder: Path) -> None:
    """Refuses what is not the folder of a finished run."""
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder of a run" if folder.exists() else f"no such run: {folder}")
    if not (folder / "metrics.json").exists():
        if (folder / "config.yaml").exists():
            raise UserError(f"{folder}: the run did not finish (there is no metrics.json); its log.txt may say why")
        raise UserError(f"{folder} is not a finished run (there is no metrics.json)")
    for name in ("config.yaml", "environment.json"):
        if not (folder / name).exists():
            raise UserError(f"{folder} is not a run of smidgen (there is no {name})")


def read_text(path: Path) -> str:
    """A file's text."""
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: damaged, not UTF-8 text") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    return parse(read_text(path), path, 1)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A file that holds a JSON object per line."""
    text = read_text(path).removesuffix("\n")
    return [parse(line, path, number) for number, line in enumerate(text.split("\n"), start=1)] if text else []


def parse(text: str, path: Path, first: int) -> dict[str, Any]:
    """The JSON object in a text that begins at line `first` of a file."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {first + error.lineno - 1}: damaged, not JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {first}: damaged, not a JSON object")
    return value


# --- values in words -------------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value: Any) -> float:
    """A value read from JSON as a number to draw; NaN, which is not drawn, if it is none."""
    return float(value) if is_number(value) and math.isfinite(value) else math.nan


def number(value: Any) -> str:
    """A value for people, numbers to four digits: 140.2, 0.03125, 32,768, 1.2e5, and a dash for None."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(number, value)) or DASH
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"


def show(name: str, value: Any) -> str:
    """A metric's value; bytes in MB of 10^6."""
    if is_number(value) and "_bytes" in name:
        return number(value / 1e6)
    if name == "method":
        return METHODS.get(str(value), number(value))
    return str(value) if name == "seed" else number(value)


def quantity(name: str, value: Any) -> str:
    """A metric's value with its unit."""
    return f"{show(name, value)} {unit(name) if is_number(value) else ''}".rstrip()


def unit(name: str) -> str:
    """The unit a metric is shown in."""
    return "MB" if "_bytes" in name else "s" if name.endswith("_seconds") else ""


def label(path: tuple[str, ...]) -> str:
    """A metric in words: ("perplexity", "wiki.txt") is "perplexity, wiki.txt"."""
    name = LABELS.get(path[0]) or path[0].removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
    return ", ".join((name, *path[1:]))


def flatten(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The values of nested dicts by path: {"a": {"b": 1}, "c": 2} is {("a", "b"): 1, ("c",): 2}."""
    if not isinstance(value, dict):
        return {path: value}
    return {p: v for key, item in value.items() for p, v in flatten(item, (*path, str(key))).items()}


def ratio(before: Any, after: Any) -> str:
    """After over before."""
    quotient = finite(after) / finite(before) if before else math.nan
    return DASH if math.isnan(quotient) else f"{number(quotient)}×"


# --- pages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    numeric: bool = False
    best: bool = False

    @staticmethod
    def of(name: str, value: Any) -> "Cell":
        """The value of a metric, in a column of such values."""
        return Cell(show(name, value), numeric=True)


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows."""

    head: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Figure:
    """A picture and what is said under it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Sample:
    """What a model writes after a prompt; `shared` is how both texts begin."""

    prompt: str
    shared: str
    before: str
    after: str


@dataclass(frozen=True)
class Section:
    """A part of a page; what is empty is not drawn."""

    title: str
    _: KW_ONLY
    note: str = ""
    table: Table | None = None
    facts: dict[str, str] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)
    "Heading -> text to copy."
    half: bool = False
    "May stand beside another half."


@dataclass(frozen=True)
class Page:
    """All that the template draws."""

    kind: str
    title: str
    subtitle: str
    sections: list[Section]


def render(page: Page) -> str:
    """The page as HTML; whatever comes from a file is escaped."""
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(page=page) + "\n"


# --- one run ---------------------------------------------------------------------------------------------------------


def single(run: Finished) -> Page:
    """The page of one run."""
    title = run.metric("model") if "model" in run.metrics else run.name
    sections = JOBS.get(run.job, generic)(run)
    return Page(f"smidgen {run.job}", title, summary(run) if run.job == "quantize" else "", sections + provenance(run))


def summary(run: Finished) -> str:
    """Method, bits and group of a quantized model."""
    group = "a scale per row" if run.metrics.get("group") is None else f"group {run.metric('group')}"
    zeros = "symmetric" if run.metrics.get("symmetric") else "with zero points"
    return ", ".join((run.metric("method"), f"{run.metric('bits')} bits", group, zeros))


def generic(run: Finished) -> list[Section]:
    """A run of any job: its metrics as they are."""
    rows = [[Cell(name), Cell(value)] for name, value in facts(run, set()).items()]
    return [Section("Metrics", table=Table(["metric", "value"], rows))]


def evaluation(run: Finished) -> list[Section]:
    """A run of `smidgen evaluate`."""
    perplexity, tokens = run.per_text("perplexity"), run.per_text("tokens")
    rows = [[Cell(text), Cell.of("perplexity", value), Cell.of("tokens", tokens.get(text))] for text, value in perplexity.items()]
    table = Table(["text", "perplexity", "tokens"], rows)
    return [Section("Perplexity", table=table, facts=facts(run, {"model", "perplexity", "tokens"}))]


def quantization(run: Finished) -> list[Section]:
    """A run of `smidgen quantize`."""
    shown = {"model", "method", "bits", "group", "symmetric", "perplexity", "perplexity_float", "size_bytes", "size_bytes_float", "tokens"}
    tokens = {"calibration tokens": run.metric("tokens")}
    headline = Section("Before and after", table=before_and_after(run), facts=tokens | facts(run, shown))
    return [headline, *layer_sections(run), *sample_sections(run)]


def before_and_after(run: Finished) -> Table:
    """The headline: perplexities and size."""
    before, after = run.per_text("perplexity_float"), run.per_text("perplexity")
    pairs = [(f"perplexity, {text}", "perplexity", before.get(text), after.get(text)) for text in before | after]
    pairs.append(("size (MB)", "size_bytes", run.metrics.get("size_bytes_float"), run.metrics.get("size_bytes")))
    rows = [[Cell(text), Cell.of(name, a), Cell.of(name, b), Cell(ratio(a, b), numeric=True)] for text, name, a, b in pairs]
    return Table(["", "before", "after", "after ÷ before"], rows)


def facts(run: Finished, shown: set[str]) -> dict[str, str]:
    """The metrics not shown elsewhere, with their units."""
    return {label(path): quantity(path[0], value) for path, value in flatten(run.metrics).items() if path[0] not in shown}


def provenance(run: Finished) -> list[Section]:
    """How the run was made, and how to make it again."""
    commands = {"This run again": again(run)}
    if isinstance(run.environment.get("command"), list):
        commands["As it was started"] = shlex.join(map(str, run.environment["command"]))
    rows = {path[-1]: number(value) for path, value in flatten(run.environment).items() if path[0] not in ("job", "command")}
    return [
        Section("Repeat", code=commands),
        Section("Configuration", code={"config.yaml": run.config.rstrip()}, half=True),
        Section("Environment", facts={"folder": run.name} | rows, half=True),
    ]


def again(run: Finished) -> str:
    """The command that repeats a run; into a new folder where the run's own was chosen by name."""
    named = re.search(r"^output: (?!null$)", run.config, re.MULTILINE)
    output = ["--output", f"{run.folder}-again"] if named else []
    return shlex.join(["smidgen", *run.job.split(), "--config", str(run.folder / "config.yaml"), *output])


def layer_sections(run: Finished) -> list[Section]:
    """Error and time of the layers."""
    rows = run.layers()
    if not rows:
        return []
    key = "sqnr_db" if has_sqnr(rows) else "relative_error"
    names = short_names([row["layer"] for row in rows])
    errors: dict[str, list[tuple[float, float]]] = {short: [] for short in names.values()}
    seconds = dict.fromkeys(names.values(), 0.0)
    for row in rows:
        errors[names[row["layer"]]].append((float(row["block"]), finite(row.get(key))))
        seconds[names[row["layer"]]] += finite(row.get("seconds", 0.0))
    axis, caption = ("SQNR (dB), higher is better", SQNR) if key == "sqnr_db" else ("relative error, lower is better", RELATIVE)
    curves = plots.by_block(errors, axis, "Error of every layer, block by block")
    spent = plots.bars(seconds, "seconds, summed over the blocks", "Time each kind of layer took")
    return [
        Section("Error of every layer", figures=[Figure(curves, caption)]),
        Section("Weakest layers", table=weakest(rows, key), half=True),
        Section("Time by layer", figures=[Figure(spent, "Choosing the codes, without the forward passes.")], half=True),
    ]


def has_sqnr(rows: list[dict[str, Any]]) -> bool:
    """Whether layers have an SQNR; without calibration text they do not."""
    return any(is_number(row.get("sqnr_db")) for row in rows)


def short_names(layers: list[str]) -> dict[str, str]:
    """Layer -> last part of its name, or all of it where two layers of a block share that part."""
    names = {layer: layer.rpartition(".")[2] for layer in layers}
    parts = list(names.values())
    return {layer: layer if parts.count(part) > 1 else part for layer, part in names.items()}


def weakest(rows: list[dict[str, Any]], key: str) -> Table:
    """The matrices with the largest errors."""
    known = [row for row in rows if math.isfinite(finite(row.get(key)))]
    worst = sorted(known, key=lambda row: row[key], reverse=key != "sqnr_db")[:WEAKEST]
    head = ["layer", "block", "SQNR (dB)" if key == "sqnr_db" else "relative error"]
    return Table(head, [[Cell(row["layer"]), Cell.of("block", row["block"]), Cell.of(key, row[key])] for row in worst])


def sample_sections(run: Finished) -> list[Section]:
    """What the model writes before and after."""
    before, after = run.samples.get("before"), run.samples.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    samples = [sample(prompt, str(text), str(after[prompt])) for prompt, text in before.items() if prompt in after]
    return [Section("What the model writes", note="Greedy decoding. Grey: the same words before and after.", samples=samples)]


def sample(prompt: str, before: str, after: str) -> Sample:
    """Two continuations, parted after the last word that both begin with."""
    before, after = before.strip(), after.strip()
    shared = os.path.commonprefix([before, after])
    if before != after:
        shared = shared[: shared.rfind(" ") + 1]
    return Sample(prompt, shared, before[len(shared) :], after[len(shared) :])


# --- learned ranges --------------------------------------------------------------------------------------------------


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


JOBS = {"quantize": quantization, "evaluate": evaluation, "lab ranges": learned_ranges}


# --- several runs ----------------------------------------------------------------------------------------------------


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
            shared[label(path)] = quantity(path[0], values[0])
            continue
        title = label(path) + (f" ({unit(path[0])})" if unit(path[0]) else "")
        rows.append([Cell(title), *(Cell(show(path[0], v), best=b) for v, b in zip(values, best(path[0], values), strict=True))])
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
    calibrated = {name: run for name, run in runs.items() if has_sqnr(run.layers())}
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
