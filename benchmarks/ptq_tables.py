"""The tables of docs/quantize.md, from benchmarks/results/ptq.csv: mean and standard deviation over seeds."""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "ptq.csv"
SETTINGS = ["w2", "w3", "w4", "w2g64", "w3g64", "w4g64"]
RESIDUAL = "boa+mismatch=residual"
AUTO = RESIDUAL + "+passes=2+damp=0.1"
PEERS = {
    "RTN": "rtn",
    "GPTQ": "gptq",
    "llm-compressor 0.14 GPTQ": "llmcompressor",
    "AutoRound 0.15, 200 iterations": "autoround",
    "AutoRound 0.15, 1,000 iterations": "autoround+iters=1000",
    "BoA": "boa",
    "aespa, 2,000 steps": "aespa",
    "**`--method auto`**": AUTO,
    "`auto` with `mlp-rows`, `value-rows`": AUTO + "+mlp_rows=true+value_rows=true",
}
SWITCHES = {
    "`mismatch inputs`": "mismatch=inputs",
    "`mismatch residual`": "mismatch=residual",
    "`passes 2`": "passes=2",
    "`damp 0.1`": "damp=0.1",
    "`zfold`": "zfold=true",
    "`keys centred`": "keys=centred",
    "`keys first_order`": "keys=first_order",
    "`value-rows`": "value_rows=true",
    "`mlp-rows`": "mlp_rows=true",
    "`scales hessian` (the authors' criterion)": "scales=hessian",
    "`act-order` off": "act_order=false",
    "`--rotate`": "rotate=true",
}
RECIPES = {
    "`mismatch residual`, `damp 0.1`": RESIDUAL + "+damp=0.1",
    "`mismatch residual`, `passes 2`": RESIDUAL + "+passes=2",
    "the same with `choose`": RESIDUAL + "+passes=2+choose=true",
    "the same, `damp 0.03`": RESIDUAL + "+passes=2+damp=0.03",
    "the same, `damp 0.1`: `auto`": AUTO,
    "the same, `damp 0.2`": RESIDUAL + "+passes=2+damp=0.2",
    "the same, `damp 0.3`": RESIDUAL + "+passes=2+damp=0.3",
    "`auto`, `passes 4`": RESIDUAL + "+passes=4+damp=0.1",
    "`auto` on GPTQ": "gptq+mismatch=residual+passes=2+damp=0.1",
} | {
    f"`auto` with {name}": f"{AUTO}+{option}"
    for name, option in SWITCHES.items()
    if option.split("=")[0] not in ("mismatch", "passes", "damp")
}
RECIPES |= {
    "`auto` with `mlp-rows`, `value-rows`": AUTO + "+mlp_rows=true+value_rows=true",
    "`auto` with `mlp-rows`, `zfold`": AUTO + "+mlp_rows=true+zfold=true",
    "`auto` with `mlp-rows`, `passes 4`": RESIDUAL + "+passes=4+damp=0.1+mlp_rows=true",
}

Runs = dict[tuple[str, str], dict[str, dict[str, str]]]


def runs() -> Runs:
    """GPU rows with every text, by setting and method, then seed; of a repeated run the last."""
    found: Runs = defaultdict(dict)
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["windows"] == "24" and row["wikitext2_dev"] and row["wikitext2_test"] and "H100" in row["machine"]:
                found[row["setting"], row["method"]][row["seed"]] = row
    return found


def cell(rows: list[dict[str, str]], text: str) -> str:
    """Mean and deviation over seeds."""
    values = [float(row[text]) for row in rows if row[text] != "nan"]
    if not values:
        return ""
    mean = statistics.mean(values)
    shown = f"{mean:.3g}" if mean >= 1000 else f"{mean:.0f}" if mean >= 100 else f"{mean:.2f}"
    if len(values) == 1:
        return shown
    deviation = statistics.stdev(values)
    return shown + (f" ± {deviation:.2g}" if mean >= 1000 else f" ± {deviation:.0f}" if mean >= 100 else f" ± {deviation:.2f}")


def table(found: Runs, methods: dict[str, str], texts: list[str], title: str) -> str:
    """Markdown; methods with no run are left out."""
    lines = [f"| {title} | " + " | ".join(SETTINGS) + " |", "|---" * (len(SETTINGS) + 1) + "|"]
    for name, method in methods.items():
        rows = [list(found.get((setting, method), {}).values()) for setting in SETTINGS]
        if any(rows):
            lines.append(f"| {name} | " + " | ".join(" / ".join(filter(None, (cell(r, t) for t in texts))) for r in rows) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = runs()
    for text in ("wikitext2_test", "shakespeare_dev"):
        print(table(found, PEERS, [text], text), end="\n\n")
    development = ["wikitext2_dev", "shakespeare_dev"]
    alone = {"nothing": "boa"} | {name: f"boa+{option}" for name, option in SWITCHES.items()}
    print(table(found, alone, development, "BoA with"), end="\n\n")
    print(table(found, RECIPES, development, "BoA with"))
