"""Run folders as their files say, whatever becomes of the code that made them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import UserError
from smidgen.report.words import is_number, show


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
