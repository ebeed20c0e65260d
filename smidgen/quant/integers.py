"""`smidgen quantize --activations`: a language model whose linear layers run on integers, weights and inputs both.

    factors     a method finds factors per channel block by block (transforms/); min-max and mse find none
    ranges      of every input, from what the calibration text shows, as the factors leave it
    finetune    Quadapter's second phase: factors and ranges follow the task's loss, weights stay as they are
    fold        factors move into norms and weights; what is left has the float model's shape and nothing more to compute
    rounding    weights to the nearest code, or by GPTQ or BoA on the inputs as the quantizers leave them, block by block
    onnx        8-bit and 4-bit codes between quantizers, for ONNX Runtime's integer kernels

Perplexity `after` is measured in ONNX Runtime where the artifact is written, and of the simulation beside it.
"""

import copy
import time
from collections.abc import Callable
from importlib.util import find_spec
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.fit import FitConfig
from smidgen.grid import Narrow
from smidgen.precision import forward_precision, pick_device
from smidgen.quant.activations import clipping
from smidgen.quant.blocks import decoder_list, family_of, walk, widest
from smidgen.quant.calibrate import Calibration
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.evaluate import mean_loss, perplexity
from smidgen.quant.export.onnx import FAMILIES
from smidgen.quant.export.onnx_graph import library
from smidgen.quant.memory import peak_bytes, reset_peak
from smidgen.quant.qat import exact, log_reaches
from smidgen.quant.simulate import Activation, QuantLinear, Scheme, install, restore
from smidgen.quant.solve import Grids, quantize
from smidgen.quant.solvers import BOA, GPTQ, AdaRound
from smidgen.quant.starts import Start
from smidgen.quant.static import in_runtime, written
from smidgen.quant.training import EXACT, measuring, split, train
from smidgen.quant.transforms.factors import fold
from smidgen.quant.transforms.quadapter import centre, finetune
from smidgen.report import write_report
from smidgen.run import Run
from smidgen.texts import windows

if TYPE_CHECKING:
    from smidgen.quant.quantize import Config

METHODS = ("min-max", "mse", "clip", "smoothquant", "equalize", "quadapter")
HELD_OUT = 0.125  # of the calibration sequences: to choose and to stop by
EVALUATIONS = 5  # of phase 2
HIGH_PRECISION = "embeddings and head (float16 in the artifact), norms, biases, attention scores and softmax (float32)"


def main(config: "Config", run: Run) -> dict[str, Any]:
    """Check, find factors and ranges, fold, write, measure, report."""
    device = pick_device(config.device)
    source = Checkpoint.open(config.model)
    exports = check(config, source.skeleton(device))
    data = Calibration(config.calibration, config.sequences, config.length, config.seed)
    texts = {text: windows(text, source.tokenizer(), config.length, config.eval_windows) for text in config.evaluate}
    tokens = data.tokens(source, widest(source.skeleton(device)), device, run)
    learnt, held_out = split(tokens, HELD_OUT) if len(tokens) > 1 else (tokens, tokens)

    reset_peak(device)
    started = time.monotonic()
    factors = start_of(config).factors(source, learnt, scheme_of(config), run, device, config.factors)
    model = exact(source, device)
    perplexity_float = {text: perplexity(model, t, run, f"{text} before", EXACT, recorded=True) for text, t in texts.items()}
    teacher = copy.deepcopy(model) if config.finetune_share else None
    layers = start_of(config).simulated(model, learnt, scheme_of(config), factors)
    before = clipping(model, layers, held_out)
    kept = finetuned(config, model, layers, learnt, held_out, texts, teacher, run) if config.finetune else None
    log_reaches(run, before, clipping(model, layers, held_out), scheme_of(config).activations)
    fold(model, layers, source.dtype())
    if config.rounding != "nearest":
        rounded(config, model, layers, learnt, source.name, run)
    seconds, peak = time.monotonic() - started, peak_bytes(device)

    simulated = {text: perplexity(model, t, run, f"{text} simulated", EXACT, recorded=True) for text, t in texts.items()}
    lost = mean_loss(model, held_out, EXACT, recorded=True)
    folder = written(source, model, layers, run) if exports else None
    after = simulated if folder is None else {text: in_runtime(folder, t, run, text) for text, t in texts.items()}
    metrics = run.finish(
        **described(config),
        sites=list(start_of(config).kinds(source.skeleton(device))),
        kept_step=kept,
        perplexity=after,
        perplexity_simulated=simulated,
        perplexity_float=perplexity_float,
        held_out=lost,
        size_bytes=None if folder is None else sum(f.stat().st_size for f in folder.glob("model.onnx*")),
        written={} if folder is None else {"onnx": {"folder": folder.name}},
        quantize_seconds=seconds,
        peak_memory_bytes=peak,
        tokens=learnt.numel(),
        held_out_tokens=held_out.numel(),
        model=source.name,
        device=str(device),
    )
    run.say(f"report: {write_report([run.folder])}")
    return metrics


def scheme_of(config: "Config") -> Scheme:
    """What is quantized."""
    assert config.activations is not None
    return Scheme(config.weight_bits(), config.activations, config.group)


def start_of(config: "Config") -> Start:
    """The method with its options; `check` let no other pass."""
    return Start(config.method, config.sites, config.clip, config.smoothquant, config.quadapter)  # pyright: ignore[reportArgumentType]


def described(config: "Config") -> dict[str, Any]:
    """What was done, for metrics.json."""
    names = ("method", "activations", "group", "clip", "finetune", "finetune_share", "rounding", "seed")
    return {name: vars(config)[name] for name in names} | {
        "bits": config.weight_bits(),
        "symmetric": True,
        "high_precision": HIGH_PRECISION,
    }


def check(config: "Config", skeleton: PreTrainedModel) -> bool:
    """Refuses what cannot work before any work starts; whether an artifact is to be written."""
    assert config.activations is not None
    if config.method not in METHODS:
        raise UserError(f"--method {config.method} quantizes weights alone; with --activations use {', '.join(METHODS)}")
    for option, bits in (("activations", config.activations), ("weights", config.weight_bits())):
        if not 2 <= bits <= 8:
            raise UserError(f"--{option} must lie between 2 and 8, got {bits}")
    check_start(config)
    for option in ("format", "target_bpw", "stats", "rotate", "seeds", "inputs", "symmetric", "scale_dtype"):
        if vars(config)[option] != vars(type(config))[option]:
            raise UserError(f"--{option.replace('_', '-')} does not go with --activations; leave it out")
    check_rounding(config, skeleton)
    start_of(config).kinds(skeleton)
    return exported(config, skeleton)


def check_start(config: "Config") -> None:
    """Refuses options that another method, or none, has."""
    if config.clip and config.method not in ("smoothquant", "equalize"):
        raise UserError("--clip is for --method smoothquant and equalize; use --method clip, and quadapter has --quadapter.clip")
    if config.factors is not None and config.method in ("min-max", "mse"):
        raise UserError(f"--factors are of methods that go block by block, not of {config.method}")
    if config.finetune < 0 or (config.finetune and config.method != "quadapter"):
        raise UserError("--finetune is the number of steps of --method quadapter's second phase")
    if config.finetune and config.sequences < 2:
        raise UserError("--finetune holds calibration sequences out to stop by; raise --sequences")
    if config.finetune_share and not config.finetune:
        raise UserError("--finetune-share is of the second phase's loss; give its steps with --finetune")
    if not 0 <= config.finetune_share <= 1:
        raise UserError(f"--finetune-share must be between 0 and 1, got {config.finetune_share}")
    if config.finetune_batch < 1:
        raise UserError(f"--finetune-batch must be positive, got {config.finetune_batch}")


def check_rounding(config: "Config", skeleton: PreTrainedModel) -> None:
    """Refuses a way to round weights that does not suit the model or the grid."""
    if config.rounding != "nearest" and config.group is not None:
        raise UserError("--rounding gptq and boa have a scale per row here; leave out --group")
    if config.rounding == "boa" and family_of(skeleton) is None:
        raise UserError(f"--rounding boa does not know the attention of '{skeleton.config.model_type}' models; use gptq")


def exported(config: "Config", skeleton: PreTrainedModel) -> bool:
    """Whether to write an artifact; a UserError if it is asked for and cannot be."""
    if config.export not in ("auto", "none", "onnx"):
        raise UserError(f"models with quantized activations are written as onnx, not {config.export}; use --export onnx or none")
    if config.export == "none" or (config.export == "auto" and config.group is not None):
        return False
    if config.group is not None:
        raise UserError("integer kernels have a scale per row of weights; leave out --group, or use --export none")
    library()
    if skeleton.config.model_type not in FAMILIES and find_spec("onnxscript") is None:
        raise UserError(f"writing {skeleton.config.model_type} models as onnx needs the package onnxscript: pip install 'smidgen[onnx]'")
    return True


def finetuned(
    config: "Config",
    model: PreTrainedModel,
    layers: dict[str, QuantLinear],
    learnt: Int[Tensor, "a length"],
    held_out: Int[Tensor, "b length"],
    texts: dict[str, Int[Tensor, "n length"]],
    teacher: PreTrainedModel | None,
    run: Run,
) -> int:
    """Phase 2; the step whose state was kept."""
    fit = FitConfig(
        steps=config.finetune,
        learning_rate=config.finetune_rate,
        precision="float32",
        evaluate_every=max(1, config.finetune // EVALUATIONS),
        patience=EVALUATIONS,
        seed=config.seed,
    )
    groups, batch = finetune(model, layers, config.finetune_rate), min(config.finetune_batch, len(learnt))
    result = train(model, groups, learnt, fit, run, batch, teacher, config.finetune_share, measuring(model, held_out, texts))
    centre(layers)
    return result.kept


def rounded(
    config: "Config", model: PreTrainedModel, layers: dict[str, QuantLinear], tokens: Int[Tensor, "n length"], name: str, run: Run
) -> None:
    """Rounds every weight by GPTQ or BoA, given what the quantized layers before it send, its own input quantized as well."""
    solver = {"gptq": GPTQ(), "boa": BOA(), "adaround": AdaRound()}[config.rounding]
    restore(model, layers)
    folder = run.partial("folded")
    model.save_pretrained(folder)
    folded = Checkpoint(folder, name)
    blocks = walk(folded, folded.skeleton(model.device), tokens, model.device, forward_precision(model.device))
    for block in run.track(blocks, "rounding", len(decoder_list(model)[1])):
        for full, quant in layers.items():
            if full.startswith(f"{block.name}."):
                layer = block.module.get_submodule(full.removeprefix(f"{block.name}."))
                layer.register_forward_pre_hook(quantizing(quant.activation))
        for full, q in quantize(block, solver, Grids(Narrow(config.weight_bits(), symmetric=True)), torch.float32, run).items():
            layers[full].take(q)
    rmtree(folder)
    install(model, layers)


def quantizing(activation: Activation) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that puts the quantizer before a layer."""
    return lambda module, inputs: (activation(inputs[0]), *inputs[1:])
