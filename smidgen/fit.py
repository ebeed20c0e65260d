"""The training loop of every job that trains: a job brings a model, a loss and batches.

    model, loss(model, batch) -> scalar, batches(i) -> micro-batch i      i = 0, 1, 2, ...

Batches are numbered instead of iterated: of update `step`, process `rank` of P takes the numbers

    i = (step * accumulation + a) * P + rank,    a = 0 .. accumulation - 1

so that a run that goes on from a checkpoint reads on where it stopped, and two processes, or two micro-batches accumulated, do what one
process does with the two of them joined (their losses being means over equally many terms). Torch's random numbers are seeded anew by i
for the same reason: dropout does not depend on what happened before. What a loss draws elsewhere (numpy) has to be seeded by its batch.

`accelerate` spreads it over the devices of `torchrun` or `accelerate launch`. Mixed precision is plain autocast: accelerate keeps one
precision for the life of a process, and we may train twice in one.
"""

import math
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from smidgen.errors import UserError, check_seed
from smidgen.precision import forward_precision
from smidgen.run import PARTIAL, Run

CHECKPOINT = "checkpoint.pt"
ROWS = 500  # losses logged in a run, about
EVALUATIONS = 20  # of a training, where their interval is not given

Loss = Callable[[nn.Module, Any], Tensor]
Batches = Callable[[int], Any]
Evaluate = Callable[[nn.Module], dict[str, Any]]
State = dict[str, Tensor]
Schedule = Literal["cosine", "constant", "steps"]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to train; a command that trains may have these options by inheriting them."""

    steps: int = 1000
    "Updates of the parameters."
    learning_rate: float = 5e-5
    "Of AdamW, for groups that name none."
    schedule: Schedule = "cosine"
    "Of the learning rates after the warm-up; cosine ends at 0, steps falls as the next two say."
    decay: float = 0.5
    "Of schedule steps: what the learning rates are multiplied by, again and again."
    decay_every: int = 10_000
    "Of schedule steps: updates in between; 7 of 10 steps and a decay of 0.1 make the usual single drop."
    warmup: int = 0
    "Updates over which the learning rates grow from 0."
    weight_decay: float = 0.0
    "For groups that name none."
    clip: float | None = 1.0
    "Largest norm of the gradient; none: as it is."
    accumulation: int = 1
    "Micro-batches per update and process."
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    "Of matrix products; auto: bfloat16 where the device has it natively. Parameters stay as they are."
    evaluate_every: int | None = None
    "Updates between evaluations; none: twenty in all. There is one before the first update and one after the last."
    patience: int | None = None
    "Evaluations without a lower held-out loss before training stops; the best state is restored. None: train to the end."
    keep_best: bool = False
    "Restore the best state after training to the end, too."
    checkpoint_every: int | None = None
    "Updates between checkpoints; none: only when interrupted."
    seed: int = 0
    "Of torch's random numbers."
    resume: Path | None = None
    "A checkpoint to go on from, or the folder of its run."

    @classmethod
    def of(cls, options: Any, **others: Any) -> "FitConfig":
        """Of a command's options: those that have the names above, and `others` instead of or beside them."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in vars(options).items() if name in known} | others)

    def check(self, evaluates: bool) -> None:
        """Refuses what cannot work."""
        positive = {"steps": self.steps, "accumulation": self.accumulation, "evaluate-every": self.interval}
        positive |= {"decay": self.decay, "decay-every": self.decay_every}
        optional = {"patience": self.patience, "checkpoint-every": self.checkpoint_every, "clip": self.clip}
        for name, value in (positive | {n: v for n, v in optional.items() if v is not None}).items():
            if value <= 0:
                raise UserError(f"--{name} must be positive, got {value}")
        if self.schedule != "steps" and (self.decay, self.decay_every) != (FitConfig.decay, FitConfig.decay_every):
            raise UserError(f"--decay and --decay-every are of --schedule steps, not of {self.schedule}")
        if not 0 <= self.warmup <= self.steps:
            raise UserError(f"--warmup must be between 0 and the {self.steps} steps, got {self.warmup}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"--learning-rate must be positive, got {self.learning_rate}")
        check_seed(self.seed)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"--weight-decay must not be negative, got {self.weight_decay}")
        if (self.patience is not None or self.keep_best) and not evaluates:
            name = "keep-best" if self.patience is None else "patience"
            raise UserError(f"--{name} needs held-out data to measure; give some, or leave it out")

    @property
    def interval(self) -> int:
        """Updates between evaluations."""
        return max(1, self.steps // EVALUATIONS) if self.evaluate_every is None else self.evaluate_every

    def products(self, device: torch.device) -> torch.dtype:
        """The type of matrix products there."""
        if self.precision == "auto":
            return forward_precision(device)
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.precision]

    def alone(self, **changes: Any) -> "FitConfig":
        """These options, some of them changed, without those that a command has besides."""
        return FitConfig(**{field.name: vars(self)[field.name] for field in fields(FitConfig)} | changes)

    def factor(self, step: int) -> float:
        """Of the learning rates at update `step` = 0, 1, ...: 1 at the end of the warm-up."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "steps":
            return self.decay ** ((step - self.warmup) // self.decay_every)
        return (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2

    def course(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        return {k: v for k, v in asdict(self).items() if k not in ("resume", "checkpoint_every")}


@dataclass
class FitResult:
    """What training did."""

    step: int = 0
    "Updates made."
    kept: int = 0
    "The update after which the model was as it is now."
    stopped: Literal["steps", "patience"] = "steps"
    rows: list[dict[str, Any]] = field(default_factory=list)
    "What was logged: {step, loss, learning_rate, gradient_norm}, and {step, held_out, ...} as `evaluate` returned it."

    def evaluation(self, step: int) -> dict[str, Any]:
        """What `evaluate` returned after that update."""
        return next(row for row in self.rows if row["step"] == step and "learning_rate" not in row)


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    config: FitConfig,
    run: Run,
    *,
    groups: list[dict[str, Any]] | None = None,
    evaluate: Evaluate | None = None,
) -> FitResult:
    """Trains `model` in place, by AdamW.

    `groups` are parameter groups as torch.optim has them (`params`, and `lr`, `weight_decay`, `betas`, ... where they differ);
    parameters in none of them are frozen meanwhile. Without groups, every parameter that requires a gradient is trained. Layers stay in
    the mode, training or not, they are in. `evaluate(model)` returns figures for the log, `held_out` among them if there is patience; it
    is called in evaluation mode, without gradients.
    """
    config.check(evaluate is not None)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}] if groups is None else groups
    groups = [group | {"params": list(group["params"])} for group in groups]
    device = next(model.parameters()).device
    with _only(model, groups), torch.random.fork_rng([device] if device.type == "cuda" else []), _interruptible() as interrupted:
        return _Fit(model, groups, config, run, device).train(loss, batches, evaluate, interrupted)


class _Fit:
    """One training and all of its state; what a checkpoint holds."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: FitConfig, run: Run, device: torch.device) -> None:
        self.model, self.config, self.run, self.device = model, config, run, device
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=device.type == "cuda")
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.accelerator = _accelerator(device)
        self.wrapped = self.accelerator.prepare(model)
        self.precision = config.products(device)
        self.result = FitResult()
        self.best: dict[str, Any] = {"held_out": math.inf, "step": 0, "stale": 0, "state": {}}
        if config.resume is not None:
            self.restore(config.resume)

    def train(self, loss: Loss, batches: Batches, evaluate: Evaluate | None, interrupted: threading.Event) -> FitResult:
        """All updates that are left."""
        config, result = self.config, self.result
        if evaluate is not None and result.step == 0 and not result.rows:
            self.evaluate(evaluate)
        for step in self.run.track(range(result.step, config.steps), "training", config.steps - result.step):
            if result.stopped == "patience":
                break
            stop = self.update(step, loss, batches, interrupted)
            result.step = step + 1
            if evaluate is not None and (result.step % config.interval == 0 or result.step == config.steps):
                self.evaluate(evaluate)
            if stop or (config.checkpoint_every is not None and result.step % config.checkpoint_every == 0):
                self.save()
            if stop:
                raise UserError(
                    f"interrupted after {result.step} of {config.steps} steps; repeat the command with --resume {self.run.folder} to go on"
                )
        result.kept = result.step
        if config.patience is not None or config.keep_best:
            _load(self.state(), self.best["state"])
            result.kept = self.best["step"]
        return result

    def update(self, step: int, loss: Loss, batches: Batches, interrupted: threading.Event) -> bool:
        """One step of the optimizer; whether some process was interrupted."""
        config, accelerator = self.config, self.accelerator
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * config.factor(step)
        total = torch.zeros((), device=self.device)
        for a in range(config.accumulation):
            i = (step * config.accumulation + a) * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(seed_of(config.seed, i))
            last = a == config.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                    value = loss(self.wrapped, _moved(batches(i), self.device)) / config.accumulation
                accelerator.backward(value)
            total += value.detach().float()
        norm = accelerator.clip_grad_norm_(self.parameters, math.inf if config.clip is None else config.clip)
        told = torch.stack([total, total.new_tensor(float(interrupted.is_set())), norm.float()])  # at once: each answer is a wait
        mean, stop, norm = accelerator.reduce(told, "mean").tolist()
        rate = config.learning_rate * config.factor(step)
        for name, figure in (("loss", mean), ("gradient's norm", norm)):
            if not math.isfinite(figure):
                raise UserError(
                    f"training diverged: the {name} is {figure} at step {step + 1}, learning rate {rate:g}; lower the learning rate, "
                    "lengthen the warm-up, try precision float32, or look for bad training data"
                )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if step % max(1, config.steps // ROWS) == 0:
            self.log(step=step + 1, loss=mean, learning_rate=rate, gradient_norm=norm)
        return stop > 0

    @torch.no_grad()
    def evaluate(self, evaluate: Evaluate) -> None:
        """Logs the figures; keeps the state if it is the best so far."""
        from accelerate.utils import broadcast_object_list

        modes = {m: m.training for m in self.model.modules()}
        self.model.eval()
        (figures,) = broadcast_object_list([evaluate(self.model)])  # the first process's: all have to take the same decision
        for m, training in modes.items():
            m.training = training
        self.log(step=self.result.step, **figures)
        if self.config.patience is None and not self.config.keep_best:
            return
        if figures["held_out"] < self.best["held_out"]:
            state = {name: t.detach().cpu().clone() for name, t in self.state().items()}
            self.best = {"held_out": figures["held_out"], "step": self.result.step, "stale": 0, "state": state}
        else:
            self.best["stale"] += 1
            patience = self.config.patience
            self.result.stopped = "patience" if patience is not None and self.best["stale"] >= patience else "steps"

    def log(self, **row: Any) -> None:
        """A row of the run, kept for checkpoints: who resumes starts an empty file."""
        self.run.log(**row)
        self.result.rows.append(row)

    def state(self) -> State:
        """What training changes: trained parameters, and buffers."""
        return self.trained | dict(self.model.named_buffers())

    def save(self) -> None:
        """A checkpoint in the run's folder, of the first process; complete or not there."""
        if not self.accelerator.is_main_process:
            return
        partial = self.run.folder / (CHECKPOINT + PARTIAL)
        content = {
            "course": self.config.course(),
            "state": {name: t.detach() for name, t in self.state().items()},
            "optimizer": self.optimizer.state_dict(),
            "result": asdict(self.result),
            "best": self.best,
        }
        torch.save(content, partial)
        partial.replace(self.run.folder / CHECKPOINT)

    def restore(self, path: Path) -> None:
        """Goes back to a checkpoint."""
        path = path / CHECKPOINT if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"--resume: no checkpoint {path}; the run was finished, or stopped before its first checkpoint")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            course, state = content["course"], content["state"]
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise UserError(f"--resume: {path} is not a checkpoint, or damaged") from error
        for name, value in self.config.course().items():
            if course.get(name) != value:
                raise UserError(f"--resume: {path} is of a run with {name} {course.get(name)}, not {value}; repeat its options")
        shapes = {name: t.shape for name, t in self.state().items()}
        if {name: t.shape for name, t in state.items()} != shapes:
            raise UserError(f"--resume: {path} is of another model or other trained parameters; repeat its options")
        _load(self.state(), state)
        self.optimizer.load_state_dict(content["optimizer"])
        self.best = content["best"]
        self.result = FitResult(**content["result"])
        for row in self.result.rows:
            self.run.log(**row)


def shuffled(data: Shaped[Tensor, "*shape"], size: int, seed: int = 0) -> Batches:
    """Batches of `size` for `fit`: endless, every epoch in an order of its own, chosen by the seed."""
    if size < 1 or size > len(data):
        raise UserError(f"a batch of {size} cannot be drawn from {len(data)} training examples; use a smaller --batch or more data")

    @lru_cache(2)  # a batch may lie across two epochs
    def order(epoch: int) -> list[int]:
        return torch.randperm(len(data), generator=torch.Generator().manual_seed(seed_of(seed, epoch))).tolist()

    def batch(i: int) -> Tensor:
        return data[[order(p // len(data))[p % len(data)] for p in range(i * size, (i + 1) * size)]]

    return batch


def seed_of(seed: int, i: int) -> int:
    """A seed of its own for every i; torch's generator on the processor reads 32 bits of it."""
    return (seed * 2_654_435_761 + i) % 2**32


def _accelerator(device: torch.device) -> Any:
    """Of this fit; accelerate remembers the device of the first one, which another fit in one process need not share."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if os.environ.get("WORLD_SIZE", "1") == "1":
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    if accelerator.device.type != device.type:
        raise UserError(f"the model is on {device}, but accelerate trains on {accelerator.device}; choose that --device")
    return accelerator


def _moved(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)


@torch.no_grad()
def _load(target: State, source: State) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


@contextmanager
def _only(model: nn.Module, groups: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Freezes all parameters but those in the groups."""
    before = {p: p.requires_grad for p in model.parameters()}
    chosen = [p for group in groups for p in group["params"]]
    if not chosen:
        raise UserError("there is nothing to train: no parameter is in a group")
    model.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, required in before.items():
            p.requires_grad_(required)
            p.grad = None


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, to be acted upon between two steps; a second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield event
        return

    def interrupt(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
