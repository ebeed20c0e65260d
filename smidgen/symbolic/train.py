"""`smidgen symbolic train`: learn a task from questions and answers.

    smidgen symbolic train --task word-problem --model s2g-cnn --steps 64000

The paper's recipe is the default, but for three things: learning rates fall to 0 along a cosine, batches have a number of questions instead
of one of tokens, and the state kept is the one that was best on the task's dev split (with --sharpen: best with every token at one place).
The splits of the tests are not touched: `smidgen symbolic evaluate` is for them.
"""

import os
import time
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from cyclopts import Parameter
from torch import nn

from smidgen.distributed import is_first_process, own_device, process_run
from smidgen.errors import UserError
from smidgen.fit import CHECKPOINT, FitConfig, FitResult, fit
from smidgen.precision import pick_device
from smidgen.run import Run
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.models import make, sizes_of
from smidgen.symbolic.pool import Pool, Training
from smidgen.symbolic.predict import predict, right
from smidgen.symbolic.replay import has_fixed_shapes, replayed
from smidgen.symbolic.seq2grid import hard_layouts
from smidgen.symbolic.settle import CARD, settle
from smidgen.symbolic.stored import TRAINED, Description, save
from smidgen.symbolic.tasks import Batch, Task, open_task

EVALUATIONS = 20  # of a training, where their interval is not given
VALIDATION = 1  # added to the seed for the questions of validation
BUCKETS = 32  # of questions read as words, whose lengths differ a lot
BETAS = {False: (0.85, 0.997), True: (0.9, 0.98)}  # of Adam, for sequences and for labels
TIE = 1e-5  # weight of doubt among states with as many errors
EPSILON = {False: 1e-6, True: 1e-9}


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen symbolic train`."""

    _: KW_ONLY
    task: str
    "number-sequence, word-problem, addition, subtraction, program, babi:N, babi:joint, or a FILE.jsonl of {input, target}."
    model: str | None = None
    "By name, a wrong one is answered with the list; none: s2g-cnn for sequences, s2g-textcnn for labels."
    option: dict[str, int | float | bool | str] = field(default_factory=dict)
    "Of the model, as --option.carry true; a wrong one is answered with the list."
    data: Path | None = None
    "The bAbI archive or folder."
    questions: int = 1_000_000
    "Training questions made beforehand; of a task that has an end, all it has at most."
    steps: int = 64_000
    "Updates."
    batch: int = 32
    "Questions per update and process."
    learning_rate: float = 1e-3
    "Of Adam."
    schedule: Literal["cosine", "constant"] = "cosine"
    "Of the learning rate."
    warmup: int = 0
    "Updates over which the learning rate grows from 0."
    weight_decay: float = 0.0
    "Of all parameters."
    clip: float | None = 2.0
    "Largest norm of the gradient; none: as it is."
    accumulation: int = 1
    "Batches per update and process."
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    "Of the network over the grid; auto: bfloat16 where the device has it natively. What lays the grid out stays float32."
    buckets: int | None = None
    "Batches are of one of so many parts of like length; none: 32 for questions in words, else 1."
    curriculum: float = 0.0
    "Share of the training over which the longest questions grow from the shortest tenth to all."
    sharpen: float = 0.0
    "Weight, at the end, of the actions' entropy: makes layouts crisp."
    compile: bool = False
    "Fuse the operations of the grid network (torch.compile): pays in long runs on a GPU, after a minute of compiling."
    graph: bool = False
    "Launch the grid network of s2g-cnn and s2g-acnn, the loss of gru-attention and transformers, as a CUDA graph: pays in small models."
    validate_every: int | None = None
    "Updates between validations; none: twenty in all."
    validation_questions: int = 500
    "Questions of a validation, from the dev split."
    patience: int | None = None
    "Validations without a higher accuracy before training stops; none: train to the end. The best state is kept either way."
    checkpoint_every: int | None = None
    "Updates between checkpoints; none: only when interrupted."
    resume: Path | None = None
    "Folder of an unfinished run to go on from, with its options."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/symbolic/train."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Chooses the first parameters and the questions."

    def check(self) -> None:
        """Refuses what cannot work."""
        positive = {"questions": self.questions, "batch": self.batch, "validation-questions": self.validation_questions}
        for name, value in (positive | ({} if self.buckets is None else {"buckets": self.buckets})).items():
            if value < 1:
                raise UserError(f"--{name} must be positive, got {value}")
        if not 0 <= self.curriculum <= 1:
            raise UserError(f"--curriculum is a share of the training, 0 to 1, got {self.curriculum}")
        if not 0 <= self.sharpen < float("inf"):
            raise UserError(f"--sharpen must not be negative, got {self.sharpen}")
        if self.graph and self.compile:
            raise UserError("--graph and --compile exclude each other; take one")
        if self.graph and self.accumulation > 1:
            raise UserError("--graph keeps one gradient; use --accumulation 1 and a larger --batch")
        self.fit().check(evaluates=True)

    def fit(self) -> FitConfig:
        """What the training loop has to know; it keeps the best state only if it has patience, so it has enough for all validations."""
        return FitConfig.of(
            self,
            evaluate_every=max(1, self.steps // EVALUATIONS) if self.validate_every is None else self.validate_every,
            patience=self.steps + 2 if self.patience is None else self.patience,
        )


def command(config: Config) -> dict[str, Any] | None:
    """Train a model on a task; under torchrun, on many devices."""
    label = f"{config.model or 's2g'}-{Path(config.task).stem.replace(':', '-')}"
    with process_run("symbolic train", replace(config, resume=None), config.output, label) as run:
        metrics = main(config, run)
    return metrics if is_first_process() else None


def main(config: Config, run: Run) -> dict[str, Any]:
    """Draw, make, train, keep the best, save."""
    config.check()
    device = own_device(pick_device(config.device))
    task = open_task(config.task, config.data)
    config = replace(config, model=config.model or ("s2g-textcnn" if task.classifies else "s2g-cnn"))
    assert config.model is not None
    torch.manual_seed(config.seed)
    model = make(config.model, sizes_of(task), config.option).to(device)
    refuse_options(config, model, device)
    questions, held_out = drawn(task, "train", config.questions, config.seed), validation(task, config)
    run.say(f"{len(questions):,} training questions of {task.name}, up to {questions.lengths.max()} tokens; {len(held_out):,} to validate")

    started = time.monotonic()
    result = train(model, task, questions, held_out, config, run)
    seconds = time.monotonic() - started

    first, kept = result.evaluation(0), result.evaluation(result.kept)
    slots = None if task.classifies else task.slots
    longest = int(questions.lengths.max())
    folder = run.partial(TRAINED)
    description = Description(config.model, config.task, task.tokens, task.answers, slots, longest, dict(config.option))
    save(folder, model, description)
    (folder / CARD).write_text(settle(model, description.name, task, config.seed).text(), encoding="utf-8")
    run.keep(folder)
    (run.folder / CHECKPOINT).unlink(missing_ok=True)
    layout = {f"validation_{name}": kept[name] for name in ("hard", "certainty") if name in kept}
    return run.finish(
        validation_accuracy=kept["accuracy"],
        validation_accuracy_before=first["accuracy"],
        **layout,
        validation_questions=len(held_out),
        questions=len(questions),
        longest_question=longest,
        task=task.name,
        model=config.model,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps=result.step,
        batch=config.batch,
        kept_step=result.kept,
        stopped=result.stopped,
        train_seconds=seconds,
        seed=config.seed,
        device=str(device),
    )


def refuse_options(config: Config, model: nn.Module, device: torch.device) -> None:
    """There is nothing to sharpen where no actions are learned, and nothing to fuse or to replay without a grid."""
    if config.compile and not isinstance(model, GridModel):
        raise UserError(f"--compile is for s2g models, not for {config.model}")
    if config.graph and not has_fixed_shapes(model):
        raise UserError(f"--graph is for s2g-cnn, s2g-acnn, gru-attention and transformers, not for {config.model}")
    if config.graph and (device.type != "cuda" or os.environ.get("WORLD_SIZE", "1") != "1"):
        raise UserError("--graph needs one CUDA device; leave it out")
    if config.sharpen and not learns_actions(model):
        raise UserError(
            f"--sharpen is for models that learn actions, not for {config.model}{' with guidance' * ('s2g' in str(config.model))}"
        )


def drawn(task: Task, split: str, count: int, seed: int) -> Batch:
    """Questions of a split: so many, or all it has."""
    size = task.splits.get(split)
    return task.sample(split, count if size is None else min(count, size), seed)


def validation(task: Task, config: Config) -> Batch:
    """The questions of every validation."""
    return drawn(task, "dev", config.validation_questions, config.seed + VALIDATION)


def train(model: nn.Module, task: Task, questions: Batch, held_out: Batch, config: Config, run: Run) -> FitResult:
    """Trains a model in place; it ends in the state that was best on the held-out questions."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    buckets = config.buckets or (BUCKETS if task.tokens.unit == "words" else 1)
    pool = Pool(
        questions,
        model.columns,  # pyright: ignore  a model of MODELS
        config.batch,
        config.steps * config.accumulation * processes,
        next(model.parameters()).device,
        seed=config.seed,
        buckets=buckets,
        curriculum=config.curriculum,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "betas": BETAS[task.classifies], "eps": EPSILON[task.classifies]}]

    def measure(training: nn.Module) -> dict[str, Any]:
        assert isinstance(training, Training)
        # other sizes than in training would each be compiled; the compiler takes seconds to import
        with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
            return figures(training.model, held_out, crisp=config.sharpen > 0)

    if config.compile and isinstance(model, GridModel):
        model.network.compile(dynamic=False)
    training = Training(model.train(), config.sharpen)
    with replayed(training, questions, config.batch, config.fit()) if config.graph else nullcontext():
        result = fit(training, lambda wrapped, batch: wrapped(batch), pool, config.fit(), run, groups=groups, evaluate=measure)
    model.eval()
    return result


def figures(model: nn.Module, questions: Batch, crisp: bool = False) -> dict[str, float]:
    """What the log has of a validation.

    accuracy    share of answers right in every symbol
    hard        the same, every token at the place its most probable actions give it; of models that learn actions
    certainty   mean probability of these actions: 1 is a crisp layout
    held_out    what the best state has least of: the share of errors, of hard ones if `crisp`; among equals the surer answers win
    """
    answers = predict(model, questions)
    found = {"accuracy": float(right(answers, questions).mean())}
    if learns_actions(model):
        with hard_layouts(model.module):
            found["hard"] = float(right(predict(model, questions), questions).mean())
        found["certainty"] = certainty(model, questions)
    errors = 1 - (found["hard"] if crisp else found["accuracy"])
    return {"held_out": errors + TIE * float(1 - np.exp(answers.log_probability).mean())} | found


def learns_actions(model: nn.Module) -> TypeGuard[GridModel]:
    """Whether it has a layout of its own."""
    return isinstance(model, GridModel) and not model.guided


@torch.no_grad()
def certainty(model: GridModel, questions: Batch, size: int = 512) -> float:
    """Mean over tokens of the probability of the most probable action."""
    device = next(model.parameters()).device
    total = 0.0
    for part in (questions.take(np.arange(i, min(i + size, len(questions)))) for i in range(0, len(questions), size)):
        tokens, mask = (torch.from_numpy(array).to(device) for array in (part.tokens, part.mask))
        total += float(model.module.probabilities(model.embedding(tokens, mask), mask).amax(-1)[mask].sum())
    return total / int(questions.mask.sum())
