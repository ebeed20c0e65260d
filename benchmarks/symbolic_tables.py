"""The tables of docs/symbolic.md from benchmarks/results/symbolic.csv: mean and deviation over seeds, the best in brackets, in percent.

python benchmarks/symbolic_tables.py [--results FILE]
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from rows import read
from symbolic import ALL, RESULTS, SOLVED

BABI = "babi:joint"
Rows = list[dict[str, str]]


def cell(rows: Rows, column: str = "accuracy", best: bool = True) -> str:
    """Over seeds; empty where no row has the column."""
    values = [100 * float(row[column]) for row in rows if row.get(column)]
    if not values:
        return ""
    shown = f"{statistics.mean(values):.1f}"
    if len(values) == 1:
        return shown
    return f"{shown} ± {statistics.stdev(values):.1f}" + (f" ({max(values):.1f})" if best else "")


def wrong(rows: Rows) -> str:
    """Share of all questions answered surely and wrong by the exact back end."""
    values = [100 * (float(row["answered"]) - float(row["answered_right"])) for row in rows if row.get("answered")]
    return f"{statistics.mean(values):.2f}" if values else ""


def arithmetic(rows: Rows, task: str) -> str:
    """A line per model: the network in and out of distribution, with the most probable actions alone, and the exact back end."""
    found: dict[str, dict[str, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["task"] == task and row["group"] == ALL:
            found[row["model"]][row["split"]].append(row)
    lines = [f"| {task} | updates | seeds | id | ood | ood, hard | exact, id | exact, ood | answered wrong, ood |", "|---" * 9 + "|"]
    for model, splits in sorted(found.items(), key=lambda item: -statistics.mean(float(r["accuracy"]) for r in item[1]["ood"])):
        within, out = splits["id"], splits["ood"]
        steps = ", ".join(sorted({f"{row['steps']} x {row['batch']}" for row in out}))
        exact = f"{cell(within, 'exact', best=False)} | {cell(out, 'exact', best=False)} | {wrong(out)}"
        lines.append(f"| `{model}` | {steps} | {len(out)} | {cell(within)} | {cell(out)} | {cell(out, 'hard', best=False)} | {exact} |")
    return "\n".join(lines)


def babi(rows: Rows) -> str:
    """A line per model: tasks solved of every seed, and accuracy on each of the 20."""
    found: dict[str, dict[str, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["task"] == BABI:
            found[row["model"]][row["group"]].append(row)
    tasks = [f"qa{i}" for i in range(1, 21)]
    models = sorted(found, key=lambda model: -statistics.mean(float(row["accuracy"]) for row in found[model][ALL]))
    lines = [f"| bAbI | {' | '.join(f'`{model}`' for model in models)} |", "|---" * (len(models) + 1) + "|"]
    solved = []
    for model in models:
        counts: dict[str, int] = defaultdict(int)
        for task in tasks:
            for row in found[model][task]:
                counts[row["seed"]] += float(row["accuracy"]) >= SOLVED
        solved.append(", ".join(str(counts[seed]) for seed in sorted(counts)))
    lines.append(f"| tasks solved, by seed | {' | '.join(solved)} |")
    lines += [f"| {task} | {' | '.join(cell(found[model][task], best=False) for model in models)} |" for task in [ALL, *tasks]]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    rows = read(parser.parse_args().results)
    for task in sorted({row["task"] for row in rows}):
        print(babi(rows) if task == BABI else arithmetic(rows, task), end="\n\n")
