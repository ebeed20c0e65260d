"""`smidgen quantize --activations`: a language model whose linear layers run on integers, weights and inputs both.

    factors     a method finds factors per channel block by block (transforms/); min-max and mse find none
    ranges      of every input, from what the calibration text shows, as the factors leave it
    finetune    Quadapter's second phase: factors and ranges follow the task's loss, weights stay as they are
    fold        factors move into norms and weights; what is left has the float model's shape and nothing more to compute
    rounding    weights to the nearest code, or by GPTQ or BoA on the inputs as the quantizers leave them, block by block
    onnx        8-bit and 4-bit codes between quantizers, for ONNX Runtime's integer kernels

Perplexity `after` is measured in ONNX Runtime where the artifact is written, and of the simulation beside it.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.fit import FitConfig
from smidgen.grid import Narrow
from smidgen.precision import forward_precision, pick_device
from smidgen.quant.activations import fix_ranges
from smidgen.quant.blocks import decoder_list, family_of, walk, widest
from smidgen.quant.calibrate import Calibration
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.evaluate import exponential, mean_loss, perplexity
from smidgen.quant.export import onnx_qdq
from smidgen.quant.export.onnx import FAMILIES, library
from smidgen.quant.memory import peak_bytes, reset_peak
from smidgen.quant.qat import calibrate as observe
from smidgen.quant.qat import clipping, split, train
from smidgen.quant.runtimes.onnxruntime import OnnxRuntime, options
from smidgen.quant.simulate import Activation, QuantLinear, Scheme, install, restore, simulate, static_layer
from smidgen.quant.solve import Grids, quantize
from smidgen.quant.solvers import BOA, GPTQ
from smidgen.quant.transforms import alpha
from smidgen.quant.transforms.equalize import Equalization
from smidgen.quant.transforms.quadapter import finetune
from smidgen.report import write_report
from smidgen.run import Run
from smidgen.texts import windows

if TYPE_CHECKING:
    from smidgen.quant.quantize import Config

METHODS = ("min-max", "mse", "smoothquant", "equalize", "quadapter")
HELD_OUT = 0.125  # of the calibration sequences, for phase 2 to stop by
EVALUATIONS = 10  # of phase 2


def main(config: "Config", run: Run) -> dict[str, Any]:
    """Check, find factors and ranges, fold, write, measure, report."""
    device = pick_device(config.device)
    source = Checkpoint.open(config.model)
    exports = check(config, source.skeleton(device))
    texts = {text: windows(text, source.tokenizer(), config.length, config.eval_windows) for text in config.evaluate}
    data = Calibration(config.calibration, config.sequences, config.length, config.seed)
    tokens = data.tokens(source, widest(source.skeleton(device)), device, run)

    reset_peak(device)
    started = time.monotonic()
    assert config.activations is not None
    scheme = Scheme(config.bits, config.activations, config.group)
    factors = factors_of(config, source, tokens, scheme, run, device)
    model = source.model(torch.float32, device)
    perplexity_float = {text: perplexity(model, t, run, f"{text} before") for text, t in texts.items()}
    layers = simulate(model, scheme)
    if factors is not None:
        alpha.attach(model, layers, factors)
    learnt, held_out = split(tokens, HELD_OUT) if config.finetune else (tokens, tokens[-1:])
    observe(model, layers, tokens)
    fix_ranges(layers, "mse" if config.method == "mse" else "min-max")
    for quant in layers.values():  # ranges are new
        quant.to(device)
    start = clipping(model, layers, held_out)
    kept = finetuned(config, model, layers, learnt, held_out, texts, run) if config.finetune else None
    for name, after in clipping(model, layers, held_out).items():
        run.log(activation=name, bits=config.activations, before=asdict(start[name]), after=asdict(after))
    alpha.fold(model, layers, source.dtype())
    if config.rounding != "nearest":
        rounded(config, model, layers, tokens, source.name, run)
    seconds, peak = time.monotonic() - started, peak_bytes(device)

    simulated = {text: perplexity(model, t, run, f"{text} simulated") for text, t in texts.items()}
    folder = written(source, model, layers, run) if exports else None
    after = simulated if folder is None else {text: in_runtime(folder, t, run, text) for text, t in texts.items()}
    metrics = run.finish(
        method=config.method,
        bits=config.bits,
        activations=config.activations,
        group=config.group,
        symmetric=True,
        sites=list(config.sites) if factors is not None else [],
        finetune=config.finetune,
        rounding=config.rounding,
        kept_step=kept,
        perplexity=after,
        perplexity_simulated=simulated,
        perplexity_float=perplexity_float,
        size_bytes=None if folder is None else sum(f.stat().st_size for f in folder.glob("model.onnx*")),
        written={} if folder is None else {"onnx": {"folder": folder.name}},
        quantize_seconds=seconds,
        peak_memory_bytes=peak,
        tokens=tokens.numel(),
        seed=config.seed,
        model=source.name,
        high_precision="embeddings and head (float16 in the artifact), norms, biases, attention scores and softmax (float32)",
        device=str(device),
    )
    run.say(f"report: {write_report([run.folder])}")
    return metrics


def check(config: "Config", skeleton: PreTrainedModel) -> bool:
    """Refuses what cannot work before any work starts; whether an artifact is to be written."""
    assert config.activations is not None
    if config.method not in METHODS:
        raise UserError(f"--method {config.method} quantizes weights alone; with --activations use {', '.join(METHODS)}")
    for option, bits in (("activations", config.activations), ("weights", config.bits)):
        if not 2 <= bits <= 8:
            raise UserError(f"--{option} must lie between 2 and 8, got {bits}")
    if config.finetune < 0 or (config.finetune and config.method != "quadapter"):
        raise UserError("--finetune is the number of steps of --method quadapter's second phase")
    if config.finetune and config.sequences < 2:
        raise UserError("--finetune holds calibration sequences out to stop by; raise --sequences")
    for option in ("format", "target_bpw", "stats", "rotate", "seeds", "inputs", "symmetric", "scale_dtype"):
        if vars(config)[option] != vars(type(config))[option]:
            raise UserError(f"--{option.replace('_', '-')} does not go with --activations; leave it out")
    check_rounding(config, skeleton)
    if config.method in ("smoothquant", "equalize", "quadapter"):
        alpha.check(skeleton, config.sites)
    return exported(config, skeleton)


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


def factors_of(
    config: "Config", source: Checkpoint, tokens: Int[Tensor, "n length"], scheme: Scheme, run: Run, device: torch.device
) -> alpha.Factors | None:
    """What the method finds, where it looks for factors at all."""
    methods = {"smoothquant": config.smoothquant, "equalize": Equalization(), "quadapter": config.quadapter}
    if config.method not in methods:
        return None
    return alpha.calibrate(source, source.skeleton(device), tokens, methods[config.method], scheme, run, device, config.sites)


def finetuned(
    config: "Config",
    model: PreTrainedModel,
    layers: dict[str, QuantLinear],
    learnt: Int[Tensor, "a length"],
    held_out: Int[Tensor, "b length"],
    texts: dict[str, Int[Tensor, "n length"]],
    run: Run,
) -> int:
    """Phase 2; the step whose state was kept."""
    groups = finetune(model, layers, config.finetune_rate)
    for quant in layers.values():
        quant.to(model.device)

    def measure(trained: torch.nn.Module) -> dict[str, Any]:
        assert isinstance(trained, PreTrainedModel)
        return {"held_out": mean_loss(trained, held_out), "perplexity": {t: exponential(mean_loss(trained, x)) for t, x in texts.items()}}

    fit = FitConfig(
        steps=config.finetune,
        learning_rate=config.finetune_rate,
        evaluate_every=max(1, config.finetune // EVALUATIONS),
        patience=EVALUATIONS,
        seed=config.seed,
    )
    return train(model, groups, learnt, fit, run, batch=min(8, len(learnt)), evaluate=measure).kept


def rounded(
    config: "Config", model: PreTrainedModel, layers: dict[str, QuantLinear], tokens: Int[Tensor, "n length"], name: str, run: Run
) -> None:
    """Rounds every weight by GPTQ or BoA, given what the quantized layers before it send, its own input quantized as well."""
    solver = {"gptq": GPTQ(), "boa": BOA()}[config.rounding]
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
        for full, q in quantize(block, solver, Grids(Narrow(config.bits, symmetric=True)), torch.float32, run).items():
            layers[full].take(q)
    rmtree(folder)
    install(model, layers)


def quantizing(activation: Activation) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that puts the quantizer before a layer."""
    return lambda module, inputs: (activation(inputs[0]), *inputs[1:])


def written(source: Checkpoint, model: PreTrainedModel, layers: dict[str, QuantLinear], run: Run) -> Path:
    """The ONNX artifact: a decoder with its cache where we can draw one, else the graph of a whole text without."""
    folder = run.partial("onnx")
    static = {name: static_layer(quant) for name, quant in layers.items()}
    if model.config.model_type in FAMILIES:
        onnx_qdq.write(folder, source, model, static)
    else:
        example = {"input_ids": torch.zeros(2, 16, dtype=torch.int64, device=model.device), "use_cache": False}
        onnx_qdq.write_module(folder, model, static, example, tokenizer=source.tokenizer())
    return run.keep(folder)


def reader(artifact: Path, length: int) -> Callable[[Int[np.ndarray, "length"]], Float32[np.ndarray, "length vocab"]]:
    """Text to logits in ONNX Runtime."""
    if (artifact / "genai_config.json").is_file():
        return OnnxRuntime.open(artifact, length).logits
    import onnxruntime

    session = onnxruntime.InferenceSession(artifact / "model.onnx", options(), providers=["CPUExecutionProvider"])
    return lambda tokens: np.asarray(session.run(["logits"], {"input_ids": tokens[None]})[0])[0]


def in_runtime(artifact: Path, tokens: Int[Tensor, "windows length"], run: Run, label: str) -> float:
    """Perplexity in ONNX Runtime."""
    read = reader(artifact, tokens.shape[1])
    losses = []
    for window in run.track(tokens.numpy(), f"perplexity on {label} after", len(tokens)):
        logits = read(window)[:-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), window[1:]])
    return exponential(float(np.mean(losses)))
