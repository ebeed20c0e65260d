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
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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
        steps = [x for points in series.values() for x, _ in points if x > 0] or [1]
        _logarithmic(axes.xaxis, min(steps), max(steps))
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


def lines(series: Mapping[str, Points], x_label: str, y_label: str, title: str, error: Mapping[str, Sequence[float]] | None = None) -> str:
    """A line per series over any two linear axes; `error` is how far a value may be off, either way."""
    with _style(title):
        figure, axes = _axes(WIDE, 3.2)
        _draw(axes, series)
        for i, (name, points) in enumerate(series.items()):
            if error is not None and name in error:
                x, y = np.array(points, float).reshape(-1, 2).T
                off = np.array(error[name], float)
                axes.fill_between(x, y - off, y + off, color=SERIES[i % len(SERIES)], alpha=0.15, linewidth=0)
        axes.set(xlabel=x_label, ylabel=y_label)
        _legend(figure, axes)
        return _svg(figure, title)


def dots(series: Mapping[str, Points], x_label: str, y_label: str, title: str) -> str:
    """A cloud of points per series."""
    with _style(title):
        figure, axes = _axes(WIDE, 3.2)
        for i, (name, points) in enumerate(series.items()):
            x, y = [p[0] for p in points], [p[1] for p in points]
            color, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
            axes.plot(x, y, color=color, marker=marker, markersize=3.0, linestyle="none", alpha=0.7, label=_label(name))
        axes.set(xlabel=x_label, ylabel=y_label)
        _legend(figure, axes)
        return _svg(figure, title)


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    y_label: str = "",
    x_label: str = "predicted",
) -> str:
    """A square per value in 0 .. 1, the darker the larger, 0 left blank; names are left out where there are more than fit."""
    with _style(title):
        height = min(8.5, 1.4 + 0.2 * len(rows))
        figure, axes = _axes(WIDE, height)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value > 0:
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=SERIES[0], alpha=min(1.0, value), linewidth=0))
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), aspect="equal", xlabel=x_label, ylabel=y_label)
        shown = len(rows) <= 40
        axes.set_xticks(range(len(columns)) if shown else [], [_label(name, 18) for name in columns] if shown else [], rotation=90)
        axes.set_yticks(range(len(rows)) if shown else [], [_label(name, 18) for name in rows] if shown else [])
        axes.tick_params(length=0, labelsize=7)
        axes.grid(visible=False)
        return _svg(figure, title)


def graph(weights: Sequence[tuple[int, int, float]], colors: Sequence[int], support: int, title: str) -> str:
    """Nodes on a circle, ordered by colour, and the edges between them, the stronger the darker; the first `support` nodes are squares.

    A node without a colour, -1, is not drawn. `weights` are (node, node, strength relative to the strongest).
    """
    nodes = sorted((node for node, color in enumerate(colors) if color >= 0), key=lambda node: (colors[node], node))
    place = {node: (math.cos(2 * math.pi * i / len(nodes)), math.sin(2 * math.pi * i / len(nodes))) for i, node in enumerate(nodes)}
    with _style(title):
        figure, axes = _axes(NARROW, NARROW)
        for a, b, strength in weights:
            if a in place and b in place:
                (x, y), (u, v) = place[a], place[b]
                axes.plot([x, u], [y, v], color=MUTED, alpha=max(0.05, min(1.0, strength)) * 0.6, linewidth=0.7)
        for node, (x, y) in place.items():
            marker, size = ("s", 8.0) if node < support else ("o", 4.5)
            axes.plot([x], [y], color=SERIES[colors[node] % len(SERIES)], marker=marker, markersize=size)
        axes.set(aspect="equal")
        axes.set_axis_off()
        return _svg(figure, title)


def thumbnails(rows: Sequence[tuple[str, Sequence[tuple[str, str, bool]], Sequence[tuple[str, str, bool]]]], title: str) -> str:
    """A row of small pictures per class: (name, labelled ones, ones asked for), each picture (data URI, words below, whether wrong)."""
    side, step, name_width, gap, height = 40, 62, 130, 30, 68
    most = max(len(labelled) for _, labelled, _ in rows)
    width = name_width + gap + step * (most + max(len(asked) for _, _, asked in rows))
    parts = []
    for i, (name, labelled, asked) in enumerate(rows):
        top = 20 + i * height
        parts.append(f'<text x="0" y="{top + side / 2 + 4}">{escape(_label(name, 20))}</text>')
        for j, (uri, words, wrong) in enumerate((*labelled, *asked)):
            x = name_width + step * j if j < len(labelled) else name_width + gap + step * (most + j - len(labelled))
            color = f"var(--series-1, {SERIES[1]})" if wrong else f"var(--rule, {RULE})"
            ink = color if wrong else f"var(--muted, {MUTED})"
            parts.append(
                f'<image href="{escape(uri)}" x="{x}" y="{top}" width="{side}" height="{side}" style="image-rendering: pixelated"/>'
                f'<rect x="{x - 1}" y="{top - 1}" width="{side + 2}" height="{side + 2}" fill="none" stroke="{color}" stroke-width="2"/>'
                f'<text x="{x}" y="{top + side + 12}" font-size="9" fill="{ink}">{escape(_label(words, 10))}</text>'
            )
    head = f'<text x="{name_width}" y="12">labelled</text><text x="{name_width + gap + step * most}" y="12">to classify</text>'
    style = f'font-size="11" fill="var(--ink, {INK})" xmlns="http://www.w3.org/2000/svg"'
    return (
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {20 + height * len(rows)}" {style}>{head}{"".join(parts)}</svg>'
    )


def shares(symbols: Sequence[str], probabilities: Sequence[Sequence[float]], names: Sequence[str], title: str) -> str:
    """A column per symbol of a sequence, divided by its probabilities, the first at the bottom; symbols stand below."""
    step, height, left, top = 13, 90, 8, 26
    colors = [_css(SERIES[i]) for i in (0, 1, 7)]
    longest = max(map(len, symbols))
    parts = []
    for k, name in enumerate(names):
        x = left + 110 * k
        parts += [f'<rect x="{x}" y="2" width="10" height="10" fill="{colors[k]}"/>', f'<text x="{x + 14}" y="11">{escape(name)}</text>']
    for i, (symbol, row) in enumerate(zip(symbols, probabilities, strict=True)):
        x, y = left + i * step, float(top + height)
        for p, color in zip(row, colors, strict=True):
            y -= height * p
            parts.append(f'<rect x="{x}" y="{y:.1f}" width="{step - 2}" height="{height * p:.1f}" fill="{color}"/>')
        turn = f' transform="rotate(90 {x + 2} {top + height + 6})"' if longest > 1 else ""
        parts.append(f'<text x="{x + 2}" y="{top + height + (6 if turn else 13)}"{turn}>{escape(_visible(symbol))}</text>')
    below = 16 + (7 * longest if longest > 1 else 0)
    return _drawing(parts, left + max(step * len(symbols), 110 * len(names)) + 8, top + height + below, title)


def cells(rows: Sequence[Sequence[tuple[str, float]]], title: str) -> str:
    """A grid of symbols, each as dark as it is probable; an empty symbol leaves its cell blank."""
    widest = max((len(symbol) for row in rows for symbol, _ in row), default=1)
    columns = max(map(len, rows), default=0)
    side, height, left, top = 20 + 7 * (widest - 1), 22, 44, 18
    small, middle = f'font-size="9" fill="{_css(MUTED)}"', 'text-anchor="middle"'
    parts = [f'<text x="{left + (c + 0.5) * side:.0f}" y="12" {middle} {small}>{c}</text>' for c in range(columns)]
    for r, row in enumerate(rows):
        y = top + r * height
        parts.append(f'<text x="0" y="{y + 15}" {small}>row {r}</text>')
        for c, (symbol, weight) in enumerate(row):
            x = left + c * side
            shade = f'fill="{_css(SERIES[0])}" fill-opacity="{0.3 * weight if symbol else 0:.2f}" stroke="{_css(RULE)}"'
            parts.append(f'<rect x="{x}" y="{y}" width="{side - 1}" height="{height - 1}" {shade}/>')
            faint = f'{middle} opacity="{max(0.25, weight):.2f}"'
            parts.append(f'<text x="{x + side / 2 - 0.5}" y="{y + 15}" {faint}>{escape(_visible(symbol))}</text>' if symbol else "")
    return _drawing(parts, left + columns * side + 8, top + len(rows) * height + 4, title)


def _drawing(parts: Sequence[str], width: int | float, height: int | float, title: str) -> str:
    """SVG drawn by hand, never larger than a pixel per unit."""
    style = f'font-size="11" fill="{_css(INK)}" style="max-width: {width:.0f}px; min-width: 0" xmlns="http://www.w3.org/2000/svg"'
    return f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width:.0f} {height:.0f}" {style}>{"".join(parts)}</svg>'


def _css(color: str) -> str:
    return f"var(--{VARIABLES[color]}, {color})"


def _visible(symbol: str) -> str:
    """Spaces and line ends as signs."""
    return {" ": "\u2423", "\n": "\u23ce"}.get(symbol, symbol)


def gallery(pictures: Sequence[tuple[str | None, str, str, bool]], title: str) -> str:
    """Small pictures in rows: (data URI or none, words below, what a pointer resting on it tells, whether framed in orange)."""
    side, worded, across = 44, any(words for _, words, _, _ in pictures), 16
    step, height = side + 10, side + (22 if worded else 10)
    parts = []
    for i, (uri, words, more, framed) in enumerate(pictures):
        x, y = 4 + i % across * step, 4 + i // across * height
        color = f"var(--series-1, {SERIES[1]})" if framed else f"var(--rule, {RULE})"
        image = (
            f'<image href="{escape(uri)}" x="{x}" y="{y}" width="{side}" height="{side}" style="image-rendering: pixelated"/>'
            if uri
            else ""
        )
        parts.append(
            f"<g><title>{escape(more)}</title>{image}"
            f'<rect x="{x - 1}" y="{y - 1}" width="{side + 2}" height="{side + 2}" fill="transparent" stroke="{color}" stroke-width="1.5"/>'
            f'<text x="{x}" y="{y + side + 11}" font-size="8">{escape(words[:14])}</text></g>'
        )
    box, rows = across * step + 8, -(-len(pictures) // across)
    return (
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {box} {rows * height + 8}" fill="var(--ink, {INK})" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


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
    _logarithmic(axes.yaxis, low, high)


def _logarithmic(axis: Axis, low: int | float, high: int | float) -> None:
    """Plain numbers at 1, 2 and 5, or where many decades are to be shown at the powers of ten."""
    few = math.log10(high / low) < 2.5
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


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
