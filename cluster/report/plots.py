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

Role = Literal["perception", "reasoning", "answer", "act", "ink", "muted", "c1", "c2", "c3", "c4"]
"""A colour of the page. The segments' own are used for nothing else than their segment."""

OTHER_ROLES: tuple[Role, ...] = ("c1", "c2", "c3", "c4")
Pair = tuple[float, float]
Dash = Literal["solid", "dashed", "dotted", "dashdot"]
DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted", "dashdot")
MOST_POINTS = 400
"""Longer curves are thinned to means of this many stretches before they are drawn."""


Value = tuple[float, float, float]
"""A number and the ends of its interval; all three alike where it has none."""


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
    x_range: tuple[Pair, ...] = ()
    y_range: tuple[Pair, ...] = ()

    @classmethod
    def of(
        cls, label: str, x: Sequence[float | Value], y: Sequence[float | Value], role: Role,
        dash: Dash = "solid",
    ) -> Line:  # fmt: skip
        """A line of numbers or of values with their intervals, on either axis."""
        (xs, x_range), (ys, y_range) = _split(x), _split(y)
        return cls(label, xs, ys, role, dash, x_range=x_range, y_range=y_range)


def _split(values: Sequence[float | Value]) -> tuple[tuple[float, ...], tuple[Pair, ...]]:
    if values and all(isinstance(value, tuple) for value in values):
        middle, low, high = zip(*values, strict=True)
        return middle, tuple(zip(low, high, strict=True))
    return tuple(float(value) for value in values), ()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Chart:
    """A figure of a report; one without lines is left out.

    Attributes:
        name: unique in a page; an HTML id.
        kind: `lines`, with `y_range` as a band; `stack`: layers that add up; `rows`: a row a line,
            x = (value,) or (before, after); `plane`: lines from a hollow start to a filled end.
        x_limits: of rows; without them 0 is in the middle.
        whole_x: whether the marks of x are integers.
        close: the lines of a plane lie close together: it is drawn around them, and the page's
            legend has their names.
        joined: the lines of a plane are points, joined in their order.
        alt: what the picture shows, in words, for who cannot see it; made of the lines.
    """

    name: str
    title: str
    caption: str
    lines: tuple[Line, ...]
    kind: Literal["lines", "stack", "rows", "plane"] = "lines"
    x_label: str = "step"
    y_label: str = ""
    x_limits: Pair | None = None
    y_limits: Pair | None = None
    log_y: bool = False
    whole_x: bool = True
    close: bool = False
    joined: bool = False
    alt: str = ""

    def __post_init__(self) -> None:
        if not self.alt:
            object.__setattr__(self, "alt", "; ".join(map(self._point_text, self.lines)))

    def _point_text(self, line: Line) -> str:
        x, y = line.x, line.y
        if self.kind == "rows":
            ranges = zip(x, line.x_range, strict=True)
            range_text = " to ".join(
                f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, (low, high) in ranges
            )
            return f"{line.label} {range_text}"
        if self.kind == "plane":
            see, think = (name.partition(",")[0] for name in (self.x_label, self.y_label))
            ends = (0, -1) if len(x) > 1 else (0,)
            points = (f"{see} {x[i]:.3f}, {think} {y[i]:.3f}" for i in ends)
            return f"{line.label}: {' to '.join(points)}"
        if len(x) < 8 and not self.whole_x:
            at = (f"{v:.3f} at {self.x_label} {k:g}" for k, v in zip(x, y, strict=True))
            return f"{line.label}: {', '.join(at)}"
        between = f"between {min(y):.3g} and {max(y):.3g}"
        return f"{line.label} from {y[0]:.3g} to {y[-1]:.3g}, {between}"

    @property
    def legend(self) -> bool:
        """Whether the lines' names are not in the drawing itself."""
        in_plane = self.kind == "plane" and self.close and not self.joined
        return in_plane or self.kind in ("lines", "stack")


# Colours that occur nowhere else in the SVG, each replaced by a variable of the page.
_MARKS: dict[str, str] = {
    name: f"#0102{i + 16:x}"
    for i, name in enumerate(
        ("perception", "reasoning", "answer", "act", "ink", "muted", "c1", "c2", "c3", "c4", "grid")
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
    by_row, in_plane = chart.kind == "rows", chart.kind == "plane"
    # Inches at 72 points: as wide as a column of the page, about a phone's width.
    width, height = 4.4, 0.55 + 0.4 * rows if by_row else 4.1 if in_plane else 2.2
    labels = max(len(_short(line.label)) for line in chart.lines) if by_row else 0
    legend_lines = chart.lines if legend and chart.legend else ()
    left, bottom = max(0.62, 0.085 * labels), 0.46 + 0.17 * len(legend_lines)
    height += 0.17 * len(legend_lines)
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
        draw = {"lines": _lines, "stack": _stack, "rows": _rows, "plane": _plane}
        draw[chart.kind](axes, chart)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        if chart.kind in ("lines", "stack"):
            steps = [1, 2, 2.5, 5, 10]
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=chart.whole_x, steps=steps))
        if chart.y_limits:
            axes.set_ylim(*chart.y_limits)
        for row, line in enumerate(reversed(legend_lines)):
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


def _square(axes: Any, chart: Chart) -> None:
    """The unit square, or the part of it that holds the lines, with equal products dotted."""
    (left, right), (low, high) = (0.0, 1.0), (0.0, 1.0)
    if chart.close:
        left, right = _around([v for one in chart.lines for v in (*one.x, *sum(one.x_range, ()))])
        low, high = _around([v for one in chart.lines for v in (*one.y, *sum(one.y_range, ()))])
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


def _plane(axes: Any, chart: Chart) -> None:
    _square(axes, chart)
    if chart.joined:
        points = [(line.x[0], line.y[0]) for line in chart.lines]
        axes.plot(*zip(*points, strict=True), color=_MARKS["muted"], lw=1, linestyle="dashed")
    middle = sum(axes.get_xlim()) / 2 if chart.close else 0.6
    for line in chart.lines:
        color, moves = _MARKS[line.role], len(line.x) > 1
        axes.plot(line.x, line.y, color=color, linestyle=line.dash, linewidth=1.4)
        for i in (0, -1) if moves else (0,):
            x, y = line.x[i], line.y[i]
            if line.x_range and line.y_range:
                axes.plot(line.x_range[i], (y, y), color=color, linewidth=0.9, alpha=0.7)
                axes.plot((x, x), line.y_range[i], color=color, linewidth=0.9, alpha=0.7)
            face = color if i or chart.joined else _MARKS["paper"]
            axes.plot([x], [y], "o", markersize=6, markerfacecolor=face, markeredgecolor=color)
        end = (line.x[-1], line.y[-1])
        if moves and (line.x[0], line.y[0]) != end:
            axes.annotate(
                "", end, xytext=(line.x[-2], line.y[-2]),
                arrowprops={"arrowstyle": "-|>", "color": color, "shrinkB": 4, "linewidth": 1.2},
            )  # fmt: skip
        if not chart.legend:
            side = -1 if line.x[-1] > middle else 1
            axes.annotate(
                _short(line.label), end, xytext=(7 * side, 8), textcoords="offset points",
                fontsize=10, color=_MARKS["ink"], ha="right" if side < 0 else "left",
            )  # fmt: skip


def _rows(axes: Any, chart: Chart) -> None:
    """A row a line: its value, or before (hollow) above after (filled), with intervals."""
    for row, line in enumerate(chart.lines):
        color, is_change = _MARKS[line.role], len(line.x) > 1
        if is_change:
            axes.plot(line.x, [row] * len(line.x), color=color, linewidth=1, alpha=0.5)
        for i, (x, ends) in enumerate(zip(line.x, line.x_range, strict=True)):
            y = row + (0.28 * i - 0.14 if is_change else 0)
            axes.plot(ends, (y, y), color=color, linewidth=1.5)
            face = _MARKS["paper"] if is_change and i == 0 else color
            axes.plot([x], [y], "o", markersize=5.5, markerfacecolor=face, markeredgecolor=color)
    axes.set_yticks(range(len(chart.lines)), [_short(line.label) for line in chart.lines])
    axes.tick_params(axis="y", labelcolor=_MARKS["ink"], length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(chart.lines) - 0.5, -0.5)
    if chart.x_limits:
        axes.set_xlim(*chart.x_limits)
    else:
        axes.axvline(0, color=_MARKS["ink"], linewidth=1)
        far = max(abs(v) for line in chart.lines for v in (*line.x, *sum(line.x_range, ())))
        axes.set_xlim(-1.08 * max(far, 0.02), 1.08 * max(far, 0.02))


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
