"""Quantization of a language model: perplexity, time and size of every method, beside llm-compressor and AutoRound.

    python benchmarks/ptq.py                              # SmolLM2-135M, W2 W3 per channel and W3 group 64
    python benchmarks/ptq.py --settings w4s w4g64 --methods gptq boa --texts wikitext2_dev
    python benchmarks/ptq.py --settings w2 --methods boa boa+mismatch=residual+passes=2 --seeds 0 1 2 --texts wikitext2_dev shakespeare_dev

A method may carry its options, as in the last line; rotate=true is --rotate. A setting is w BITS [g GROUP] [s]: w3g64 is 3 bits,
asymmetric, group 64; s makes it symmetric. Every artifact is reloaded by plain transformers and measured on the first windows of each
text, by the same function. Peers run in this same process when they are installed, and get the very tokens we calibrate on. Rows go to
benchmarks/results/ptq.csv with the commit and the machine; a table is printed at the end.
"""

import argparse
import re
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from rows import append, provenance
from torch.utils.data import DataLoader

from smidgen.quant.checkpoint import Checkpoint, load_model
from smidgen.quant.evaluate import perplexity, pick_device
from smidgen.quant.load import load_artifact
from smidgen.quant.quantize import Config, main, size
from smidgen.quant.solvers import SOLVERS
from smidgen.run import Run
from smidgen.texts import windows

RESULTS = Path(__file__).parent / "results" / "ptq.csv"
TEXTS = ["wikitext2_test", "shakespeare_dev", "wikitext2_dev"]
SETUP = ["seed", "sequences", "length", "windows", "commit", "machine", "date"]
COLUMNS = ["setting", "method", "seconds", "megabytes", "bits_per_weight", *TEXTS, *SETUP]


def parse(setting: str) -> dict:
    """w3g64s -> bits 3, group 64, symmetric."""
    match = re.fullmatch(r"w(\d)(?:g(\d+))?(s?)", setting)
    if match is None:
        raise SystemExit(f"a setting looks like w3, w3g64 or w4g64s, not {setting}")
    return {"bits": int(match[1]), "group": int(match[2]) if match[2] else None, "symmetric": bool(match[3])}


def named(method: str) -> tuple[str, dict]:
    """boa+passes=2+mismatch=residual -> the method and its options."""
    name, *given = method.split("+")
    return name, {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in given)}


def solver(method: str) -> dict:
    """The method and its options, as the configuration holds them."""
    name, given = named(method)
    rotate = given.pop("rotate", False)
    return {"method": name, "rotate": rotate} | ({name: SOLVERS[name](**given)} if given else {})


def ours(method: str, setting: str, seed: int, options: argparse.Namespace, folder: Path) -> tuple[Path, float, float]:
    """Our artifact, the seconds it took and its bits per weight."""
    config = Config(
        model=options.model,
        **solver(method),
        calibration=str(options.data / "text" / f"{options.calibration}.txt"),
        sequences=options.sequences,
        length=options.length,
        evaluate=(),
        seed=seed,
        **parse(setting),
    )
    with Run("quantize", config, folder) as run:
        metrics = main(config, run)
    return folder / "artifact", metrics["quantize_seconds"], metrics["bits_per_weight"]


def llmcompressor(setting: str, seed: int, options: argparse.Namespace, observer: str = "mse") -> tuple[torch.nn.Module, float]:
    """llm-compressor's GPTQ (block 128, damping 0.01, static act-order); its mse observer searches the range, as ours does."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    grid = parse(setting)
    model, tokenizer = loaded(options)
    tokens = calibration(options, seed, tokenizer)
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    weights = {
        "num_bits": grid["bits"],
        "type": "int",
        "symmetric": grid["symmetric"],
        "strategy": "group" if grid["group"] else "channel",
        "group_size": grid["group"],
        "observer": observer,
    }
    recipe = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    started = time.monotonic()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=options.length, num_calibration_samples=len(tokens))
    return model, time.monotonic() - started


def autoround(setting: str, seed: int, options: argparse.Namespace, iters: int = 200) -> tuple[torch.nn.Module, float]:
    """AutoRound with its defaults (batches of 8, learning rate 1/iterations); it rounds what it returns to bfloat16."""
    from auto_round import AutoRound

    grid = parse(setting)
    model, tokenizer = loaded(options)
    data = DataLoader([{"input_ids": t} for t in calibration(options, seed, tokenizer)], batch_size=8)
    started = time.monotonic()
    tuner = AutoRound(
        model,
        tokenizer,
        dataset=data,
        nsamples=options.sequences,
        seqlen=options.length,
        iters=iters,
        bits=grid["bits"],
        group_size=grid["group"] or -1,
        sym=grid["symmetric"],
        device_map=str(pick_device("auto")),
    )
    model, _ = tuner.quantize()
    return model, time.monotonic() - started


PEERS = {"llmcompressor": (llmcompressor, "llmcompressor"), "autoround": (autoround, "auto_round")}  # and the package each needs


def peer(method: str, setting: str, seed: int, options: argparse.Namespace, folder: Path) -> tuple[Path, float, float]:
    """The weights a peer ends with, its seconds, and nothing for bits per weight.

    They are on the grid already: saved as plain floats they load everywhere alike.
    """
    name, given = named(method)
    model, seconds = PEERS[name][0](setting, seed, options, **given)
    layers = {n: m.weight.detach().float().cpu() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    torch.save(layers, folder.with_suffix(".pt"))
    return folder.with_suffix(".pt"), seconds, float("nan")


def loaded(options: argparse.Namespace) -> tuple[Any, Any]:
    """The float model and its tokenizer."""
    checkpoint = Checkpoint.open(options.model)
    return load_model(checkpoint.folder, torch.float32, pick_device("auto")), checkpoint.tokenizer()


def calibration(options: argparse.Namespace, seed: int, tokenizer) -> torch.Tensor:
    """The tokens every method calibrates on."""
    source = str(options.data / "text" / f"{options.calibration}.txt")
    return windows(source, tokenizer, options.length, options.sequences, seed)


def measure(artifact: Path, options: argparse.Namespace, run: Run) -> dict[str, float]:
    """Perplexity of an artifact, or of float weights saved from a peer, on every text."""
    device = pick_device("auto")
    checkpoint = Checkpoint.open(options.model)
    model = load_artifact(checkpoint.folder if artifact.suffix == ".pt" else artifact, torch.float32, device)
    if artifact.suffix == ".pt":
        with torch.no_grad():
            for name, weight in torch.load(artifact).items():
                model.get_submodule(name).weight.copy_(weight)
    tokenizer = checkpoint.tokenizer()
    texts = {t: windows(str(options.data / "text" / f"{t}.txt"), tokenizer, options.length, options.windows) for t in options.texts}
    return {t: perplexity(model, tokens, run, t) for t, tokens in texts.items()}


def row_of(method: str, setting: str, seed: int, options: argparse.Namespace, folder: Path, run: Run) -> dict:
    """One line of the table."""
    if method == "float":
        artifact, seconds, bits = Checkpoint.open(options.model).folder, 0.0, 32.0
    elif named(method)[0] in PEERS:
        artifact, seconds, bits = peer(method, setting, seed, options, folder)
    else:
        artifact, seconds, bits = ours(method, setting, seed, options, folder)
    return (
        {
            "setting": setting,
            "method": method,
            "seconds": round(seconds, 1),
            "megabytes": round(size(artifact) / 1e6, 1) if artifact.is_dir() else "",
            "bits_per_weight": bits,
            "seed": seed,
            "sequences": options.sequences,
            "length": options.length,
            "windows": options.windows,
        }
        | provenance()
        | {t: round(p, 3) for t, p in measure(artifact, options, run).items()}
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--calibration", default="wikitext2_calibration")
    parser.add_argument("--texts", nargs="+", default=["wikitext2_test", "shakespeare_dev"])
    parser.add_argument("--settings", nargs="+", default=["w2", "w3", "w3g64"])
    parser.add_argument("--methods", nargs="+", default=["float", "rtn", "gptq", "boa", "aespa", "auto", "llmcompressor", "autoround"])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


if __name__ == "__main__":
    options = arguments()
    missing = {name for name, (_, package) in PEERS.items() if not find_spec(package)}
    methods = [m for m in options.methods if named(m)[0] not in missing]
    if methods != options.methods:
        print(f"not installed, so without their rows: {', '.join(sorted(missing))}")
    cases = [("float", "-", 0)] if "float" in methods else []
    cases += [(m, s, seed) for s in options.settings for m in methods if m != "float" for seed in options.seeds]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        with Run("ptq", Config(model=options.model), Path(scratch) / "benchmark") as run:
            for method, setting, seed in cases:
                rows.append(row_of(method, setting, seed, options, Path(scratch) / f"{setting}-{method}-{seed}", run))
                append(RESULTS, COLUMNS, rows[-1:])
                print("\t".join(f"{k}={rows[-1][k]}" for k in ("setting", "method", "seconds", *options.texts)), flush=True)
    table = ["setting", "method", "seed", *options.texts, "seconds", "bits_per_weight"]
    print(f"\n| {' | '.join(table)} |\n|{'---|' * len(table)}")
    for row in rows:
        print(f"| {' | '.join(str(row[column]) for column in table)} |")
