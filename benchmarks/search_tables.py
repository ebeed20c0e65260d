"""The tables of docs/search.md from benchmarks/results/search.csv: mean and deviation over seeds; of a repeated run the last.

python benchmarks/search_tables.py [--results FILE]
"""

import argparse
import re
import statistics
from collections import defaultdict
from pathlib import Path

from rows import read

RESULTS = Path(__file__).parent / "results" / "search.csv"
COLUMNS = {
    "hit@1": "contextual hit@1", "hit@10": "contextual hit@10", "MRR@10": "contextual mrr@10", "nDCG@10": "contextual ndcg@10",
    "keyword hit@10": "keyword hit@10", "typo hit@10": "typo hit@10", "AUROC": "auroc", "MB": "size_mb",
}  # fmt: skip
TIMES = {"p50": "p50_ms", "p95": "p95_ms", "cold": "cold_ms", "MB": "size_mb"}
CHOSEN = re.compile(r", weight \S+ \(chosen\)")  # seeds choose their own
LOST = "contextual hit@10"

Seeds = dict[str, dict[str, str]]
"A row per seed."


def systems(rows: list[dict[str, str]], table: str) -> dict[str, Seeds]:
    """Rows of a table by system and seed, in the order they came."""
    found: dict[str, Seeds] = defaultdict(dict)
    for row in rows:
        name = CHOSEN.sub("", row["system"])
        if row["table"] == table and ", weight" not in name and "untrained minilm:" not in name:
            found[name][row["seed"]] = row
    return found


def cell(seeds: Seeds, column: str) -> str:
    """Mean and deviation; empty where there is none."""
    values = [float(row[column]) for row in seeds.values() if row[column]]
    if not values:
        return ""
    digits = 2 if column.endswith(("_mb", "_ms")) else 3
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 or statistics.stdev(values) < 0.0005 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(found: dict[str, Seeds], columns: dict[str, str]) -> str:
    """A line per system."""
    lines = [f"| | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, seeds in found.items():
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cell(seeds, column) for column in columns.values())} |")
    return "\n".join(lines)


def lost(found: dict[str, Seeds]) -> str:
    """What features lose that were left out of training, in points of hit@10, and what the others pay."""
    whole = found["all features, examples"]
    lines = ["| lift | left out, hit@10 | lost | MRR@10 | others, hit@10 | MRR@10 |", "|---" * 6 + "|"]
    for lift in ("1", "1.05", "1.1", "1.15", "1.2"):
        out: Seeds = {}
        for name in (f"left out, examples, lift {lift}", f"left out, examples, lift {lift} (chosen)"):  # by seeds, as it once was
            out |= found.get(name, {})
        others = found[f"not left out, lift {lift}"]
        points = [100 * (float(whole[seed][LOST]) - float(out[seed][LOST])) for seed in sorted(out)]
        figures = [cell(part, column) for part in (out, others) for column in (LOST, "contextual mrr@10")]
        by_seed = ", ".join(f"{p:.1f}" for p in points)
        lines.append(f"| {lift} | {figures[0]} | {statistics.mean(points):.1f} ({by_seed}) | {' | '.join(figures[1:])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    rows = read(parser.parse_args().results)
    for table in ("baselines", "teacher", "students"):
        print(markdown(systems(rows, table), COLUMNS), end="\n\n")
    print(lost(systems(rows, "leave-out")), end="\n\n")
    print(markdown(systems(rows, "times"), TIMES))
