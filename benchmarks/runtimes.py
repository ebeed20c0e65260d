"""Artifacts in their runtimes: size, perplexity and speed there, beside llama.cpp's own quantization of the same float weights.

    python benchmarks/runtimes.py                               # everything: about half an hour on two cores
    python benchmarks/runtimes.py --ours auto:4g32 auto:q3_k --peers q3_k_m
    python benchmarks/runtimes.py --rotated --ours auto:q4_1 --peers q4_1

Ours are runs of `smidgen quantize`, METHOD:GRID. 4g32 is 4 bits, group 32, symmetric, written as compressed-tensors, GGUF (q4_0) and
ONNX at once; 4g32-bfloat16 has the scales ExecuTorch stores, and is written for it; the others are GGUF's own grids. Peers are
llama.cpp's recipes with an importance matrix from the same calibration tokens (mean squares of every layer's inputs); its library has
to be one that can quantize (llama-cpp-py-sync, glibc 2.38). With --rotated both start from the Hadamard-rotated twin of the model:
SmolLM2's packaged weights lie on a q4_1 grid, which llama.cpp finds again and no solver can beat; its twin's lie on none.

An artifact is measured by `smidgen bench` in a process of its own. Rows go to benchmarks/results/runtimes.csv.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rows import append, provenance, rounded

from smidgen.errors import UserError
from smidgen.precision import forward_precision
from smidgen.quant.blocks import decoder_list, walk
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.collect import collect
from smidgen.quant.export import gguf
from smidgen.quant.load import load_artifact
from smidgen.quant.quantize import Config, main
from smidgen.quant.runtimes import find
from smidgen.quant.runtimes.llamacpp import llamacpp_quantize
from smidgen.quant.transforms.rotation import rotate
from smidgen.run import Run
from smidgen.texts import windows

RESULTS = Path(__file__).parent / "results" / "runtimes.csv"
COLUMNS = [
    "artifact", "recipe", "file_bytes", "perplexity", "agreement", "difference", "prefill_tokens_per_second", "decode_tokens_per_second",
    "first_token_ms", "peak_memory_bytes", "quantize_seconds", "runtime", "text", "windows", "commit", "machine", "date",
]  # fmt: skip
CPU = torch.device("cpu")
GGML = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def ours(name: str, options: argparse.Namespace, folder: Path) -> list[tuple[str, Path, Path | None, dict]]:
    """Label, artifact, what it is compared with, and the run's figures, of everything one run writes."""
    method, grid = name.split(":")
    common = {"model": options.model, "calibration": text(options, options.calibration), "evaluate": (), "method": method}
    uniform = {"bits": 4, "group": 32, "symmetric": True}
    if grid == "4g32":
        config = Config(**common, **uniform, export="compressed-tensors,gguf,onnx")
    elif grid == "4g32-bfloat16":
        config = Config(**common, **uniform, scale_dtype="bfloat16", export="compressed-tensors,executorch")
    else:
        config = Config(**common, format=grid)
    with Run("quantize", config, folder) as run:
        metrics = main(config, run)
    written = {kind: folder / w["folder"] for kind, w in metrics["written"].items()}
    reference = written.get("compressed-tensors", written.get("gguf"))
    return [(f"ours {name} {kind}", path, reference, metrics) for kind, path in written.items()]


def importance(options: argparse.Namespace, run: Run) -> dict[str, np.ndarray]:
    """The mean square of every input of every layer, by llama.cpp's names."""
    checkpoint = Checkpoint.open(options.model)
    model = checkpoint.skeleton(CPU)
    tokens = windows(text(options, options.calibration), checkpoint.tokenizer(), 1024, 32, 0)
    found = {}
    blocks = walk(checkpoint, model, tokens, CPU, forward_precision(CPU), "float")
    for block in run.track(blocks, "importance", len(decoder_list(model)[1])):
        for name, stats in collect(block, frozenset({"h_in"})).items():
            found[f"blk.{block.index}.{GGML[name]}.weight"] = stats.h_in[0].diagonal().float().numpy()
    return found


def text(options: argparse.Namespace, name: str) -> str:
    """A text of the data folder."""
    return str(options.data / "text" / f"{name}.txt")


def compared(artifact: Path, reference: Path, options: argparse.Namespace) -> dict[str, float]:
    """Largest difference of logits and share of equal top tokens over 1,024 tokens, against the dequantized weights in float32."""
    location, opened = find(artifact)
    runtime = opened(location, 512)
    model = dequantized(reference, options)
    tokens = windows(text(options, options.text), Checkpoint.open(options.model).tokenizer(), 512, 2)
    theirs = np.stack([runtime.logits(t.numpy()) for t in tokens])
    with torch.inference_mode():
        mine = model(tokens).logits.float().numpy()
    runtime.close()
    return {"difference": float(np.abs(theirs - mine).max()), "agreement": float((theirs.argmax(-1) == mine.argmax(-1)).mean())}


def dequantized(artifact: Path, options: argparse.Namespace) -> torch.nn.Module:
    """The model with an artifact's weights: a compressed-tensors folder, or the layers of a GGUF file in the float model."""
    if not (artifact / gguf.FILE).is_file():
        return load_artifact(artifact, torch.float32, CPU)
    model = load_artifact(Checkpoint.open(options.model).folder, torch.float32, CPU)
    for name, q in gguf.read(artifact / gguf.FILE).items():
        model.get_submodule(name).weight.data = q.dequantize()
    return model


def measured(artifact: Path, options: argparse.Namespace, scratch: Path) -> dict:
    """What `smidgen bench` prints."""
    command = [sys.executable, "-m", "smidgen", "bench", str(artifact), "--text", text(options, options.text), "--output", str(scratch)]
    done = subprocess.run([*command, "--windows", str(options.windows)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--calibration", default="wikitext2_calibration")
    parser.add_argument("--text", default="wikitext2_test")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--rotated", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--ours", nargs="*", default=["boa:4g32", "auto:4g32", "auto:4g32-bfloat16", "auto:q4_k", "auto:q3_k", "auto:q2_k"])
    parser.add_argument("--peers", nargs="*", default=["q4_0", "q4_1", "q4_k_m", "q3_k_m", "q3_k_s", "q2_k"])
    return parser.parse_args()


if __name__ == "__main__":
    options = arguments()
    setup = {"text": options.text, "windows": options.windows} | provenance()
    with tempfile.TemporaryDirectory() as folder, Run("runtimes", Config(options.model), Path(folder) / "run") as run:
        scratch = Path(folder)
        suffix = " rotated" if options.rotated else ""
        if options.rotated:
            options.model = str(rotate(Checkpoint.open(options.model), scratch / "twin").folder)
        cases: list[tuple[str, Path, Path | None, dict]] = []
        if options.peers:
            matrix = importance(options, run)
            (scratch / "float").mkdir()
            source = gguf.write_float(scratch / "float", Checkpoint.open(options.model))
        for kind in options.peers:
            try:
                llamacpp_quantize(source, scratch / f"{kind}.gguf", kind, matrix)
            except UserError as error:
                print(f"{kind}: {error}")
                continue
            cases.append((f"llama.cpp {kind}", scratch / f"{kind}.gguf", None, {"recipe": "importance matrix"}))
        for name in options.ours:
            cases += ours(name, options, scratch / name)
        for i, (label, artifact, reference, metrics) in enumerate(cases):
            found = measured(artifact, options, scratch / f"bench-{i}")
            row = setup | metrics | found | {"artifact": label + suffix, "file_bytes": found["size_bytes"], "recipe": metrics["recipe"]}
            row |= {"perplexity": next(iter(found["perplexity"].values()))} | (compared(artifact, reference, options) if reference else {})
            append(options.results, COLUMNS, [rounded(row, COLUMNS)])
            print("\t".join(f"{k}={row.get(k, '')}" for k in COLUMNS[:8]), flush=True)
