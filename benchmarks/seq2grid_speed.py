"""seq2grid's update step by step against its closed form: the same grid, the same gradients, how long each takes.

    python benchmarks/seq2grid_speed.py                      # on this processor
    python benchmarks/seq2grid_speed.py --device cuda        # and with the Triton kernel

    map        actions and embeddings to a grid, alone and with its gradients: 64 texts of 100 tokens, 128 wide, 3 x 25 cells
    training   a whole step of S2G-CNN on as many texts: forward, backward, Adam

    step by step         the paper's update, T times over (B, H, W, C)
    closed form, loop    the walk as two operations a step, then one product
    closed form, kernel  the walk as one Triton kernel (CUDA)

Before anything is timed the forms are compared in float64: `difference` is the largest of grids and gradients. Times are medians over
`--repeats` after three runs that do not count. Rows go to benchmarks/results/seq2grid_speed.csv.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from rows import append, provenance
from torch import Tensor

from smidgen.symbolic import seq2grid
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.models import Sizes, make
from smidgen.symbolic.seq2grid import Layout, Seq2Grid, unroll

RESULTS = Path(__file__).parent / "results" / "seq2grid_speed.csv"
COLUMNS = [
    "what", "form", "direction", "ms", "times_faster", "difference", "batch", "time", "dim", "rows", "columns", "device", "commit",
    "machine", "date",
]  # fmt: skip
STEP_BY_STEP, LOOP, KERNEL = "step by step", "closed form, loop", "closed form, kernel"
ROWS, SLOTS = 3, 25


class StepByStep(Seq2Grid):
    """The module by its definition."""

    def layout(self, embeddings: Tensor, mask: Tensor, actions: Tensor | None = None) -> Layout:
        """Without weights, which it does not make."""
        p = self.probabilities(embeddings, mask, actions)
        return Layout(unroll(p, embeddings, self.rows, self.columns), p, p.new_zeros(0))


def as_form(form: str):
    """Where this is open, the closed form walks that way, forward and backward."""
    return mock.patch.object(seq2grid, "walk", seq2grid.walk_steps) if form == LOOP else nullcontext()


def grid(form: str, actions: Tensor, x: Tensor) -> Tensor:
    """The map, in one of its forms."""
    if form == STEP_BY_STEP:
        return unroll(actions, x, ROWS, SLOTS)
    return seq2grid.write(seq2grid.weights(actions, ROWS, SLOTS), x)


def inputs(options: argparse.Namespace, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Actions, embeddings, and a direction to differentiate in."""
    generator = torch.Generator().manual_seed(0)
    shapes = (options.batch, options.time, 3), (options.batch, options.time, options.dim), (options.batch, ROWS, SLOTS, options.dim)
    actions, x, way = (torch.randn(shape, generator=generator, dtype=precision).to(options.device) for shape in shapes)
    return actions.softmax(-1).requires_grad_(), x.requires_grad_(), way


def difference(form: str, options: argparse.Namespace) -> float:
    """Largest difference from the definition, of the grid and of both gradients, in float64."""
    actions, x, way = inputs(options, torch.float64)

    def all_three(name: str) -> list[Tensor]:
        with as_form(name):
            made = grid(name, actions, x)
            return [made, *torch.autograd.grad((made * way).sum(), (actions, x))]

    return max(float((a - b).detach().abs().max()) for a, b in zip(all_three(STEP_BY_STEP), all_three(form), strict=True))


def milliseconds(work: Callable[[], object], options: argparse.Namespace) -> float:
    """Median."""
    taken = []
    for _ in range(3 + options.repeats):
        started = time.perf_counter()
        work()
        if options.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken[3:])


def of_map(form: str, options: argparse.Namespace) -> dict[str, float]:
    """Forward, and forward and backward."""
    actions, x, way = inputs(options, torch.float32)

    @torch.no_grad()
    def forward() -> Tensor:
        return grid(form, actions, x)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad((grid(form, actions, x) * way).sum(), (actions, x))

    with as_form(form):
        return {"forward": milliseconds(forward, options), "forward and backward": milliseconds(both, options)}


def of_training(form: str, options: argparse.Namespace) -> dict[str, float]:
    """A step."""
    torch.manual_seed(0)
    model = make("s2g-cnn", Sizes(258, 258, SLOTS), {"dim": options.dim})
    assert isinstance(model, GridModel)
    if form == STEP_BY_STEP:
        model.module = StepByStep(options.dim, ROWS, SLOTS, model.module.encoder)
    model = model.to(options.device)
    tokens = torch.randint(2, 258, (options.batch, options.time)).to(options.device)
    target = torch.randint(0, 258, (options.batch, SLOTS)).to(options.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)

    def step() -> None:
        with torch.autocast(options.device.type, torch.bfloat16, enabled=options.device.type == "cuda"):
            loss = model.loss(tokens, tokens > 0, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with as_form(form):
        return {"step": milliseconds(step, options)}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch": 64, "time": 100, "dim": 128, "repeats": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    options = arguments()
    forms = [STEP_BY_STEP, LOOP, *([KERNEL] if options.device.type == "cuda" and seq2grid.has_triton() else [])]
    shape = {"batch": options.batch, "time": options.time, "dim": options.dim, "rows": ROWS, "columns": SLOTS, "device": options.device}
    made_by = shape | provenance()
    for what, timed in (("map", of_map), ("training", of_training)):
        slowest: dict[str, float] = {}
        for form in forms:
            error = difference(form, options) if what == "map" else ""
            for direction, ms in timed(form, options).items():
                slowest.setdefault(direction, ms)
                faster = round(slowest[direction] / ms, 1)
                row = {"what": what, "form": form, "direction": direction, "ms": round(ms, 3), "times_faster": faster, "difference": error}
                append(options.results, COLUMNS, [row | made_by])
                print(f"{what:9} {form:20} {direction:21} {ms:9.2f} ms  {faster:6.1f} x  {error}", flush=True)
