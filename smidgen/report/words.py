"""Metrics in words."""

import math
from typing import Any

DASH = "–"
METHODS = {"rtn": "RTN", "gptq": "GPTQ", "boa": "BoA"}

# Metrics in words, in the order of a comparison; others follow under their own names.
LABELS = {
    "model": "model",
    "method": "method",
    "bits": "bits",
    "group": "group",
    "symmetric": "symmetric",
    "perplexity": "perplexity",
    "perplexity_float": "perplexity before",
    "bits_per_weight": "bits per quantized weight",
    "size_bytes": "size",
    "size_bytes_float": "size before",
    "quantize_seconds": "quantize time",
    "peak_memory_bytes": "peak memory",
    "high_precision": "left in high precision",
    "precision": "computed in",
}


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value: Any) -> float:
    """A value read from JSON as a number to draw; NaN, which is not drawn, if it is none."""
    return float(value) if is_number(value) and math.isfinite(value) else math.nan


def number(value: Any) -> str:
    """A value for people, numbers to four digits: 140.2, 0.03125, 32,768, 1.2e5, and a dash for None."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(number, value)) or DASH
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"


def show(name: str, value: Any) -> str:
    """A metric's value; bytes in MB of 10^6."""
    if is_number(value) and "_bytes" in name:
        return number(value / 1e6)
    if name == "method":
        return METHODS.get(str(value), number(value))
    return str(value) if name == "seed" else number(value)


def quantity(name: str, value: Any) -> str:
    """A metric's value with its unit."""
    return f"{show(name, value)} {unit(name) if is_number(value) else ''}".rstrip()


def unit(name: str) -> str:
    """The unit a metric is shown in."""
    return "MB" if "_bytes" in name else "s" if name.endswith("_seconds") else ""


def metric_of(path: tuple[str, ...]) -> str:
    """What a path measures: ("written", "gguf", "size_bytes") its last part, ("perplexity", "a.txt") its first."""
    return next((part for part in path if unit(part)), path[0])


def label(path: tuple[str, ...]) -> str:
    """A metric in words: ("perplexity", "wiki.txt") is "perplexity, wiki.txt"."""
    name = LABELS.get(path[0]) or path[0].removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
    return ", ".join((name, *(LABELS.get(part, part) if part.endswith("_bytes") else part for part in path[1:])))


def flatten(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The values of nested dicts by path: {"a": {"b": 1}, "c": 2} is {("a", "b"): 1, ("c",): 2}."""
    if not isinstance(value, dict):
        return {path: value}
    return {p: v for key, item in value.items() for p, v in flatten(item, (*path, str(key))).items()}


def ratio(before: Any, after: Any) -> str:
    """After over before."""
    quotient = finite(after) / finite(before) if before else math.nan
    return DASH if math.isnan(quotient) else f"{number(quotient)}×"
