"""The tables of docs/activations.md, from benchmarks/results/qat*.csv: mean and standard deviation over seeds.

    python benchmarks/qat_tables.py                  # a table per setting: perplexity in and out of domain, and the gap between them

A gap is how much more, in percent, a method loses out of domain than in domain: 100 (out / float out) / (in / float in) - 100.
"""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TEXTS = ("wikitext2_test", "shakespeare_dev")
FULL = "+sites=FULL"
BOTH = f"quadapter{FULL}+finetune=200"
METHODS = {
    "float": "float",
    "float, trained without quantizers (control)": "float+steps=200",
    "min-max": "min-max",
    "mse": "mse",
    "clip": "clip",
    "mse, GPTQ": "mse+rounding=gptq",
    "mse, BoA": "mse+rounding=boa",
    "mse, AdaRound": "mse+rounding=adaround",
    "SmoothQuant, best t of every block": "smoothquant",
    "SmoothQuant, one best t": "smoothquant+t=best",
    "SmoothQuant, best t, every site, clip": f"smoothquant+t=best{FULL}+clip=true",
    "Quadapter, phase 1": f"quadapter{FULL}",
    "Quadapter, phase 1, BoA": f"quadapter{FULL}+rounding=boa",
    "**Quadapter, phases 1 and 2**": BOTH,
    "**Quadapter, phases 1 and 2, BoA**": f"{BOTH}+rounding=boa",
    "Quadapter, phases 1 and 2, towards the float model": f"{BOTH}+finetune_share=1",
    "the same, BoA": f"{BOTH}+finetune_share=1+rounding=boa",
    "QAT, min-max": "qat+ranges=min-max",
    "QAT, scale-offset (normalised)": "qat+ranges=scale-offset",
    "QAT, beta-gamma, exp": "qat+ranges=beta-gamma",
    "QAT, beta-gamma, identity": "qat+ranges=beta-gamma+link=identity",
    "QAT, beta-gamma, sigmoid": "qat+ranges=beta-gamma+link=sigmoid",
    "QAT, min-max, from clip": "qat+ranges=min-max+start=clip",
    "KD-QAT, min-max": "qat+ranges=min-max+teacher=self",
    "KD-QAT, min-max, from clip": "qat+ranges=min-max+start=clip+teacher=self",
    "Quadapter's phase 1, then QAT": f"qat+ranges=min-max+start=quadapter{FULL}",
}

Rows = dict[str, dict[str, str]]
"By seed."


def runs(folder: Path) -> dict[tuple[str, str], Rows]:
    """Rows by setting and method; of a repeated run the last."""
    found: dict[tuple[str, str], Rows] = defaultdict(dict)
    for file in sorted(folder.glob("qat*.csv")):
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                found[row["setting"], row["method"]][row["seed"]] = row
    return found


def cell(values: list[float], digits: int = 2) -> str:
    """Mean and deviation over seeds."""
    if not values:
        return ""
    shown = f"{statistics.mean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {statistics.stdev(values):.{digits}f}"


def table(found: dict[tuple[str, str], Rows], setting: str) -> str:
    """Markdown; methods with no run are left out."""
    lines = [f"| {setting.upper()} | {' | '.join(TEXTS)} | over float, % | gap, % | seeds |", "|---" * (len(TEXTS) + 4) + "|"]
    floats = next((rows for (_, method), rows in found.items() if method == "float"), {})
    whole = [float(next(iter(floats.values()))[text]) for text in TEXTS]  # one model, whatever the setting and seed
    for name, method in METHODS.items():
        rows = floats if method == "float" else found.get((setting, method))
        if rows:
            values = [[float(row[text]) for row in rows.values()] for text in TEXTS]
            over = [100 * (statistics.mean(v) / w - 1) for v, w in zip(values, whole, strict=True)]
            gaps = [100 * (out / whole[1] / (within / whole[0]) - 1) for within, out in zip(*values, strict=True)]
            lines.append(f"| {name} | {' | '.join(map(cell, values))} | {over[0]:+.1f} / {over[1]:+.1f} | {cell(gaps, 1)} | {len(rows)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = runs(RESULTS)
    for setting in sorted({setting for setting, _ in found}):
        print(table(found, setting), end="\n\n")
