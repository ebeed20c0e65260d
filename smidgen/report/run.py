"""What the page of any run has: its metrics, and how it was made."""

import shlex

from smidgen.report.finished import Finished
from smidgen.report.page import Cell, Section, Table
from smidgen.report.words import flatten, label, metric_of, number, quantity


def generic(run: Finished) -> list[Section]:
    """A run of any job: its metrics as they are."""
    rows = [[Cell(name), Cell(value)] for name, value in facts(run, set()).items()]
    return [Section("Metrics", table=Table(["metric", "value"], rows))]


def facts(run: Finished, shown: set[str]) -> dict[str, str]:
    """The metrics not shown elsewhere, with their units."""
    return {label(path): quantity(metric_of(path), value) for path, value in flatten(run.metrics).items() if path[0] not in shown}


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
    """The command that repeats a run, in a new folder."""
    return shlex.join(["smidgen", *run.job.split(), "--config", str(run.folder / "config.yaml")])
