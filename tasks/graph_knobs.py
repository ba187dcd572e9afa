"""The knobs of one graph colouring distribution, and the sizes that follow from them."""

from __future__ import annotations

from math import pi, sin
from string import ascii_lowercase
from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.drawing import RANDOM, Colour, contrast_ratio, rgb
from tasks.fields import Section
from tasks.graph_puzzle import Planarity, edge_bounds, has_many_classes

Layout = Literal["circle", "spring", "random"]
Crossings = Literal["any", "few", "many"]

MAX_VERTICES = len(ascii_lowercase)
MAX_SIDE = 2048
LEAST_INK_CONTRAST = 1.1
DEFAULT_DENSITY = 0.5
MIN_NODE = {0: 6.0, 1: 10.0, 2: 13.0}
"""Smallest vertex diameter (px) chosen automatically, by the digits of its label."""


class GraphColoringSpec(Section):
    """The knobs of `GraphColoring.generate`; sizes in pixels of the image.

    Reasoning: `vertices`; `edges` (exactly) or else `density` (the expected share of all
    pairs, clipped to what the other knobs allow; 0.5 if neither is given); `chromatic`, the
    chromatic number; `planar`. Graphs are always connected.

    Perception: `canvas`; `detail`: the picture is so many times as large, the vertices as far
    apart, but lines, vertices, labels, noise and jitter are as without it. With model.max_pixels
    the square of `canvas` the policy reads all of it made smaller by `detail`, and a look at
    1/detail of the side shows every pixel. `layout` and `crossings` (see `graph_layout.place`;
    `few` and `many` shape each picture by local search); `line_width`, `node_size` (diameter),
    `label_size` (font; None: fitting the canvas). `label_size = 0` draws no labels: vertex 0 is
    then at the top and the others follow clockwise, which asks for the plain circle layout.
    `background`, `ink` (edges, outlines), `node_fill`: `#rrggbb` or `random`. `jitter`: coordinates
    move by up to this much. `noise`: standard deviation in grey levels. `contrast`: 1 as drawn,
    towards 0 faded into the background.

    `prompt`: `brief` says only what must be known, `full` explains the response format.

    `split_by`: what makes two problems the same when data is split. `isomorphism`: any relabelling
    counts as the same. `labelled`: the same edges on the same labels; a relabelled graph, such as
    the same drawing turned, may be in training. `auto` becomes the first where these knobs
    bring some 200 graphs that are not isomorphic, which takes 7 vertices or more (21 connected
    graphs have 5), and else the second.
    """

    vertices: int = Field(5, ge=2, le=MAX_VERTICES)
    edges: int | None = Field(None, ge=1)
    density: float | None = Field(None, ge=0, le=1)
    chromatic: int | None = Field(None, ge=2)
    planar: Planarity = "any"

    canvas: int = Field(448, ge=32, le=MAX_SIDE)
    detail: int = Field(1, ge=1, le=8)
    layout: Layout = "circle"
    crossings: Crossings = "any"
    line_width: float | None = Field(None, ge=0.5, le=32)
    node_size: float | None = Field(None, ge=4, le=256)
    label_size: int | None = Field(None, ge=0, le=256)
    background: Colour = "#ffffff"
    ink: Colour = "#22262e"
    node_fill: Colour = "#ffe39a"
    jitter: float = Field(0.0, ge=0, le=64)
    noise: float = Field(0.0, ge=0, le=128)
    contrast: float = Field(1.0, gt=0, le=1)

    prompt: Literal["brief", "full"] = "full"
    split_by: Literal["auto", "labelled", "isomorphism"] = "auto"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        low, high = edge_bounds(self.vertices, self.chromatic, self.planar)
        if self.edges is not None:
            if self.density is not None:
                raise ValueError("density: cannot be set together with edges; remove one")
            if not low <= self.edges <= high:
                raise ValueError(
                    f"edges: {self.edges} is impossible with vertices={self.vertices}, "
                    f"chromatic={self.chromatic}, planar={self.planar!r}; use {low} to {high}"
                )
        if self.label_size == 0 and (
            self.layout != "circle" or self.crossings != "any" or self.jitter > 0
        ):
            raise ValueError(
                "label_size: 0 (no labels) leaves vertices told apart by position only; use "
                'layout="circle", crossings="any" and jitter=0 with it'
            )
        if RANDOM not in (self.background, self.ink):
            ratio = contrast_ratio(rgb(self.background), rgb(self.ink))
            if ratio < LEAST_INK_CONTRAST:
                raise ValueError(
                    f"ink: {self.ink} cannot be seen on background {self.background}; "
                    "choose colours that differ"
                )
        _ = self.diameter  # refuses a canvas that is too small
        if self.side > MAX_SIDE:
            raise ValueError(
                f"detail: the image would be {self.side} px wide; lower it or canvas to stay "
                f"within {MAX_SIDE}"
            )
        if self.split_by == "auto":
            many = has_many_classes(
                self.vertices, self.edges, self.drawn_density, self.chromatic, self.planar
            )
            # Recipes, problems and data sets say which it is.
            object.__setattr__(self, "split_by", "isomorphism" if many else "labelled")
        return self

    @property
    def side(self) -> int:
        """Pixels of the picture's side."""
        return self.canvas * self.detail

    @property
    def drawn_density(self) -> float:
        """`density`, or what is drawn without it."""
        return DEFAULT_DENSITY if self.density is None else self.density

    @property
    def edge_width(self) -> float:
        """`line_width`, or what fits the canvas."""
        return self.line_width or _fitting_line_width(self.canvas)

    @property
    def diameter(self) -> float:
        """`node_size`, or the largest (px) with which the vertices fit legibly.

        Raises:
            ValueError: it would be too small to read; the message says which canvas would do.
        """
        if self.node_size:
            return self.node_size
        n, layout = self.vertices, self.layout
        size = _fitting_node_size(self.canvas, n, layout, self.edge_width)
        least = MIN_NODE[0 if self.label_size == 0 else len(str(n - 1))]
        if size < least:
            enough = self.canvas
            while _fitting_node_size(enough, n, layout, _fitting_line_width(enough)) < least:
                enough += 16
            raise ValueError(
                f"canvas: {self.canvas} px is too small to draw {n} vertices legibly; use at least "
                f"{enough} (and no wider lines than it gives), or set node_size yourself"
            )
        return size

    @property
    def font_size(self) -> int:
        """`label_size`, or what fits a vertex; 0 draws no labels."""
        if self.label_size is not None:
            return self.label_size
        return max(1, round(self.diameter * (0.75 if self.vertices <= 10 else 0.6)))

    @property
    def radius(self) -> float:
        """Of the circle layout: as large as fits."""
        return self.side / 2 - self.border

    @property
    def border(self) -> float:
        """Distance a vertex's centre keeps from the edge of the image."""
        return self.diameter / 2 + self.edge_width / 2 + self.jitter + 1

    @property
    def clearance(self) -> float:
        """Least distance from a vertex's centre to the middle line of another's edge."""
        return self.diameter / 2 + self.edge_width / 2 + _margin(self.canvas)


def _fitting_line_width(canvas: int) -> float:
    """Two pixels at least, so that thin lines survive a vision tower's patches."""
    return min(max(2.0, canvas / 150), 4.0)


def _margin(canvas: int) -> float:
    """Background (px) that must show between a vertex and an edge that passes it."""
    return min(max(1.0, canvas / 200), 3.0)


def _fitting_node_size(canvas: int, n: int, layout: Layout, line_width: float) -> float:
    cap = 0.08 * canvas + 9
    if layout != "circle":
        return min(cap, canvas / n)
    radius = canvas / 2 - cap / 2 - line_width / 2 - 1
    size = min(cap, 1.2 * radius * sin(pi / n))  # 0.6 of the way to the next vertex
    if n >= 5:  # the chord between a vertex's two neighbours passes this far from it
        passing = radius * 2 * sin(pi / n) ** 2
        size = min(size, 2 * (passing - line_width / 2 - _margin(canvas)))
    return size
