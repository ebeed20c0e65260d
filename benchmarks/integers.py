"""SmolLM2 on integers in ONNX Runtime: perplexity, speed and size of W8A8 and W4A8 beside the float and the weight-only int4 graph.

    python benchmarks/integers.py                                # on the machine whose speed is asked for; an hour on two cores
    python benchmarks/integers.py --artifacts w8a8 float --windows 4 --block-steps 20

Artifacts are written by the commands of this package: `smidgen quantize --activations 8` (its perplexity in the simulation stands beside
that of the runtime), and `--bits 4 --group 32 --symmetric --export onnx` for int4. The float graph is the W8A8 one's with float32 weights.
Each is measured by `smidgen bench` in a process of its own. Rows go to benchmarks/results/integers.csv.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rows import append, provenance, rounded

from smidgen.quant import integers
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export import onnx_qdq
from smidgen.quant.quantize import Config, main
from smidgen.quant.transforms.quadapter import SEARCHED
from smidgen.run import Run

RESULTS = Path(__file__).parent / "results" / "integers.csv"
COLUMNS = [
    "artifact", "size_bytes", "perplexity", "perplexity_simulated", "prefill_tokens_per_second", "decode_tokens_per_second",
    "first_token_ms", "peak_memory_bytes", "text", "windows", "machine", "date",
]  # fmt: skip
SITES = ("norm", "heads", "product")


def written(name: str, options: argparse.Namespace, folder: Path) -> tuple[Path, float | None]:
    """An artifact, and its perplexity in the simulation where there is one."""
    if name == "float":
        return float_graph(options, folder), None
    common = {"model": options.model, "calibration": text(options, options.calibration), "sequences": options.sequences, "length": 1024}
    if name == "int4":
        config = Config(**common, method="rtn", bits=4, group=32, symmetric=True, evaluate=(), export="onnx")
        with Run("quantize", config, folder) as run:
            main(config, run)
        return folder / "onnx", None
    quadapter = replace(SEARCHED, steps=options.block_steps)
    config = Config(
        **common, method="quadapter", bits=int(name[1]), activations=8, sites=SITES, quadapter=quadapter, eval_windows=options.windows,
        factors=options.factors and options.factors / f"{name}-0-quadapter-norm-heads-product",
        evaluate=(text(options, options.text),), rounding="nearest" if name == "w8a8" else "boa",
    )  # fmt: skip
    with Run("quantize", config, folder) as run:
        (simulated,) = integers.main(config, run)["perplexity_simulated"].values()
    return folder / "onnx", simulated


def float_graph(options: argparse.Namespace, folder: Path) -> Path:
    """The same graph with none of its layers quantized."""
    source = Checkpoint.open(options.model)
    (folder / "onnx").mkdir(parents=True)
    onnx_qdq.write(folder / "onnx", source, source.model(torch.float32, torch.device("cpu")), {})
    return folder / "onnx"


def text(options: argparse.Namespace, name: str) -> str:
    """A text of the data folder."""
    return str(options.data / "text" / f"{name}.txt")


def measured(artifact: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What `smidgen bench` prints."""
    command = [sys.executable, "-m", "smidgen", "bench", str(artifact), "--text", text(options, options.text), "--output", str(scratch)]
    done = subprocess.run([*command, "--windows", str(options.windows)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", nargs="+", default=["float", "int4", "w8a8", "w4a8"], choices=["float", "int4", "w8a8", "w4a8"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--calibration", default="wikitext2_calibration")
    parser.add_argument("--text", default="wikitext2_test")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--block-steps", type=int, default=SEARCHED.steps, help="of Quadapter's first phase; 0: its start alone")
    parser.add_argument("--factors", type=Path, help="a folder of benchmarks/qat.py --factors; hours on two cores without")
    return parser.parse_args()


if __name__ == "__main__":
    options = arguments()
    setup = {"text": options.text, "windows": options.windows} | provenance()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.artifacts:
            artifact, simulated = written(name, options, Path(folder) / name)
            found = measured(artifact, options, Path(folder) / f"bench-{name}")
            row = setup | found | {"artifact": name, "perplexity_simulated": simulated}
            row |= {"perplexity": next(iter(found["perplexity"].values()))}
            append(RESULTS, COLUMNS, [rounded(row, COLUMNS)])
            print("\t".join(f"{k}={row.get(k, '')}" for k in COLUMNS[:8]), flush=True)
