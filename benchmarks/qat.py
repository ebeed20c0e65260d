"""Quantized activations: perplexity in and out of domain of every method, adapted on one text only.

    python benchmarks/qat.py                                          # everything; hours on two cores, minutes on a GPU
    python benchmarks/qat.py --settings w8a8 --methods min-max quadapter quadapter+finetune=200 --seeds 0

A method is one of `smidgen quantize --activations` (with options after +), qat:RANGES[:LINK] for quantization-aware training, kd:RANGES for
the same with the float model as teacher. All see the same calibration windows; static activations, one range per tensor, inputs of o_proj
and down_proj included; head, embeddings and softmax are not quantized. Rows go to benchmarks/results/qat.csv.
"""

import argparse
import csv
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import yaml

from smidgen.quant import integers, qat
from smidgen.quant.quantize import Config
from smidgen.run import Run

RESULTS = Path(__file__).parent / "results" / "qat.csv"
TEXTS = ["wikitext2_test", "shakespeare_dev"]
COLUMNS = ["setting", "method", "seed", "seconds", *TEXTS, "steps", "windows", "commit", "machine", "date"]
METHODS = [
    "min-max", "mse", "smoothquant", "quadapter", "quadapter+finetune=200",
    "qat:min-max", "qat:beta-gamma:exp", "qat:beta-gamma:identity", "qat:beta-gamma:sigmoid", "qat:scale-offset", "kd:min-max",
]  # fmt: skip


def bits(setting: str) -> tuple[int, int]:
    """w4a8 -> 4, 8."""
    found = re.fullmatch(r"w(\d)a(\d)", setting)
    if found is None:
        raise SystemExit(f"a setting looks like w8a8, not {setting}")
    return int(found[1]), int(found[2])


def adapted(method: str, setting: str, seed: int, options: argparse.Namespace, folder: Path) -> dict:
    """A method of `smidgen quantize --activations`."""
    name, *given = method.split("+")
    weights, activations = bits(setting)
    config = Config(
        options.model,
        method=name,
        bits=weights,
        activations=activations,
        calibration=text(options, options.calibration),
        sequences=options.sequences,
        length=options.length,
        evaluate=tuple(text(options, t) for t in TEXTS),
        eval_windows=options.windows,
        export="none",
        seed=seed,
        **{key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in given)},
    )
    with Run("quantize", config, folder) as run:
        return integers.main(config, run)


def trained(method: str, setting: str, seed: int, options: argparse.Namespace, folder: Path) -> dict:
    """Quantization-aware training."""
    kind, ranges, *link = method.split(":")
    weights, activations = bits(setting)
    config = qat.Config(
        options.model,
        train=text(options, options.calibration),
        evaluate=tuple(text(options, t) for t in TEXTS),
        weights=weights,
        activations=activations,
        ranges=ranges,  # pyright: ignore[reportArgumentType]  checked by the command
        link=link[0] if link else "exp",  # pyright: ignore[reportArgumentType]
        teacher="self" if kind == "kd" else "none",
        sequences=options.sequences,
        length=options.length,
        eval_windows=options.windows,
        steps=options.steps,
        batch=options.batch,
        seed=seed,
    )
    with Run("qat", config, folder) as run:
        return qat.main(config, run)


def text(options: argparse.Namespace, name: str) -> str:
    """A text of the data folder."""
    return str(options.data / "text" / f"{name}.txt")


def row_of(method: str, setting: str, seed: int, options: argparse.Namespace, folder: Path) -> dict:
    """One line of the table."""
    started = time.monotonic()
    metrics = (trained if ":" in method else adapted)(method, setting, seed, options, folder)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "setting": setting,
        "method": method,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "steps": metrics.get("kept_step"),
        "windows": options.windows,
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
    } | {name: round(metrics["perplexity"][text(options, name)], 3) for name in TEXTS}


def append(row: dict) -> None:
    """Adds a row to the results."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--calibration", default="wikitext2_calibration")
    parser.add_argument("--settings", nargs="+", default=["w8a8", "w4a8", "w8a6"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--steps", type=int, default=200, help="of quantization-aware training")
    parser.add_argument("--batch", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    options = arguments()
    for seed in options.seeds:
        for setting in options.settings:
            for method in options.methods:
                with tempfile.TemporaryDirectory() as scratch:
                    row = row_of(method, setting, seed, options, Path(scratch) / "run")
                append(row)
                print("\t".join(str(row[c]) for c in COLUMNS[:6]), flush=True)
