"""The tables of docs/fewshot.md from benchmarks/results/fewshot.csv and fewshot_speed.csv: mean and deviation over seeds, in percent.

python benchmarks/fewshot_tables.py [--results FILE ...]
"""

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
NAMES = {
    "protonet": "ProtoNet",
    "label-propagation": "label propagation over it, not learned",
    "tpn": "TPN",
    "tpn@higher": "TPN, more shots in training",
    "tpn+start=0.0": "TPN, sigma as drawn",
    "tpn+norm=transductive": "TPN, batch norm by the batch",
    "maml": "MAML",
    "maml+rate=0.03": "MAML, inner rate 0.03",
    "meta-sgd": "Meta-SGD",
    "meta-sgd+balance=classes": "Meta-SGD, classes weighed by 1/N",
    "btaml": "Bayesian TAML",
    "btaml mean": "Bayesian TAML, the mean instead of ten samples",
    "btaml+spread=0.1": "Bayesian TAML, from a spread of 0.1",
    "btaml+spread=0.1 mean": "the same, the mean instead of ten samples",
    "btaml+spread=0.3": "Bayesian TAML, from a spread of 0.3",
    "btaml+spread=0.3 mean": "the same, the mean instead of ten samples",
    "btaml+bayesian=false": "deterministic TAML",
    "btaml+gamma=false+z=false": "Bayesian, omega alone",
    "btaml+omega=false+z=false": "Bayesian, gamma alone",
    "btaml+omega=false+gamma=false": "Bayesian, z alone",
    "btaml+spread=0.1+gamma=false+z=false": "omega alone, from a spread of 0.1",
    "btaml+spread=0.1+gamma=false+z=false mean": "the same, the mean instead of ten samples",
    "btaml+spread=0.1+omega=false+z=false": "gamma alone, from a spread of 0.1",
    "btaml+spread=0.1+omega=false+z=false mean": "the same, the mean instead of ten samples",
    "btaml+spread=0.1+omega=false+gamma=false": "z alone, from a spread of 0.1",
    "btaml+spread=0.1+omega=false+gamma=false mean": "the same, the mean instead of ten samples",
    "btaml+spread=0.3+gamma=false+z=false": "omega alone, from a spread of 0.3",
    "btaml+spread=0.3+gamma=false+z=false mean": "the same, the mean instead of ten samples",
    "btaml+spread=0.3+omega=false+z=false": "gamma alone, from a spread of 0.3",
    "btaml+spread=0.3+omega=false+z=false mean": "the same, the mean instead of ten samples",
    "btaml+spread=0.3+omega=false+gamma=false": "z alone, from a spread of 0.3",
    "btaml+spread=0.3+omega=false+gamma=false mean": "the same, the mean instead of ten samples",
    "prototypes": "prototypes",
    "simpleshot": "prototypes, centred on CIFAR-FS",
    "frozen label-propagation": "label propagation, centred on CIFAR-FS",
    "predict simpleshot": "prototypes, centred on the task's own support",
    "predict label-propagation": "label propagation, centred so, 5 neighbours",
    "tpn head": "TPN head, centred and learned on CIFAR-FS",
    "one learner": "one learner on all four",
    "ensemble": "their mean",
}
SETS = {
    "omniglot": "Omniglot", "cifar_fs": "CIFAR-FS", "gtsrb": "GTSRB", "flowers12": "Flowers", "sign_digits": "sign digits",
    "mnist": "MNIST", "fashion_mnist": "Fashion-MNIST",
}  # fmt: skip
Row = dict[str, str]
Key = Callable[[Row], str]


def read(paths: list[Path]) -> list[Row]:
    """All rows; of a repeated run the last."""
    kept: dict[tuple[str, ...], Row] = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["table"] == "frozen" and row["method"].startswith("label-propagation"):
                    row["method"] = f"frozen {row['method']}"
                if row["table"] == "omniglot" and row["augment"]:
                    row["method"] += f", {row['augment']}"
                if row["table"] == "any-shot":
                    row["method"] += f", {int(row['steps']):,} updates" + " in tf32" * row["start"].endswith("tf32")
                kept[tuple(row[c] for c in ("table", "method", "trained", "tested", "ways", "shots", "queries", "seed"))] = row
    return list(kept.values())


def cell(rows: list[Row]) -> str:
    """Mean and deviation over seeds; of one seed its 95% interval over tasks, marked so."""
    values = [100 * float(row["accuracy"]) for row in rows]
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f} (± {100 * float(rows[0]['interval']):.2f})"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def name(method: str) -> str:
    """In words."""
    plain, _, rest = method.partition(" rebalanced")
    kind, *details = plain.split()
    base, comma, varied = plain.partition(",")
    words = NAMES.get(base, base) + comma + varied.replace("affine", "images turned and shifted in training")
    if kind == "member":
        words = f"member {SETS.get(details[0], details[0])}"
    if kind == "mxml":
        words = f"MxML, {', '.join(details)}"
    return f"{words}, rebalanced" if method.endswith("rebalanced") and not rest else words


def table(rows: list[Row], column: Key, title: str, columns: list[str] | None = None, mean: bool = False) -> str:
    """Markdown, a line per method in the order of their first rows; `mean` adds the mean over columns."""
    cells: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["method"]][column(row)].append(row)
    heads = columns or list(dict.fromkeys(column(row) for row in rows))
    heads = [h for h in heads if any(h in found for found in cells.values())]
    known = [m for base in NAMES for m in cells if m.partition(",")[0] == base]
    lines = [f"| {title} | " + " | ".join(SETS.get(h, h) for h in heads) + (" | mean |" if mean else " |")]
    lines.append("|---" * (len(heads) + 1 + mean) + "|")
    for method in [*known, *(m for m in cells if m not in known)]:
        line = [name(method), *(cell(cells[method][h]) for h in heads)]
        if mean:
            values = [statistics.mean(100 * float(row["accuracy"]) for row in cells[method][h]) for h in heads if cells[method][h]]
            line.append(f"{statistics.mean(values):.2f}" if len(values) == len(heads) else "")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def setting(row: Row) -> str:
    """5w1s."""
    return f"{row['ways']}w{row['shots']}s"


def unbalanced(row: Row) -> str:
    """Setting and balance of the queries."""
    return setting(row) + ("" if row["queries"] == "balanced" else ", Dirichlet")


def where(row: Row) -> str:
    """Set and setting, of the frozen features."""
    return f"{SETS[row['tested']]} {setting(row)}"


def speed(path: Path) -> str:
    """Steps per second."""
    lines = ["| | tasks per step | side by side, steps/s | in a loop, steps/s | ratio | machine |", "|---" * 6 + "|"]
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            cells = (NAMES[row["method"]], row["tasks"], row["steps_per_s"], row["loop_steps_per_s"], row["ratio"], row["machine"])
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints every table there are rows for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[FOLDER / "fewshot.csv"])
    rows = read(parser.parse_args().results)
    of = {t: [row for row in rows if row["table"] == t] for t in ("omniglot", "cifar-fs", "any-shot", "mxml", "frozen")}
    balanced = {t: [row for row in found if row["queries"] == "balanced"] for t, found in of.items()}
    tables = (
        (balanced["omniglot"], setting, "Omniglot", ["5w1s", "5w5s", "20w1s", "20w5s"], False),
        (of["cifar-fs"], unbalanced, "CIFAR-FS, 100 images a class", ["5w1s", "5w1s, Dirichlet", "5w5s", "5w5s, Dirichlet"], False),
        (balanced["any-shot"], lambda row: row["tested"], "5-way any-shot, trained on CIFAR-FS", list(SETS), False),
        (balanced["mxml"], lambda row: row["tested"], "5-way 5-shot", list(SETS), True),
        (balanced["frozen"], where, "frozen EfficientNet-Lite0", None, False),
    )
    for found, column, title, columns, mean in tables:
        if found:
            print(table(found, column, title, columns, mean), end="\n\n")
    if (FOLDER / "fewshot_speed.csv").exists():
        print(speed(FOLDER / "fewshot_speed.csv"))


if __name__ == "__main__":
    main()
