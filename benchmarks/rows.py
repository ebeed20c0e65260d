"""What benchmarks share: a row per figure in a CSV, with what made it; safe to write from several processes."""

import csv
import fcntl
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import yaml


def append(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Adds rows, all or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, columns, restval="")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()


def rounded(row: dict, columns: list[str]) -> dict:
    """What a row has for the columns, six digits of every float."""
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items() if k in columns}


def read(path: Path) -> list[dict[str, str]]:
    """The rows there are."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def settings(parts: list[str]) -> dict[str, Any]:
    """`name=value` of a specification, each as the type it looks like; YAML would take 3e-4, which has no point, for a word.

    >>> settings(["steps=500", "learning_rate=3e-4", "carry=true"])
    {'steps': 500, 'learning_rate': 0.0003, 'carry': True}
    """
    found = {}
    for name, text in (part.split("=", 1) for part in parts):
        try:
            found[name] = float(text) if "e-" in text else yaml.safe_load(text)
        except ValueError:
            found[name] = text
    return found


def provenance() -> dict[str, str]:
    """What made a row."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    processor = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
        "date": time.strftime("%Y-%m-%d"),
    }
