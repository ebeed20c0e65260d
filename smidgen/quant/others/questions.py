"""Models that lay questions out on a grid: the network over the grid in integers, what lays it out as `smidgen symbolic export` draws it.

Rounding a close decision between two actions would move whole rows, so those layers keep float16 weights and float products. The file is
one that `smidgen symbolic solve` and `evaluate` read.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.quant.others.other import GRAPH, Other, Sample
from smidgen.symbolic.export import better, exportable, on_dev
from smidgen.symbolic.graph import front
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.runtime import CARD_KEY, INTEGER_KEY
from smidgen.symbolic.settle import drawn, settle
from smidgen.symbolic.stored import describe, load
from smidgen.symbolic.tasks import open_task


class Behind(nn.Module):
    """What reads the grid of one question."""

    def __init__(self, model: GridModel) -> None:
        super().__init__()
        self.network, self.readout = model.network, model.readout

    def forward(self, cells: Float[Tensor, "1 dim rows columns"]) -> Float[Tensor, "*slots symbols"]:
        """Logits, of every slot or of labels."""
        return self.readout(self.network(cells.movedim(1, -1)))[0]


def grid_model(folder: Path, source: str | None) -> Other:
    """A model that `smidgen symbolic train` trained; `source` is the bAbI archive or folder, for a model of bAbI."""
    description = describe(folder)
    model = exportable(load(folder), description.name)
    if source is not None and not description.task.startswith("babi"):
        raise UserError(f"{folder} takes its ranges from questions of its own task, {description.task}; leave out --calibration")
    task = open_task(description.task, None if source is None else Path(source))
    layout = better(on_dev(model, task, seed=0))
    model.module.mode = layout

    card = settle(model, description.name, task).text()

    @torch.no_grad()
    def samples(count: int, seed: int) -> list[Sample]:
        batch = task.encode(drawn(task, "train", count, seed))
        found = []
        for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True):
            tokens = torch.from_numpy(row[None, :length])
            mask = torch.ones_like(tokens, dtype=torch.bool)
            cells = model.module(model.embedding(tokens, mask), mask).movedim(-1, 1).contiguous()
            found.append(Sample({"cells": cells}, {"tokens": row[:length]}))
        return found

    def complete(artifact: Path, integers: bool) -> None:
        import onnx

        behind = onnx.load(artifact / GRAPH)
        (opset,) = (entry.version for entry in behind.opset_import if entry.domain == "")
        before = front(model, layout, integers, opset, behind.ir_version)
        before = onnx.compose.add_prefix(before, "layout.", rename_inputs=False, rename_outputs=False)
        whole = onnx.compose.merge_models(before, behind, io_map=[("cells", "cells")], outputs=["logits", "actions"])
        whole.metadata_props.add(key=CARD_KEY, value=card)
        if integers:
            whole.metadata_props.add(key=INTEGER_KEY, value="static")
        onnx.save(whole, artifact / GRAPH)
        (artifact / f"{GRAPH}.data").unlink()

    behind = Behind(model).eval()
    kept = "what lays the grid out (float16 weights), norms that no convolution precedes, attention scores"
    return Other(
        folder.resolve().name, behind, behind, ("logits",), samples, {"cells": {}}, rows=True, complete=complete, high_precision=kept
    )
