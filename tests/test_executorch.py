"""ExecuTorch programs, run by its own runtime in a process of its own, whose imports warn."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from smidgen.errors import UserError
from smidgen.grid import Grid
from smidgen.quant.blocks import decoder_list
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export.executorch import ExecuTorch
from smidgen.quant.linear import LINEAR

needs_executorch = pytest.mark.skipif(find_spec("executorch") is None, reason="executorch is not installed")

SCRIPT = """
import gc, sys
from pathlib import Path
import torch
from smidgen.errors import UserError
from smidgen.grid import Grid
from smidgen.quant.blocks import decoder_list, walk
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export.executorch import DynamicLinear, ExecuTorch
from smidgen.quant.linear import LINEAR
from smidgen.quant.runtimes.executorch import ExecuTorch as Runtime
from smidgen.quant.solvers import RTN

torch.set_num_threads(1)
gc.disable()  # tracing makes millions of objects that stay: a sixth of its time would go into looking for others
folder, source = Path("pte"), Path(sys.argv[1])
folder.mkdir()
checkpoint = Checkpoint(source, "tiny")
model = checkpoint.skeleton(torch.device("cpu"))
path, blocks = decoder_list(model)
names = [f"{path}.{i}.{n}" for i, b in enumerate(blocks) for n, m in b.named_modules() if isinstance(m, LINEAR)]
kinds = [Grid(bits, group, True, "bfloat16") for bits, group in ((4, 32), (3, None), (8, None))]
grids = {n: kinds[i % 3] for i, n in enumerate(names)}
for grid in kinds:
    ExecuTorch.check(model, [n for n in names if grids[n] == grid], grid)
weights = {n: RTN()(checkpoint.read([f"{n}.weight"])[f"{n}.weight"], None, grids[n]) for n in names}
exporter = ExecuTorch(folder, checkpoint, model)
walked = checkpoint.skeleton(torch.device("cpu"))  # as `smidgen quantize` has, with attention that cannot be traced
next(walk(checkpoint, walked, torch.load("tokens.pt")[:1], torch.device("cpu"), torch.float32))
for i, block in enumerate(blocks):
    exporter.add({n: q for n, q in weights.items() if n.startswith(f"{path}.{i}.")}, block, f"{path}.{i}")
exporter.finish()

pte = (folder / "model.pte").read_bytes()
for name, q in weights.items():
    bits = q.grid.bits
    signed = q.codes.int() - 2 ** (bits - 1)
    nibbles = (signed + 8).to(torch.uint8)
    stored = (nibbles[:, ::2] | nibbles[:, 1::2] << 4) if bits <= 4 else signed.to(torch.int8)
    assert stored.numpy().tobytes() in pte, name

reference = checkpoint.model(torch.float32, torch.device("cpu"))
for name, q in weights.items():
    reference.set_submodule(name, DynamicLinear(q, None))
tokens = torch.load("tokens.pt")
with torch.no_grad():
    expected = reference(tokens).logits
runtime = Runtime.open(folder, 64)
found = torch.stack([torch.from_numpy(runtime.logits(t.numpy())) for t in tokens])
print("max", (found - expected).abs().max().item(), "agree", (found.argmax(-1) == expected.argmax(-1)).float().mean().item())
first = tokens[0].numpy()
steps = [runtime.start(first[:40])] + [runtime.step(int(t)) for t in first[40:]]
print("steps", (torch.stack([torch.from_numpy(s) for s in steps]) - found[0, 39:]).abs().max().item())
assert runtime.decode(runtime.encode("two words")) == "two words"
(folder / "model.pte").write_bytes(pte[: len(pte) // 2])
try:
    Runtime.open(folder, 64)
except UserError as error:
    print("refused", "cannot be loaded" in str(error))
"""


@needs_executorch
def test_a_program_holds_codes_of_three_grids_and_computes_the_logits(tiny_llama, test_tokens, tmp_path):
    """One program for all grids, each in every third layer: tracing takes nearly all of the time, and does not depend on them."""
    torch.save(test_tokens[:10], tmp_path / "tokens.pt")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, str(tiny_llama)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split()
    difference, agree, steps = (float(words[words.index(key) + 1]) for key in ("max", "agree", "steps"))
    assert difference < 0.2 and agree > 0.98  # int8 inputs that lie on a half are rounded either way
    assert steps < 0.2
    assert words[-2:] == ["refused", "True"]


def test_grids_xnnpack_cannot_hold_are_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr("smidgen.quant.export.executorch.imported", lambda: None)
    model = Checkpoint(tiny_llama, "tiny").skeleton(torch.device("cpu"))
    path, blocks = decoder_list(model)
    names = [f"{path}.{i}.{n}" for i, b in enumerate(blocks) for n, m in b.named_modules() if isinstance(m, LINEAR)]
    for grid, remedy in (
        (Grid(4, 32, False, "bfloat16"), "use --symmetric"),
        (Grid(8, 32, True, "bfloat16"), "use --group none or --bits 4"),
        (Grid(4, 32, True, "float16"), "use --scale-dtype bfloat16"),
        (Grid(4, 16, True, "bfloat16"), "use --group 32"),
    ):
        with pytest.raises(UserError, match=remedy):
            ExecuTorch.check(model, names, grid)
