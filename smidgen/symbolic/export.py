"""`smidgen symbolic export`: a trained model as one ONNX file that `smidgen symbolic solve` runs without torch.

The file holds what a device needs: the graph (`graph.py` draws its inputs and outputs) and, in its metadata, the card with the vocabulary,
the rules and the calibration, which are settled anew for the layout it is exported with:

    hard    every token's likeliest action counts: two counters, what the paper draws
    soft    the expected grid that was trained, by a recurrence over as many numbers as the grid has places
    auto    hard, if it answers as many questions right as soft does, to within half a percent; else soft

The written file then answers `--questions` of the task beside torch, which says how often the two agree and how long one takes.
"""

import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from cyclopts import Parameter
from torch import nn

from smidgen.errors import UserError, check_seed
from smidgen.run import Run
from smidgen.symbolic.answering import decide, text_of
from smidgen.symbolic.card import Card
from smidgen.symbolic.graph import Mode, build
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.predict import predict, right
from smidgen.symbolic.runtime import ARTIFACT, CARD_KEY, FILE, open_exported
from smidgen.symbolic.settle import Trained, drawn, settle
from smidgen.symbolic.stored import describe, load
from smidgen.symbolic.tasks import Task, open_task

LOST = 0.005  # share of right answers that hard layouts may cost


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen symbolic export`."""

    model: Path
    "A run of smidgen symbolic train."
    _: KW_ONLY
    to: Literal["onnx"] = "onnx"
    "Format."
    bits: Literal[8] | None = None
    "Of the weights; none: float32."
    layout: Literal["auto", "hard", "soft"] = "auto"
    "Whether tokens are written by their likeliest action or by all three."
    data: Path | None = None
    "The bAbI archive or folder, for a model of bAbI."
    questions: int = 1000
    "Of the test split, answered by the file and by torch."
    risk: float = 0.05
    "Share of wrong answers allowed among those given."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/symbolic/export."
    seed: int = 0
    "Chooses the questions."

    def check(self) -> None:
        """Refuses what cannot work."""
        if self.questions < 1:
            raise UserError(f"--questions must be positive, got {self.questions}")
        if not 0 < self.risk < 1:
            raise UserError(f"--risk is a share of answers, between 0 and 1, got {self.risk}")
        check_seed(self.seed)


def command(config: Config) -> dict[str, Any]:
    """Write a trained model as ONNX and compare it with torch."""
    with Run("symbolic export", config, config.output, config.model.stem) as run:
        return main(config, run)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Load, choose the layout, settle, write, compare."""
    config.check()
    description = describe(config.model)
    model = load(config.model)
    model = exportable(model, description.name)
    task = open_task(description.task, config.data)
    accuracy = on_dev(model, task, config.seed)
    layout = config.layout if config.layout != "auto" else better(accuracy)
    run.say(f"right on dev questions: soft {accuracy['soft']:.1%}, hard {accuracy['hard']:.1%}; exported {layout}")
    model.module.mode = layout
    card = settle(model, description.name, task, config.seed, config.risk)
    folder = run.partial(ARTIFACT)
    write(folder / FILE, model, layout, card, config.bits == 8)
    run.keep(folder)
    figures = compared(run, model, card, task, config)
    return run.finish(
        **figures,
        size_bytes=(run.folder / ARTIFACT / FILE).stat().st_size,
        bits=config.bits or 32,
        layout=layout,
        dev_accuracy_soft=accuracy["soft"],
        dev_accuracy_hard=accuracy["hard"],
        rules=len(card.rules),
        task=task.name,
        model=description.name,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def exportable(model: nn.Module, name: str) -> GridModel:
    """The model, if a file can hold it."""
    if not isinstance(model, GridModel) or model.guided:
        kind = "a guided model" if isinstance(model, GridModel) else name
        raise UserError(f"only models that lay questions out by themselves are exported (s2g-cnn, s2g-acnn, s2g-textcnn), not {kind}")
    return model


def on_dev(model: GridModel, task: Task, seed: int) -> dict[Mode, float]:
    """Share of dev questions answered right, by layout; the model is left in the last one."""
    batch, found = task.encode(drawn(task, "dev", 1000, seed)), {}
    for mode in get_args(Mode):
        model.module.mode = mode
        found[mode] = float(right(predict(model, batch), batch).mean())
    return found


def better(accuracy: dict[Mode, float]) -> Mode:
    """Hard, which costs a device less, unless it answers worse."""
    return "hard" if accuracy["hard"] >= accuracy["soft"] - LOST else "soft"


def write(path: Path, model: GridModel, layout: Mode, card: Card, eight_bits: bool) -> None:
    """The file, the card inside it."""
    try:
        import onnx
    except ImportError as error:
        raise UserError("exporting needs the packages onnx and onnxruntime: pip install 'smidgen[onnx]'") from error
    graph = build(model, layout, eight_bits)
    graph.metadata_props.add(key=CARD_KEY, value=card.text())
    onnx.save(graph, path)


def compared(run: Run, model: GridModel, card: Card, task: Task, config: Config) -> dict[str, Any]:
    """The written file beside torch, question by question, on one thread.

    agreement            share of questions of which both networks say the same
    agreement_decided    share of which `solve` makes the same, an answer or none
    """
    exported = open_exported(run.folder / ARTIFACT / FILE, threads=1)
    split = "id" if "id" in task.splits else "dev"
    examples = drawn(task, split, config.questions, config.seed)
    batch = task.encode(examples)
    theirs = Trained(model, card).many(batch)
    same, alike, correct, seconds = 0, 0, 0, []
    for i in run.track(range(len(batch)), "questions", len(batch)):
        tokens, question = batch.tokens[i, : batch.lengths[i]], examples.inputs[i]
        started = time.perf_counter()
        ours = exported(tokens)
        seconds.append(time.perf_counter() - started)
        same += text_of(ours, card) == text_of(theirs[i], card)
        alike += decide(question, ours, card).answer == decide(question, theirs[i], card).answer
        correct += text_of(ours, card) == examples.targets[i]
    return {
        "agreement": same / len(batch),
        "agreement_decided": alike / len(batch),
        "accuracy": correct / len(batch),
        "latency_ms_p50": 1000 * float(np.median(seconds)),
        "latency_ms_p95": 1000 * float(np.quantile(seconds, 0.95)),
        "questions": len(batch),
        "split": split,
    }
