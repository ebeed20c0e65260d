"""A GPTQ checkpoint of ours in GPTQModel on a processor: weights as it dequantizes them, and perplexity there.

    smidgen quantize smollm2-135m --method boa --group 32 --symmetric --scale-dtype bfloat16 --output RUN ...
    smidgen convert RUN --to gptq --output CONVERTED
    TORCHDYNAMO_DISABLE=1 python benchmarks/gptqmodel_runtime.py RUN/artifact CONVERTED/gptq --label boa:4g32-bfloat16

Needs the package GPTQModel. Without TORCHDYNAMO_DISABLE it compiles every layer first, for minutes. Stops with an error unless all
integers and scales of the checkpoint equal the artifact's. The row goes to benchmarks/results/runtimes.csv.
"""

import argparse
import math
from importlib.metadata import version
from pathlib import Path

import torch
from rows import append, provenance, rounded
from runtimes import COLUMNS, RESULTS
from tqdm import tqdm

from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.evaluate import mean_loss
from smidgen.quant.export import gptq
from smidgen.quant.export.compressed_tensors import Packed
from smidgen.quant.generate import size
from smidgen.texts import windows


def same_integers(artifact: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The dequantized layers, once all codes, zeros and scales are seen to be equal."""
    packed, found = Packed(artifact), gptq.read(checkpoint)
    assert set(found) == set(packed.layers)
    weights = {}
    for name, theirs in found.items():
        ours = packed.read(name)
        for a, b in ((ours.codes, theirs.codes), (ours.zero, theirs.zero), (ours.scale, theirs.scale)):
            assert torch.equal(a.float(), b.float()), name
        weights[name] = ours.dequantize()
    return weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--label", required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--text", default="wikitext2_test")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    weights = same_integers(options.artifact, options.checkpoint)
    print(f"integers and scales equal in {len(weights)} layers", flush=True)

    from gptqmodel import BACKEND, GPTQModel  # pyright: ignore[reportMissingImports]

    model = GPTQModel.load(str(options.checkpoint), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.bfloat16).model.eval()
    layers = {name: model.get_submodule(name) for name in weights}
    worst = max((layers[n].dequantize_weight().T.float() - w).abs().max().item() for n, w in weights.items())
    print(f"dequantized weights differ by at most {worst}", flush=True)
    del weights
    text = str(options.data / "text" / f"{options.text}.txt")
    tokens = windows(text, Checkpoint(options.checkpoint, options.label).tokenizer(), 1024, options.windows)
    perplexity = math.exp(mean_loss(model, tqdm(tokens), torch.float32))  # no autocast: in the model's own bfloat16
    row = {"artifact": f"ours {options.label} gptq", "file_bytes": size(options.checkpoint), "perplexity": perplexity}
    row |= {"runtime": f"GPTQModel {version('gptqmodel')}, bfloat16", "text": options.text, "windows": options.windows}
    append(options.results, COLUMNS, [rounded(row | provenance(), COLUMNS)])
