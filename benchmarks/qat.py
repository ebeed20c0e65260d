"""Quantized activations: perplexity in and out of domain of every method, adapted on one text only.

    python benchmarks/qat.py                                     # everything; hours on two cores, about a minute a row on a GPU
    python benchmarks/qat.py --settings w8a8 --seeds 0 --methods min-max quadapter quadapter+finetune=200
    CUDA_VISIBLE_DEVICES=1 python benchmarks/qat.py --seeds 1 --results benchmarks/results/qat-1.csv &    # processes beside each other

A method is one of `smidgen quantize --activations`, or `qat` for quantization-aware training, with options of the command after +; FULL is
every kind of site the family has. `float` is the model itself, `float+steps=200` the control: the same training without quantizers. With
`smoothquant+t=best` one t for all blocks is chosen by the loss on the held-out part of the calibration text. Every method sees the same
windows, of which an eighth is held out to choose and to stop by. Static inputs, one range per tensor, those of o_proj and down_proj
included; weights with a scale per row; head, embeddings, norms, scores and softmax are not quantized. Products are float32, on CUDA TF32
(11 bits, which hold an 8-bit code times its scale to a fifteenth of a step). Factors found once are used by every method that starts with
them. Rows go to --results as they are finished; a row that is there already is not made again. benchmarks/qat_tables.py prints them.
"""

import argparse
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rows import append, provenance, read, settings

from smidgen.errors import UserError
from smidgen.fit import FitConfig
from smidgen.precision import pick_device
from smidgen.quant import integers, qat, training
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.evaluate import perplexity
from smidgen.quant.quantize import Config
from smidgen.quant.training import EXACT
from smidgen.quant.transforms.quadapter import SEARCHED
from smidgen.quant.transforms.smoothquant import SmoothQuant
from smidgen.run import Run
from smidgen.texts import windows

RESULTS = Path(__file__).parent / "results" / "qat.csv"
TEXTS = ["wikitext2_test", "shakespeare_dev"]
COLUMNS = [
    "setting", "method", "seed", "seconds", *TEXTS, "held_out", "steps", "peak_gigabytes", "sequences", "length", "windows",
    "commit", "machine", "date",
]  # fmt: skip
MIGRATIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FULL = {"sites": ("norm", "heads", "product")}
METHODS = [
    "float", "float+steps=200", "min-max", "mse", "clip", "smoothquant+t=best", "smoothquant+t=best+sites=FULL+clip=true",
    "mse+rounding=gptq", "mse+rounding=boa", "mse+rounding=adaround",
    "quadapter+sites=FULL", "quadapter+sites=FULL+finetune=200", "quadapter+sites=FULL+finetune=200+finetune_share=1",
    "quadapter+sites=FULL+finetune=200+finetune_share=1+rounding=boa",
    "qat+ranges=min-max", "qat+ranges=scale-offset", "qat+ranges=beta-gamma", "qat+ranges=beta-gamma+link=identity",
    "qat+ranges=beta-gamma+link=sigmoid", "qat+ranges=min-max+start=clip", "qat+ranges=min-max+start=clip+teacher=self",
    "qat+ranges=min-max+start=quadapter+sites=FULL",
]  # fmt: skip


def bits(setting: str) -> tuple[int, int]:
    """w4a8 -> 4, 8."""
    found = re.fullmatch(r"w(\d)a(\d)", setting)
    if found is None:
        raise SystemExit(f"a setting looks like w8a8, not {setting}")
    return int(found[1]), int(found[2])


def named(method: str) -> tuple[str, dict[str, Any]]:
    """quadapter+sites=FULL+finetune=200 -> the method and its options."""
    name, *given = method.split("+")
    found = settings(given)
    return name, found | (FULL if found.get("sites") == "FULL" else {})


def adapted(method: str, setting: str, seed: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """A method of `smidgen quantize --activations`."""
    name, given = named(method)
    weights, activations = bits(setting)
    migration = given.pop("t", None)
    config = Config(
        options.model,
        method=name,  # pyright: ignore[reportArgumentType]  checked by the command
        bits=weights,
        activations=activations,
        calibration=text(options, options.calibration),
        sequences=options.sequences,
        length=options.length,
        evaluate=tuple(text(options, t) for t in TEXTS),
        eval_windows=options.windows,
        export="none",
        finetune_batch=options.batch,
        quadapter=replace(SEARCHED, steps=options.block_steps),
        factors=None if name in ("min-max", "mse") else kept(name, given, setting, seed, options, scratch),
        seed=seed,
    )
    config = replace(config, **given)
    if migration == "best":
        config = replace(config, smoothquant=SmoothQuant((best_migration(config, scratch),)), factors=None)
    return quantized(config, scratch)


def best_migration(config: Config, scratch: Path) -> float:
    """t with the least loss on held-out calibration text."""
    tried = {t: replace(config, smoothquant=SmoothQuant((t,)), evaluate=(), factors=None) for t in MIGRATIONS}
    lost = {t: quantized(one, scratch)["held_out"] for t, one in tried.items()}
    return min(lost, key=lambda t: lost[t])


def quantized(config: Config, scratch: Path) -> dict[str, Any]:
    """Metrics of a run."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, Run("quantize", config, Path(folder) / "run") as run:
        return integers.main(config, run)


def kept(name: str, given: dict[str, Any], setting: str, seed: int, options: argparse.Namespace, scratch: Path) -> Path:
    """Where the factors of a start are, for all methods that share it."""
    sites = "-".join(given.get("sites", ("norm",)))
    return (options.factors or scratch) / f"{setting}-{seed}-{name}-{sites}{'-clip' if given.get('clip') else ''}"


def trained(method: str, setting: str, seed: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Quantization-aware training."""
    _, given = named(method)
    weights, activations = bits(setting)
    start = given.get("start", "min-max")
    config = qat.Config(
        options.model,
        train=text(options, options.calibration),
        evaluate=tuple(text(options, t) for t in TEXTS),
        weights=weights,
        activations=activations,
        sequences=options.sequences,
        held_out=integers.HELD_OUT,
        calibration=options.sequences,
        length=options.length,
        eval_windows=options.windows,
        steps=options.steps,
        batch=options.batch,
        precision="float32",
        learning_rate=options.learning_rate,
        range_learning_rate=options.range_learning_rate,
        evaluate_every=max(1, options.steps // integers.EVALUATIONS),
        patience=integers.EVALUATIONS,
        quadapter=replace(SEARCHED, steps=options.block_steps),
        factors=None if start in ("min-max", "mse") else kept(start, given, setting, seed, options, scratch),
        seed=seed,
    )
    config = replace(config, **given)
    with tempfile.TemporaryDirectory(dir=scratch) as folder, Run("qat", config, Path(folder) / "run") as run:
        return qat.main(config, run)


def unquantized(method: str, setting: str, seed: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The float model, or what training it on the same windows makes of it."""
    steps = named(method)[1].get("steps", 0)
    device, source = pick_device("auto"), Checkpoint.open(options.model)
    model, tokenizer = qat.exact(source, device), source.tokenizer()
    tokens = windows(text(options, options.calibration), tokenizer, options.length, options.sequences, seed)
    learnt, held_out = training.split(tokens, integers.HELD_OUT)
    texts = {t: windows(t, tokenizer, options.length, options.windows) for t in (text(options, t) for t in TEXTS)}
    every, rate = max(1, steps // integers.EVALUATIONS), options.learning_rate
    fit = FitConfig(steps=steps, learning_rate=rate, precision="float32", evaluate_every=every, patience=integers.EVALUATIONS, seed=seed)
    with tempfile.TemporaryDirectory(dir=scratch) as folder, Run("float", fit, Path(folder) / "run") as run:
        if not steps:
            return {"perplexity": {name: perplexity(model, t, run, name, EXACT, recorded=True) for name, t in texts.items()}}
        groups, measure = training.weight_groups(model, {}), training.measuring(model, held_out, texts)
        return qat.outcome(training.train(model, groups, learnt, fit, run, options.batch, evaluate=measure))


def text(options: argparse.Namespace, name: str) -> str:
    """A text of the data folder."""
    return str(options.data / "text" / f"{name}.txt")


def row_of(method: str, setting: str, seed: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One line of the table."""
    make = {"qat": trained, "float": unquantized}.get(named(method)[0], adapted)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    metrics = make(method, setting, seed, options, scratch)
    row = {"setting": setting, "method": method, "seed": seed, "seconds": round(time.monotonic() - started, 1)}
    row |= {name: round(metrics["perplexity"][text(options, name)], 3) for name in TEXTS}
    if torch.cuda.is_available():
        row["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    row |= {"sequences": options.sequences, "length": options.length, "windows": options.windows}
    lost = {"held_out": round(metrics["held_out"], 4)} if "held_out" in metrics else {}
    return row | lost | {"steps": metrics.get("kept_step")} | provenance()


def done(results: Path) -> set[tuple[str, str, str]]:
    """Setting, method and seed of the rows that are there."""
    return {(row["setting"], row["method"], row["seed"]) for row in read(results)}


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
    parser.add_argument("--block-steps", type=int, default=SEARCHED.steps, help="of Quadapter's first phase, per block")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="of weights in quantization-aware training")
    parser.add_argument("--range-learning-rate", type=float, default=1e-3)
    parser.add_argument("--factors", type=Path, help="a folder where factors stay, for runs with the same options")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main(options: argparse.Namespace) -> int:
    """Every row that is not there yet; the number of rows that failed."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    failed, there = 0, done(options.results)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            for setting in options.settings:
                for method in options.methods:
                    if (setting, method, str(seed)) in there:
                        continue
                    try:
                        row = row_of(method, setting, seed, options, Path(scratch))
                    except (UserError, torch.OutOfMemoryError) as error:  # the other rows can still be made
                        failed += 1
                        print(f"{setting} {method} {seed}: {error}", file=sys.stderr, flush=True)
                        continue
                    append(options.results, COLUMNS, [row])
                    print("\t".join(str(row.get(c, "")) for c in COLUMNS[:8]), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(arguments()) else 0)
