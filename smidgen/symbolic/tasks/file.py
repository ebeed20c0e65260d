"""A task of one's own: FILE.jsonl, a line per example.

    {"input": "3 apples at 40 cents", "target": "120"}        the answer is text, written symbol by symbol
    {"input": "turn the light on", "label": "on"}             the answer is one of the labels in the file

Text answers go with inputs read character by character, labels with inputs read word by word. A line may name its split: train, dev, id, or
ood for questions longer than those of training; where none does, a tenth of the inputs, chosen by their hash, is id and another dev.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from smidgen.errors import UserError
from smidgen.symbolic.tasks import Examples, Task
from smidgen.symbolic.vocabulary import Unit, Vocabulary

SPLITS = ("train", "dev", "id", "ood")
HELD_OUT = 10  # one input in so many is for dev, one for id


def task(path: Path) -> Task:
    """The task in a file."""
    rows = read(path)
    classifies = "label" in rows[0]
    parts = split(rows, path)

    def draw(name: str, n: int, rng: np.random.Generator) -> Examples:
        mine = parts[name]
        index = range(n) if n == len(mine) and name != "train" else rng.choice(len(mine), n, replace=False).tolist()
        picked = [mine[i] for i in index]
        return Examples([row["input"] for row in picked], [answer(row) for row in picked], [0] * n)

    unit: Unit = "words" if classifies else "characters"
    inputs = Vocabulary(symbols([row["input"] for row in rows], unit), unit)
    targets = [answer(row) for row in rows]
    answers = Vocabulary(symbols(targets, "labels"), "labels") if classifies else Vocabulary(symbols(targets, "characters"))
    return Task(
        name=path.name,
        tokens=inputs,
        answers=answers,
        length=1 + max(len(inputs.split(row["input"])) for row in rows),
        slots=1 if classifies else 1 + max(map(len, targets)),
        splits={name: len(part) for name, part in parts.items() if part},
        draw=draw,
    )


def answer(row: dict[str, Any]) -> str:
    """Text or label of a line."""
    return row["label"] if "label" in row else row["target"]


def symbols(texts: list[str], unit: Unit) -> tuple[str, ...]:
    """All that occur, sorted."""
    return tuple(sorted({symbol for text in texts for symbol in Vocabulary((), unit).split(text)}))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines, checked."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    rows = [checked(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f'{path}: empty; write a line {{"input": ..., "target": ...}} or {{"input": ..., "label": ...}} per example')
    for kind in ("label", "target"):
        if 0 < sum(kind in row for row in rows) < len(rows):
            raise UserError(f"{path}: some lines have a {kind} and some do not; give all of them a target, or all a label")
    return rows


def checked(line: str, where: str) -> dict[str, Any]:
    """One line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from error
    if not isinstance(row, dict) or "input" not in row or ("target" in row) == ("label" in row):
        raise UserError(f'{where}: needs "input" and either "target" or "label"')
    for name in row.keys() & {"input", "target", "label", "split"}:
        if not isinstance(row[name], str) or not row[name].strip():
            raise UserError(f'{where}: "{name}" must be text that is not empty, got {json.dumps(row[name])}')
    if row.get("split", "id") not in SPLITS:
        raise UserError(f'{where}: "split" is {", ".join(SPLITS)}, got {row["split"]!r}')
    return row


def split(rows: list[dict[str, Any]], path: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines by split; an input repeated in the file stays in one."""
    named = sum("split" in row for row in rows)
    if 0 < named < len(rows):
        raise UserError(f"{path}: some lines name a split and some do not; give all of them one, or none")
    if not named:
        inputs = sorted({row["input"] for row in rows}, key=lambda text: (zlib.crc32(text.encode()), text))
        few = -(-len(inputs) // HELD_OUT)
        home = dict.fromkeys(inputs, "train") | dict.fromkeys(inputs[:few], "id") | dict.fromkeys(inputs[few : 2 * few], "dev")
        rows = [row | {"split": home[row["input"]]} for row in rows]
    parts = {name: [row for row in rows if row["split"] == name] for name in SPLITS}
    for name in ("train", "dev"):
        if not parts[name]:
            raise UserError(f"{path}: no example is left for {name}; give more lines, or name the split of each")
    return parts
