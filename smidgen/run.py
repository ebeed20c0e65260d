"""Everything a command made, in one folder; nothing else writes results.

RUN/config.yaml        the resolved configuration; `smidgen quantize --config RUN/config.yaml` repeats the run
RUN/environment.json   versions, machine, seed
RUN/steps.jsonl        one row per step
RUN/metrics.json       flat figures; exists only when the run is finished
RUN/log.txt            messages, with times
RUN/artifact/          what a runtime loads
RUN/report.html        written by `smidgen report`
"""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smidgen.errors import UserError

T = TypeVar("T")
PACKAGES = ("smidgen", "torch", "transformers", "compressed-tensors", "safetensors", "numpy")
PARTIAL = ".partial"  # suffix of what is being written


class Run:
    """A folder for one run of one job, and the voice of that run on standard error.

    Use as a context manager: whatever is unfinished when it closes is removed, and of a job that was refused before it had made
    anything the folder, too.
    """

    def __init__(self, job: str, config: Any, folder: Path | None = None, label: str = "") -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        names = job.split()  # "lab ranges" is a command of a command
        self.folder = folder or _unused(Path("runs", *names) / "-".join(filter(None, (stamp, label))))
        self.console = Console(stderr=True, highlight=False)
        self.started = time.monotonic()
        if (self.folder / "metrics.json").exists():
            raise UserError(f"{self.folder} already holds a finished run; choose another --output or remove it")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "config.yaml").exists():
            raise UserError(f"{self.folder} holds other files; choose an empty or new --output")
        self.new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "steps.jsonl").write_text("")
        (self.folder / "log.txt").write_text("")
        nested = _plain(config)
        for name in reversed(names):
            nested = {name: nested}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(nested, sort_keys=False))
        self.save("environment.json", {"job": job} | _environment())

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for path in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if isinstance(error, UserError) and self.new and not self._made():
            shutil.rmtree(self.folder)
        elif error is not None:
            self._write(f"stopped: {error or kind.__name__ if kind else ''}")

    def _made(self) -> bool:
        """Whether there is more in the folder than what every run begins with."""
        begun = {"config.yaml", "environment.json", "steps.jsonl", "log.txt"}
        return (self.folder / "steps.jsonl").stat().st_size > 0 or any(f.name not in begun for f in self.folder.iterdir())

    def say(self, message: str) -> None:
        """A message for the user, kept in log.txt."""
        self.console.print(message, soft_wrap=True, markup=False)
        self._write(message)

    def _write(self, message: str) -> None:
        with (self.folder / "log.txt").open("a") as log:
            log.write(f"{time.monotonic() - self.started:9.1f} {message}\n")

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """The items, with a progress bar; without a terminal, a line per tenth."""
        if self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(label, total=total)
                for item in items:
                    yield item
                    bar.advance(task)
            return
        for done, item in enumerate(items, start=1):
            yield item
            if done * 10 // total > (done - 1) * 10 // total:
                self.console.print(f"{label}: {done} of {total}", highlight=False)

    def log(self, **row: Any) -> None:
        """Adds a row to steps.jsonl."""
        with (self.folder / "steps.jsonl").open("a") as rows:
            rows.write(json.dumps(row) + "\n")

    def save(self, name: str, value: Any) -> None:
        """Writes a JSON file."""
        partial = self.folder / (name + PARTIAL)
        partial.write_text(json.dumps(value, indent=1) + "\n")
        partial.rename(self.folder / name)

    def partial(self, name: str) -> Path:
        """An empty folder to fill; `keep` gives it its name once it is complete."""
        folder = self.folder / (name + PARTIAL)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def keep(self, partial: Path) -> Path:
        """Names a completed folder."""
        final = partial.with_name(partial.name.removesuffix(PARTIAL))
        shutil.rmtree(final, ignore_errors=True)
        return partial.rename(final)

    def finish(self, **metrics: Any) -> dict[str, Any]:
        """Writes metrics.json, the sign that the run is complete."""
        self.save("metrics.json", metrics)
        return metrics


def _unused(folder: Path) -> Path:
    return next(f for f in (folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000))) if not f.exists())


def _plain(config: Any) -> dict[str, Any]:
    """A dataclass as YAML can hold it, without `output`, which a repetition must not share."""
    return {k: v for k, v in json.loads(json.dumps(asdict(config), default=str)).items() if k != "output"}


def _environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "command": ["smidgen", *sys.argv[1:]],
        "packages": versions,
    }
