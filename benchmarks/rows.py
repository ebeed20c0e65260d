"""What benchmarks share: a row per figure in a CSV, with what made it; safe to write from several processes."""

import csv
import fcntl
import platform
import subprocess
import time
from pathlib import Path

import torch


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


def provenance() -> dict[str, str]:
    """What made a row."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    processor = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
        "date": time.strftime("%Y-%m-%d"),
    }
