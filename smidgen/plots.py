"""The plots of all reports, each a string of inline SVG.

Text stays text, in the font of the page, and colours become CSS variables with a fallback, `var(--ink, #1f2328)`:
one picture is then legible on a light and on a dark page, where a bitmap would need to be drawn twice. The same
values give the same bytes.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, MUTED, RULE = "#1f2328", "#5c646d", "#d4d9de"
SERIES = ("#0072b2", "#d55e00", "#008760", "#b0529a", "#b38600", "#4396cf", "#7a1f4d", "#6b737c")  # apart for the colour-blind too
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")  # for more series than colours
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule"} | {color: f"series-{i}" for i, color in enumerate(SERIES)}
WIDE, NARROW = 9.0, 5.0  # inches
LOG_FROM = 5.0  # largest over smallest value from which an axis is logarithmic
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],  # measured with it; the page may name another
    "text.parse_math": False,  # a '$' in a name is a dollar
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}

Points = Sequence[tuple[int | float, int | float]]


def by_block(series: Mapping[str, Points], y_label: str, title: str) -> str:
    """A line per series over the blocks of a model: points are (block, value)."""
    with _style(title):
        figure, axes = _axes(WIDE, 3.6)
        _draw(axes, series)
        axes.set(xlabel="block", ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(figure, axes)
        return _svg(figure, title)


def by_step(series: Mapping[str, Points], y_label: str, title: str) -> str:
    """A line per series over the steps of a training, both axes logarithmic where values differ much: points are (step, value)."""
    with _style(title):
        figure, axes = _axes(WIDE, 3.6)
        _draw(axes, series, size=0.0)
        axes.set(xlabel="step", ylabel=y_label, xscale="log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _scale(axes, [y for points in series.values() for _, y in points])
        _legend(figure, axes)
        return _svg(figure, title)


def perplexity_by_bits(series: Mapping[str, Points], baselines: Mapping[str, int | float], title: str) -> str:
    """Perplexity against bits per weight, a line per series; baselines are levels, such as the float model's."""
    with _style(title):
        figure, axes = _axes(WIDE, 3.6)
        _draw(axes, {name: sorted(points) for name, points in series.items()}, size=6.0)
        for name, level in baselines.items():
            axes.axhline(level, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, label=_label(name))
        _scale(axes, [y for points in series.values() for _, y in points] + list(baselines.values()))
        axes.set(xlabel="bits per quantized weight, scales and zero points included", ylabel="perplexity (lower is better)")
        _legend(figure, axes)
        return _svg(figure, title)


def bars(values: Mapping[str, int | float], x_label: str, title: str) -> str:
    """A horizontal bar per name, the first on top, with its value written beside it."""
    with _style(title):
        figure, axes = _axes(NARROW, 0.9 + 0.27 * len(values))
        drawn = axes.barh(range(len(values)), list(values.values()), color=SERIES[0], height=0.62)
        axes.bar_label(drawn, fmt="{:.3g}", padding=4, color=INK)
        axes.set_yticks(range(len(values)), [_label(name, longest=26) for name in values])
        axes.set(xlabel=x_label)
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        return _svg(figure, title)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    return figure, axes


def _draw(axes: Axes, series: Mapping[str, Points], size: float = 3.6) -> None:
    for i, (name, points) in enumerate(series.items()):
        x, y = [p[0] for p in points], [p[1] for p in points]
        color, marker, dash = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)], DASHES[i // len(SERIES) % len(DASHES)]
        axes.plot(x, y, color=color, marker=marker, markersize=size, linestyle=dash, label=_label(name))


def _scale(axes: Axes, values: list[int | float]) -> None:
    """A logarithmic y axis where values differ much, labelled with plain numbers."""
    low, high = min(values), max(values)
    if low <= 0 or high / low < LOG_FROM:
        return
    axes.set_yscale("log")
    few = math.log10(high / low) < 2.5
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the axes, in even rows: one has room for about 118 characters, 9 of them go with a label."""
    handles, labels = axes.get_legend_handles_labels()
    rows = math.ceil(len(labels) / max(1, 118 // (max(map(len, labels)) + 9)))
    figure.legend(handles, labels, loc="outside upper left", ncols=math.ceil(len(labels) / rows), handlelength=2.4, columnspacing=2.0)


def _label(name: str, longest: int = 70) -> str:
    """A name cut to its end; matplotlib hides those that begin with an underscore, hence the space."""
    name = name if len(name) <= longest else "…" + name[1 - longest :]
    return f" {name}" if name.startswith("_") else name


@contextmanager
def _style(title: str) -> Iterator[None]:
    """Our settings and nobody else's; ids of a picture are salted with its title, for several share a page."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser's fonts draw the text, not matplotlib's
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        matplotlib.rcParams["svg.hashsalt"] = title
        yield


def _svg(figure: Figure, title: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # names of groups, the same in every picture
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable}, {color})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
