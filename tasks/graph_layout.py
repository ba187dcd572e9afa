"""Pictures of graphs: where the vertices go and how they are drawn.

Coordinates are pixels, float64 [n, 2], x to the right and y down. A placement is *legible*
when no two vertices touch and no edge runs into a vertex it does not join; only legible
placements are drawn. `look` are a problem's knobs, of which it is the perception knobs that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from math import pi

import networkx as nx
import numpy as np
from PIL import Image, ImageDraw

from tasks.drawing import RANDOM, RGB, contrast_ratio, font, rgb, streams, to_png
from tasks.graph_knobs import GraphColoringSpec
from tasks.graph_puzzle import Edge, graph_of

MIN_CONTRAST_RATIO = 3.0
"""Between randomly drawn ink and background; WCAG 2.1 asks this of graphical objects."""
STARTS = 4
MORE_STARTS = 8
"""With near and far moves in turn, which are stuck less often where room is scarce."""
MOVES = 800
SHAPING_MOVES = 400
"""Moves of the local search: to become legible, and to change the number of crossings."""
JITTER_TRIES = 50


def place(
    rng: np.random.Generator, n: int, edges: Sequence[Edge], look: GraphColoringSpec
) -> np.ndarray:
    """Positions, float64 [n, 2], of a legible drawing.

    `circle`: vertex 0 at the top, the others clockwise in order (in any order where crossings
    are asked to be few or many). `spring`: force-directed, turned at random. `random`:
    anywhere. Few or many crossings are sought by local search: the best found, no promise.
    A placement that is not legible is repaired by moving vertices, except on the circle.

    Raises:
        ValueError: no legible placement was found; the message names the remedies.
    """
    layout_rng, jitter_rng = streams(rng, 2)
    judge = _Judge(n, edges, look)
    starts = 1 if look.layout == "circle" else STARTS + MORE_STARTS
    for number in range(starts):
        start = _start(layout_rng, n, edges, look)
        positions = _search(layout_rng, start, judge, look, mixed=number >= STARTS)
        if judge.shortfall(positions) > 0:
            continue
        if look.jitter == 0:
            return positions
        for _ in range(JITTER_TRIES):
            moved = positions + jitter_rng.uniform(-look.jitter, look.jitter, size=(n, 2))
            if judge.shortfall(moved) == 0:
                return moved
    raise ValueError(
        f"no legible {look.layout} layout found for {n} vertices and {len(edges)} edges on "
        f"{look.side} px; use a larger canvas, a smaller node_size, line_width or jitter, "
        'fewer vertices or edges, or another layout ("circle" needs least room)'
    )


def count_crossings(positions: np.ndarray, edges: Sequence[Edge]) -> int:
    """Pairs of edges without a common vertex that cross in this drawing."""
    return _crossings(positions, np.asarray(edges).reshape(-1, 2), _apart(edges))


def render(
    rng: np.random.Generator, positions: np.ndarray, edges: Sequence[Edge], look: GraphColoringSpec
) -> bytes:
    """The picture as a PNG file (RGB), drawn larger and averaged down."""
    color_rng, noise_rng = streams(rng, 2)
    background, ink, fill = _colors(color_rng, look)
    scale = 4 if look.canvas <= 160 else 2
    image = Image.new("RGB", (look.side * scale,) * 2, background)
    draw = ImageDraw.Draw(image)
    at = [(float(x) * scale, float(y) * scale) for x, y in positions]
    line = max(1, round(look.edge_width * scale))
    for i, j in edges:
        draw.line([at[i], at[j]], fill=ink, width=line)
    radius = look.diameter / 2 * scale
    label_size = look.font_size * scale
    outline = max(1, round(min(look.edge_width, 2.0) * scale * 0.6))
    label_ink = max(((0, 0, 0), (255, 255, 255)), key=lambda c: contrast_ratio(c, fill))
    for label, (x, y) in enumerate(at):
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=fill, outline=ink, width=outline)
        if label_size:
            left, top, right, bottom = _ink_box(str(label), label_size)
            corner = (x - (left + right) / 2, y - (top + bottom) / 2)
            draw.text(corner, str(label), fill=label_ink, font=font(label_size))
    image = image.reduce(scale)
    if look.contrast < 1 or look.noise > 0:
        pixels = np.asarray(image, dtype=np.float64)
        pixels = background + look.contrast * (pixels - background)
        pixels = pixels + noise_rng.normal(0.0, look.noise, size=pixels.shape)
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return to_png(image)


class _Judge:
    """How far a placement is from legible, and how many crossings it has."""

    def __init__(self, n: int, edges: Sequence[Edge], look: GraphColoringSpec) -> None:
        self.wish = {"any": 0, "few": 1, "many": -1}[look.crossings]
        self.apart_by, self.clearance = 1.25 * look.diameter, look.clearance
        self.edges = np.asarray(edges, dtype=np.int64).reshape(-1, 2)  # [m, 2]
        self.pairs = np.triu_indices(n, 1)
        passed = [(e, v) for e, edge in enumerate(edges) for v in range(n) if v not in edge]
        self.passed = np.asarray(passed, dtype=np.int64).reshape(-1, 2)  # [edge, vertex]
        self.apart = _apart(edges)

    def shortfall(self, positions: np.ndarray) -> float:
        """Sum of the pixels missing to legible distances; 0 is legible."""
        one, other = self.pairs
        gap = np.linalg.norm(positions[one] - positions[other], axis=1)
        total = np.maximum(self.apart_by - gap, 0).sum()
        edge, vertex = self.passed.T
        start, end = positions[self.edges[edge, 0]], positions[self.edges[edge, 1]]
        along, to = end - start, positions[vertex] - start
        length = np.maximum((along**2).sum(axis=1), 1e-9)
        share = ((to * along).sum(axis=1) / length).clip(0, 1)
        gap = np.linalg.norm(to - share[:, None] * along, axis=1)
        return float(total + np.maximum(self.clearance - gap, 0).sum())

    def score(self, positions: np.ndarray) -> tuple[float, int]:
        """Smaller is better: legible first, then the crossings as asked for."""
        crossings = _crossings(positions, self.edges, self.apart) if self.wish else 0
        return self.shortfall(positions), self.wish * crossings


def _apart(edges: Sequence[Edge]) -> np.ndarray:
    """int64 [pairs, 2]: indices of edges that share no vertex."""
    pairs = [
        (a, b)
        for (a, first), (b, second) in combinations(enumerate(edges), 2)
        if not set(first) & set(second)
    ]
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2)


def _crossings(positions: np.ndarray, edges: np.ndarray, apart: np.ndarray) -> int:
    a, b = positions[edges[apart[:, 0]]].transpose(1, 0, 2)
    c, d = positions[edges[apart[:, 1]]].transpose(1, 0, 2)

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        u, w = q - p, r - p
        return np.sign(u[:, 0] * w[:, 1] - u[:, 1] * w[:, 0])

    crossed = (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)
    return int(crossed.sum())


def _start(
    rng: np.random.Generator, n: int, edges: Sequence[Edge], look: GraphColoringSpec
) -> np.ndarray:
    middle = look.side / 2
    if look.layout == "circle":
        angles = 2 * pi * np.arange(n) / n
        return middle + look.radius * np.stack([np.sin(angles), -np.cos(angles)], axis=1)
    if look.layout == "random":
        return rng.uniform(look.border, look.side - look.border, size=(n, 2))
    free = nx.spring_layout(graph_of(n, edges), seed=int(rng.integers(2**31)))
    positions = np.stack([free[v] for v in range(n)])
    turn = rng.uniform(0, 2 * pi)
    positions = positions @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    low, high = positions.min(axis=0), positions.max(axis=0)
    return middle + 2 * look.radius * (positions - (low + high) / 2) / (high - low).max()


def _search(
    rng: np.random.Generator,
    positions: np.ndarray,
    judge: _Judge,
    look: GraphColoringSpec,
    mixed: bool,
) -> np.ndarray:
    """Move one vertex at a time (on the circle: swap two) while the score does not worsen.

    Anywhere in the layout `random`, by a little in `spring`; if `mixed`, either by a coin.
    """
    as_is = look.crossings == "any"
    low, high = look.border, look.side - look.border
    if as_is and look.layout == "circle":
        return positions
    n = len(positions)
    score = judge.score(positions)
    for move in range(MOVES):
        if score[0] == 0 and (as_is or move >= SHAPING_MOVES):
            break
        trial = positions.copy()
        if look.layout == "circle":
            i, j = rng.permutation(n)[:2]
            trial[[i, j]] = trial[[j, i]]
        else:
            v = int(rng.integers(n))
            far = rng.random() < 0.5 if mixed else look.layout == "random"
            if far:
                trial[v] = rng.uniform(low, high, size=2)
            else:
                trial[v] = (trial[v] + rng.normal(0, look.side / 10, size=2)).clip(low, high)
        trial_score = judge.score(trial)
        if trial_score <= score:
            positions, score = trial, trial_score
    return positions


def _colors(rng: np.random.Generator, look: GraphColoringSpec) -> tuple[RGB, RGB, RGB]:
    """Background, ink and vertex fill; drawn until ink and background are far enough apart."""
    while True:
        spare = rng.integers(256, size=(3, 3)).tolist()
        background, ink, fill = (
            rgb(f"#{r:02x}{g:02x}{b:02x}" if name == RANDOM else name)
            for name, (r, g, b) in zip(
                (look.background, look.ink, look.node_fill), spare, strict=True
            )
        )
        if (
            RANDOM not in (look.background, look.ink)
            or contrast_ratio(background, ink) >= MIN_CONTRAST_RATIO
        ):
            return background, ink, fill


@lru_cache(maxsize=1024)
def _ink_box(text: str, size: int) -> tuple[float, float, float, float]:
    """Of a text drawn at the origin."""
    return font(size).getbbox(text)
