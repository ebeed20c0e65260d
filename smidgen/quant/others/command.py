"""`smidgen quantize MODEL --activations 8` of models that are no language models: ranges, integers, and what they cost.

before, after    the same graph in float and in integers, both measured in ONNX Runtime on one thread
held out         inputs of the calibration source that ranges were not taken from
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from jaxtyping import Float

from smidgen.errors import UserError
from smidgen.quant.activations import Reach, counting
from smidgen.quant.export.onnx_module import trace, write
from smidgen.quant.modules import Integer, Method, quantized
from smidgen.quant.others import Kind, open_other
from smidgen.quant.others.other import GRAPH, Other, Sample
from smidgen.quant.qat import log_reaches
from smidgen.quant.runtimes.onnxruntime import options
from smidgen.quant.simulate import Scheme
from smidgen.report import write_report
from smidgen.run import Run

if TYPE_CHECKING:
    from smidgen.quant.quantize import Config

BITS = 8  # of weights, usually
HELD_OUT = 32  # inputs, or a third where there are few
LEAST = 4  # inputs in all
SHOWN = 8  # held-out inputs that clipping is counted on
TIMED = 30  # calls, after three to warm up
METHODS: dict[str, Method] = {"auto": "mse", "min-max": "min-max", "mse": "mse", "clip": "clip"}
OURS = ("model", "method", "bits", "activations", "calibration", "sequences", "output", "seed", "export", "device")


def main(config: "Config", run: Run, kind: Kind) -> dict[str, Any]:
    """Check, take ranges, write, measure, report."""
    check(config)
    source = None if config.calibration == type(config).calibration else config.calibration
    other = open_other(config.model, kind, source)
    calibration, held_out = split(other.samples(config.sequences + HELD_OUT, config.seed), config.sequences, config)
    started = time.monotonic()
    calls, example = (dict(s.call) for s in run.track(calibration, "calibration", len(calibration))), other.traced(calibration[0])
    integer = quantized(other.compact, calls, other.outputs, scheme_of(config), method_of(config), other.skip, other.dynamic, example)
    integer.write(partial := run.partial("onnx"))
    other.complete(partial, True)
    seconds = time.monotonic() - started
    reaches(integer, held_out[:SHOWN], run)
    before = written_float(other, calibration[0], run.partial("float"))
    found = compared(run, before, partial, other, held_out)
    folder = run.keep(partial)
    metrics = run.finish(
        **found,
        kind=kind,
        method=method_of(config),
        bits=config.weight_bits(BITS),
        activations=config.activations,
        group=None,
        symmetric=True,
        layers=len(integer.layers),
        calibration_inputs=len(calibration),
        held_out_inputs=len(held_out),
        quantize_seconds=seconds,
        written={"onnx": {"folder": folder.name}},
        high_precision=other.high_precision,
        model=other.name,
        seed=config.seed,
    )
    run.say(f"report: {write_report([run.folder])}")
    return metrics


def check(config: "Config") -> None:
    """Refuses what such models do not have, before any work."""
    method_of(config)
    for name, bits in (("activations", config.activations), ("weights", config.weight_bits(BITS))):
        if bits is None or not 2 <= bits <= 8:
            raise UserError(f"--{name} must lie between 2 and 8, got {bits}")
    for field in fields(config):
        if field.name not in OURS and vars(config)[field.name] != vars(type(config))[field.name]:
            raise UserError(f"--{field.name.replace('_', '-')} is for language models; leave it out")
    if config.export not in ("auto", "onnx"):
        raise UserError(f"models that are no language models are written as onnx, not {config.export}; leave out --export")
    if config.device == "cuda":
        raise UserError("models that are no language models are calibrated on the processor; leave out --device")
    if config.sequences < LEAST // 2:
        raise UserError(f"--sequences counts the inputs that ranges are taken from, {LEAST // 2} or more; got {config.sequences}")
    for package in ("onnx", "onnx_ir", "onnxruntime", "onnxscript"):
        if find_spec(package) is None:
            raise UserError(f"quantizing models that are no language models needs the package {package}: pip install 'smidgen[onnx]'")


def method_of(config: "Config") -> Method:
    """By name."""
    if config.method not in METHODS:
        raise UserError(
            f"--method {config.method} is for language models; of other models ranges are found by {', '.join(get_args(Method))}"
        )
    return METHODS[config.method]


def scheme_of(config: "Config") -> Scheme:
    """What is quantized."""
    assert config.activations is not None
    return Scheme(config.weight_bits(BITS), config.activations)


def split(samples: list[Sample], wanted: int, config: "Config") -> tuple[list[Sample], list[Sample]]:
    """What ranges are taken from, and what is held out."""
    if len(samples) < LEAST:
        raise UserError(
            f"{config.calibration}: {len(samples)} inputs are too few to take ranges from and to measure on; give {LEAST} or more"
        )
    kept = min(wanted, len(samples) - max(1, min(HELD_OUT, len(samples) // 3)))
    return samples[:kept], samples[kept:]


def written_float(other: Other, sample: Sample, folder: Path) -> Path:
    """The float model as the same exporter writes it."""
    write(folder, trace(other.module, (), other.traced(sample), other.outputs, other.dynamic), {})
    other.complete(folder, False)
    return folder


@torch.no_grad()
def reaches(integer: Integer, samples: Sequence[Sample], run: Run) -> None:
    """What the ranges are and clip, for the report."""
    with counting(integer.layers) as counts:
        for sample in samples:
            integer.module(**sample.call)
    before = {name: Reach(low, high, 0.0) for name, (low, high) in integer.seen.items()}
    after = {name: Reach(*ends, float(np.mean(counts[name]))) for name, ends in integer.ends().items()}
    log_reaches(run, before, after, next(iter(integer.layers.values())).scheme.activations)


def compared(run: Run, before: Path, after: Path, other: Other, samples: Sequence[Sample]) -> dict[str, Any]:
    """Sizes, times and how alike the two artifacts answer.

    cosine       of an input's outputs, float and integer: mean and least
    agreement    share of inputs, or of their rows, with the same largest entry; of features: with the same nearest other input
    """
    sessions = [opened(folder) for folder in (before, after)]
    answers: list[list[np.ndarray]] = [[], []]
    for sample in run.track(samples, "held-out inputs", len(samples)):
        for session, found in zip(sessions, answers, strict=True):
            found.append(np.asarray(session.run([other.outputs[0]], dict(sample.feed))[0], np.float64))
    cosines = [cosine(a, b) for a, b in zip(*answers, strict=True)]
    best = [[a.argmax(-1).ravel() for a in found] if other.rows else [nearest(np.concatenate(found))] for found in answers]
    agreed = np.concatenate([a == b for a, b in zip(*best, strict=True)])
    times = [latency(session, samples[0].feed, other.outputs[0]) for session in sessions]
    return {
        "cosine": float(np.mean(cosines)),
        "cosine_least": min(cosines),
        "agreement": float(agreed.mean()),
        "size_bytes": size(after),
        "size_bytes_float": size(before),
        "latency_ms_p50": times[1],
        "latency_ms_p50_float": times[0],
    }


def opened(folder: Path) -> Any:
    """In ONNX Runtime, on one thread."""
    import onnxruntime

    return onnxruntime.InferenceSession(folder / GRAPH, options(threads=1), providers=["CPUExecutionProvider"])


def cosine(a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"]) -> float:
    """Of two outputs as vectors; 1 where both are 0."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / lengths) if lengths else float(np.array_equal(a, b))


def nearest(features: Float[np.ndarray, "n width"]) -> np.ndarray:
    """Of every row the other row that is most alike by cosine, the mean of all subtracted."""
    centred = features - features.mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -np.inf)
    return alike.argmax(1)


def latency(session: Any, feed: Mapping[str, np.ndarray], output: str) -> float:
    """Milliseconds of a call with one input, the median."""
    taken = []
    for _ in range(TIMED + 3):
        started = time.perf_counter()
        session.run([output], dict(feed))
        taken.append(time.perf_counter() - started)
    return 1000 * float(np.median(taken[3:]))


def size(folder: Path) -> int:
    """Bytes of graph and weights."""
    return sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*"))
