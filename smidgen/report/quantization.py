"""The pages of `smidgen quantize` and `smidgen evaluate`."""

import math
import os
from typing import Any

from smidgen import plots
from smidgen.report.finished import Finished
from smidgen.report.page import Cell, Figure, Sample, Section, Table
from smidgen.report.run import facts
from smidgen.report.training import curves, ranges
from smidgen.report.words import finite, is_number, ratio

WEAKEST = 5  # matrices listed as the weakest
SQNR = (
    "Signal-to-quantization-noise ratio: the energy of a layer's output over that of its error, as the method's own loss "
    "measures them on the calibration text. Gaps: layers without any error, or without any output."
)
COMPARED = (
    "Both as ONNX in ONNX Runtime on one thread. Cosine and agreement are of what the two return for held-out inputs, which ranges were "
    "not taken from; 1 is the float model itself."
)
OTHER_SHOWN = {
    *("model", "method", "bits", "group", "symmetric", "size_bytes", "size_bytes_float", "latency_ms_p50", "latency_ms_p50_float"),
    *("cosine", "cosine_least", "agreement"),
}
RELATIVE = "Size of a matrix's error relative to the matrix, ‖Ŵ − W‖ / ‖W‖. Without calibration text nothing is known of the outputs."


def summary(run: Finished) -> str:
    """Method, bits and group of a quantized model."""
    group = "a scale per row" if run.metrics.get("group") is None else f"group {run.metric('group')}"
    zeros = "symmetric" if run.metrics.get("symmetric") else "with zero points"
    return ", ".join((run.metric("method"), f"{run.metric('bits')} bits", group, zeros))


def evaluation(run: Finished) -> list[Section]:
    """A run of `smidgen evaluate`."""
    perplexity, tokens = run.per_text("perplexity"), run.per_text("tokens")
    rows = [[Cell(text), Cell.of("perplexity", value), Cell.of("tokens", tokens.get(text))] for text, value in perplexity.items()]
    table = Table(["text", "perplexity", "tokens"], rows)
    return [Section("Perplexity", table=table, facts=facts(run, {"model", "perplexity", "tokens"}))]


def quantization(run: Finished) -> list[Section]:
    """A run of `smidgen quantize`."""
    if "kind" in run.metrics:
        return [Section("Before and after", note=COMPARED, table=float_and_integer(run), facts=facts(run, OTHER_SHOWN)), *ranges(run)]
    shown = {"model", "method", "bits", "group", "symmetric", "perplexity", "perplexity_float", "size_bytes", "size_bytes_float", "tokens"}
    tokens = {"calibration tokens": run.metric("tokens")}
    headline = Section("Before and after", table=before_and_after(run), facts=tokens | facts(run, shown))
    if "activations" in run.metrics:
        return [headline, *curves(run), *ranges(run)]
    return [headline, *layer_sections(run), *sample_sections(run)]


def float_and_integer(run: Finished) -> Table:
    """The headline of a model that is no language model."""
    pairs = (("size (MB)", "size_bytes"), ("median time of an input (ms)", "latency_ms_p50"))
    rows = []
    for text, name in pairs:
        before, after = run.metrics.get(f"{name}_float"), run.metrics.get(name)
        rows.append([Cell(text), Cell.of(name, before), Cell.of(name, after), Cell(ratio(before, after), numeric=True)])
    same = "same largest entry" if run.metrics.get("kind") in ("questions", "tasks") else "same nearest other input"
    for text, name in (("cosine, mean", "cosine"), ("cosine, least", "cosine_least"), (same, "agreement")):
        rows.append([Cell(text), Cell.of(name, 1.0), Cell.of(name, run.metrics.get(name)), Cell("")])
    return Table(["", "float", "integers", "integers ÷ float"], rows)


def before_and_after(run: Finished) -> Table:
    """The headline: perplexities and size."""
    before, after = run.per_text("perplexity_float"), run.per_text("perplexity")
    pairs = [(f"perplexity, {text}", "perplexity", before.get(text), after.get(text)) for text in before | after]
    pairs.append(("size (MB)", "size_bytes", run.metrics.get("size_bytes_float"), run.metrics.get("size_bytes")))
    rows = [[Cell(text), Cell.of(name, a), Cell.of(name, b), Cell(ratio(a, b), numeric=True)] for text, name, a, b in pairs]
    return Table(["", "before", "after", "after ÷ before"], rows)


def layer_sections(run: Finished) -> list[Section]:
    """Error and time of the layers."""
    rows = run.layers()
    if not rows:
        return []
    key = "sqnr_db" if has_sqnr(rows) else "relative_error"
    names = short_names([row["layer"] for row in rows])
    errors: dict[str, list[tuple[float, float]]] = {short: [] for short in names.values()}
    seconds = dict.fromkeys(names.values(), 0.0)
    for row in rows:
        errors[names[row["layer"]]].append((float(row["block"]), finite(row.get(key))))
        seconds[names[row["layer"]]] += finite(row.get("seconds", 0.0))
    axis, caption = ("SQNR (dB), higher is better", SQNR) if key == "sqnr_db" else ("relative error, lower is better", RELATIVE)
    curves = plots.by_block(errors, axis, "Error of every layer, block by block")
    spent = plots.bars(seconds, "seconds, summed over the blocks", "Time each kind of layer took")
    return [
        Section("Error of every layer", figures=[Figure(curves, caption)]),
        Section("Weakest layers", table=weakest(rows, key), half=True),
        Section("Time by layer", figures=[Figure(spent, "Choosing the codes, without the forward passes.")], half=True),
    ]


def has_sqnr(rows: list[dict[str, Any]]) -> bool:
    """Whether layers have an SQNR; without calibration text they do not."""
    return any(is_number(row.get("sqnr_db")) for row in rows)


def short_names(layers: list[str]) -> dict[str, str]:
    """Layer -> last part of its name, or all of it where two layers of a block share that part."""
    names = {layer: layer.rpartition(".")[2] for layer in layers}
    parts = list(names.values())
    return {layer: layer if parts.count(part) > 1 else part for layer, part in names.items()}


def weakest(rows: list[dict[str, Any]], key: str) -> Table:
    """The matrices with the largest errors."""
    known = [row for row in rows if math.isfinite(finite(row.get(key)))]
    worst = sorted(known, key=lambda row: row[key], reverse=key != "sqnr_db")[:WEAKEST]
    head = ["layer", "block", "SQNR (dB)" if key == "sqnr_db" else "relative error"]
    return Table(head, [[Cell(row["layer"]), Cell.of("block", row["block"]), Cell.of(key, row[key])] for row in worst])


def sample_sections(run: Finished) -> list[Section]:
    """What the model writes before and after."""
    before, after = run.samples.get("before"), run.samples.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    samples = [sample(prompt, str(text), str(after[prompt])) for prompt, text in before.items() if prompt in after]
    return [Section("What the model writes", note="Greedy decoding. Grey: the same words before and after.", samples=samples)]


def sample(prompt: str, before: str, after: str) -> Sample:
    """Two continuations, parted after the last word that both begin with."""
    before, after = before.strip(), after.strip()
    shared = os.path.commonprefix([before, after])
    if before != after:
        shared = shared[: shared.rfind(" ") + 1]
    return Sample(prompt, shared, before[len(shared) :], after[len(shared) :])
