"""Plots of a report: a chart as plain data, drawn by matplotlib as SVG to stand inside HTML.

The SVG names roles, not colours: each colour is a CSS variable of the page, so one drawing
serves light, dark and print. It holds no address, no script and no id that another plot uses;
the legend is the page's. A file of its own (`to_svg_file`) carries both.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from cluster.record.terminal import printable

Role = Literal["perception", "reasoning", "answer", "ink", "muted", "c1", "c2", "c3", "c4"]
"""A colour of the page. The segments' own are used for nothing else than their segment."""

OTHER_ROLES: tuple[Role, ...] = ("c1", "c2", "c3", "c4")
Dash = Literal["solid", "dashed", "dotted", "dashdot"]
DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted", "dashdot")
MOST_POINTS = 400
"""Longer curves are thinned to means of this many stretches before they are drawn."""


@dataclass(frozen=True)
class Line:
    """One curve, layer, path or row of a chart; x and y are of one length.

    Attributes:
        raw: the values behind a smoothed y, drawn faintly; () for none.
        x_range, y_range: (low, high) for each point, or () for none: intervals.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    role: Role
    dash: Dash = "solid"
    raw: tuple[float, ...] = ()
    x_range: tuple[tuple[float, float], ...] = ()
    y_range: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Chart:
    """A figure of a report.

    Attributes:
        name: unique in a page; an HTML id.
        alt: what the picture shows, in words, for who cannot see it.
        kind: `lines`, with `y_range` as a band; `stack`: layers that add up; `path`: lines through
            a plane from a hollow start to a filled end; `change`: a row a line, x = (before,
            after); `forest`: a row a line, x = (difference,) with its interval, against 0;
            `frontier`: a point a line in a plane, joined in their order.
        close: the lines of a plane lie close together: it is drawn around them, and the page's
            legend has their names.
    """

    name: str
    title: str
    caption: str
    alt: str
    lines: tuple[Line, ...]
    kind: Literal["lines", "stack", "path", "change", "forest", "frontier"] = "lines"
    x_label: str = "step"
    y_label: str = ""
    y_limits: tuple[float, float] | None = None
    log_y: bool = False
    whole_x: bool = True
    """Whether the marks of x are integers."""
    close: bool = False


# Colours that occur nowhere else in the SVG, each replaced by a variable of the page.
_MARKS: dict[str, str] = {
    name: f"#0102{i + 16:x}"
    for i, name in enumerate(
        ("perception", "reasoning", "answer", "ink", "muted", "c1", "c2", "c3", "c4", "grid")
    )
} | {"paper": "#010230"}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "equipoise",
    "font.size": 10,
    "text.color": _MARKS["ink"],
    "axes.edgecolor": _MARKS["grid"],
    "axes.labelcolor": _MARKS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _MARKS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": _MARKS["grid"],
    "xtick.labelcolor": _MARKS["muted"],
    "ytick.color": _MARKS["grid"],
    "ytick.labelcolor": _MARKS["muted"],
    "lines.linewidth": 1.6,
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.parse_math": False,  # a task's name may hold a dollar sign
}


def to_svg(chart: Chart) -> str:
    """An `<svg>` element for the inside of an HTML page; the same chart gives the same text.

    `chart` holds at least one line.
    """
    return _inline(_drawn(chart, legend=False), chart)


def to_svg_file(chart: Chart, light: Mapping[str, str], dark: Mapping[str, str]) -> str:
    """A chart as an SVG file of its own, with its legend; colours by role for both schemes."""
    element = _inline(_drawn(chart, legend=True), chart)
    box = element[element.index('viewBox="') + 9 :].partition('"')[0].split()
    rules = [":root{" + "".join(f"--{k}:{c[k]};" for k in _MARKS) + "}" for c in (light, dark)]
    style = f"<style>{rules[0]}@media(prefers-color-scheme:dark){{{rules[1]}}}</style>"
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(box)}" '
        f'width="{2 * float(box[2]):g}" font-family="sans-serif" role="img">'
        f"<title>{html.escape(printable(chart.alt))}</title>{style}"
    )
    return opening + element.partition(">")[2] + "\n"


def _drawn(chart: Chart, legend: bool) -> str:
    """What matplotlib writes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    rows = len(chart.lines)
    by_row, in_plane = chart.kind in ("change", "forest"), chart.kind in ("path", "frontier")
    # Inches at 72 points: as wide as a column of the page, about a phone's width.
    width, height = 4.4, 0.55 + 0.4 * rows if by_row else 4.1 if in_plane else 2.2
    labels = max(len(_short(line.label)) for line in chart.lines) if by_row else 0
    # Charts with labels of their own need no legend.
    named = () if not legend or by_row or (in_plane and not chart.close) else chart.lines
    left, bottom = max(0.62, 0.085 * labels), 0.46 + 0.17 * len(named)
    height += 0.17 * len(named)
    right = 0.42 if in_plane else 0.22
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height))
        figure.patch.set_visible(False)
        # Fixed margins: a layout engine would take most of a report's time.
        axes = figure.add_axes(
            (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + 0.1) / height)
        )
        axes.patch.set_visible(False)
        draw = {"lines": _lines, "stack": _stack, "path": _path, "change": _change,
                "forest": _forest, "frontier": _frontier}  # fmt: skip
        draw[chart.kind](axes, chart)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        if chart.kind in ("lines", "stack"):
            steps = [1, 2, 2.5, 5, 10]
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=chart.whole_x, steps=steps))
        if chart.y_limits:
            axes.set_ylim(*chart.y_limits)
        for row, line in enumerate(reversed(named)):
            y, color = (0.1 + 0.17 * row) / height, _MARKS[line.role]
            figure.add_artist(
                Line2D((0.02, 0.09), (y, y), color=color, linestyle=line.dash, linewidth=1.6)
            )
            figure.text(0.11, y, _short(line.label), va="center", color=_MARKS["ink"], fontsize=9)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue()


def _lines(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        x, y = thinned(line.x, line.y)
        color = _MARKS[line.role]
        if line.y_range:
            lows, highs = zip(*line.y_range, strict=True)
            bx, low = thinned(line.x, lows)
            high = thinned(line.x, highs)[1]
            if len(bx) < 8:
                axes.vlines(bx, low, high, color=color, linewidth=0.9, alpha=0.6)
            axes.fill_between(bx, low, high, color=color, alpha=0.14, linewidth=0)
        if line.raw:
            rx, ry = thinned(line.x, line.raw)
            axes.plot(rx, ry, color=color, linewidth=0.7, alpha=0.35)
        marker = "o" if len(x) < 8 else None
        axes.plot(x, y, color=color, linestyle=line.dash, marker=marker, markersize=3.5)
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.tick_params(axis="y", which="minor", length=0)


def _stack(axes: Any, chart: Chart) -> None:
    x = chart.lines[0].x
    xs = thinned(x, x)[0]
    layers = [thinned(x, line.y)[1] for line in chart.lines]
    # Hatches tell layers apart without colour; the page's legend has the same.
    hatches = ["", "///", "---", "\\\\\\", "xxx"]
    base = np.zeros(len(xs))
    for line, layer, hatch in zip(chart.lines, layers, hatches * 3, strict=False):
        top = base + np.asarray(layer)
        axes.fill_between(
            xs, base, top, facecolor=_MARKS[line.role], edgecolor=_MARKS["paper"], hatch=hatch,
            linewidth=0.6, alpha=0.8,
        )  # fmt: skip
        base = top
    if len(xs) > 1:
        axes.set_xlim(xs[0], xs[-1])
    axes.set_ylim(0, float(base.max()) if len(base) and base.max() > 0 else 1)


def _plane(axes: Any, chart: Chart) -> None:
    """The unit square, or the part of it that holds the lines, with equal products dotted."""
    (left, right), (low, high) = (0.0, 1.0), (0.0, 1.0)
    if chart.close:
        (left, right), (low, high) = (
            _around([v for line in chart.lines for v in points(line)])
            for points in (
                lambda line: [*line.x, *(v for pair in line.x_range for v in pair)],
                lambda line: [*line.y, *(v for pair in line.y_range for v in pair)],
            )
        )
    grid = np.linspace(0.01, 1, 200)
    for product in (0.1, 0.25, 0.5, 0.75):
        on = grid[grid >= product]
        axes.plot(on, product / on, color=_MARKS["grid"], linewidth=0.9, linestyle="dotted")
        if low <= product / right <= high:
            axes.annotate(
                f"{product:g}", (right, product / right), xytext=(3, 0),
                textcoords="offset points", color=_MARKS["muted"], fontsize=8.5, va="center",
                annotation_clip=False,
            )  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.set_aspect("equal" if not chart.close else "auto")


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits within [0, 1] that hold all values with a margin, at least a tenth apart."""
    low, high = min(values), max(values)
    margin = max(0.04 * (high - low), (0.1 - (high - low)) / 2, 0.01)
    return max(-0.02, low - margin), min(1.02, high + margin)


def _cross(axes: Any, line: Line, i: int, color: str, face: str) -> None:
    """A point of a plane with both its intervals."""
    x, y = line.x[i], line.y[i]
    if line.x_range and line.y_range:
        axes.plot(line.x_range[i], (y, y), color=color, linewidth=0.9, alpha=0.7)
        axes.plot((x, x), line.y_range[i], color=color, linewidth=0.9, alpha=0.7)
    axes.plot([x], [y], "o", markersize=6, markerfacecolor=face, markeredgecolor=color)


def _frontier(axes: Any, chart: Chart) -> None:
    _plane(axes, chart)
    x, y = ([getattr(line, name)[0] for line in chart.lines] for name in "xy")
    axes.plot(x, y, color=_MARKS["muted"], linewidth=1, linestyle="dashed")
    for line in chart.lines:
        color = _MARKS[line.role]
        _cross(axes, line, 0, color, color)
        side = -1 if line.x[0] > sum(axes.get_xlim()) / 2 else 1
        axes.annotate(
            _short(line.label), (line.x[0], line.y[0]), xytext=(6 * side, 6),
            textcoords="offset points", fontsize=10, color=_MARKS["ink"],
            ha="right" if side < 0 else "left",
        )  # fmt: skip


def _path(axes: Any, chart: Chart) -> None:
    _plane(axes, chart)
    for line in chart.lines:
        color = _MARKS[line.role]
        axes.plot(line.x, line.y, color=color, linestyle=line.dash, linewidth=1.4)
        for i in (0, -1) if len(line.x) > 1 else (0,):
            _cross(axes, line, i, color, _MARKS["paper"] if i == 0 else color)
        if len(line.x) > 1 and (line.x[0], line.y[0]) != (line.x[-1], line.y[-1]):
            axes.annotate(
                "", (line.x[-1], line.y[-1]), xytext=(line.x[-2], line.y[-2]),
                arrowprops={"arrowstyle": "-|>", "color": color, "shrinkB": 4, "linewidth": 1.2},
            )  # fmt: skip
        if chart.close:
            continue
        side = -1 if line.x[-1] > 0.6 else 1
        axes.annotate(
            _short(line.label), (line.x[-1], line.y[-1]), xytext=(8 * side, 9),
            textcoords="offset points", fontsize=10.5, color=_MARKS["ink"],
            ha="right" if side < 0 else "left",
        )  # fmt: skip


def _change(axes: Any, chart: Chart) -> None:
    rows = range(len(chart.lines))
    for row, line in zip(rows, chart.lines, strict=True):
        color = _MARKS[line.role]
        axes.plot(line.x, (row, row), color=color, linewidth=1, alpha=0.5)
        for i, (low, high) in enumerate(line.x_range):
            y = row + (-0.14, 0.14)[i]
            axes.plot((low, high), (y, y), color=color, linewidth=1.4)
            face = _MARKS["paper"] if i == 0 else color
            axes.plot(
                [line.x[i]], [y], "o", markersize=5.5, markerfacecolor=face, markeredgecolor=color
            )
    axes.set_yticks(list(rows), [_short(line.label) for line in chart.lines])
    axes.tick_params(axis="y", labelcolor=_MARKS["ink"], length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(chart.lines) - 0.5, -0.5)
    axes.set_xlim(0, 1)


def _forest(axes: Any, chart: Chart) -> None:
    axes.axvline(0, color=_MARKS["ink"], linewidth=1)
    for row, line in enumerate(chart.lines):
        color = _MARKS[line.role]
        for low, high in line.x_range:
            axes.plot((low, high), (row, row), color=color, linewidth=1.6)
        axes.plot(line.x[:1], [row], "o", markersize=6, color=color)
    axes.set_yticks(range(len(chart.lines)), [_short(line.label) for line in chart.lines])
    axes.tick_params(axis="y", labelcolor=_MARKS["ink"], length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(chart.lines) - 0.5, -0.5)
    reach = max(abs(v) for line in chart.lines for v in (*line.x, *sum(line.x_range, ())))
    axes.set_xlim(-1.08 * max(reach, 0.02), 1.08 * max(reach, 0.02))


def _short(label: str) -> str:
    """A label of at most 28 characters, its end kept: tasks of one module differ there."""
    text = printable(label)
    return text if len(text) <= 28 else f"…{text[-27:]}"


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MOST_POINTS` points: means over equal stretches of a longer curve."""
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    cuts = np.linspace(0, len(x), MOST_POINTS + 1).astype(int)
    pairs = [(np.mean(x[a:b]), np.mean(y[a:b])) for a, b in pairwise(cuts)]
    return [float(p) for p, _ in pairs], [float(q) for _, q in pairs]


def _inline(svg: str, chart: Chart) -> str:
    """The element alone, its ids prefixed, colours as variables, fonts left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{chart.name}-', svg)
    svg = svg.replace("url(#", f"url(#{chart.name}-").replace("xlink:href", "href")
    svg = svg.replace('href="#', f'href="#{chart.name}-')
    for role, mark in _MARKS.items():
        svg = svg.replace(mark, f"var(--{role})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None  # matplotlib always writes one
    opening = f'<svg class="plot" viewBox="{box[1]}" aria-hidden="true" focusable="false">'
    svg = re.sub(r"^<svg[^>]*>", opening, svg)
    return re.sub(r">\s+<", "><", svg).strip()
