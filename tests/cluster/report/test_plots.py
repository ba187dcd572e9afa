"""Drawings: curves keep their mean, colours are named by their roles, a file stands by itself."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from cluster.report.charts import Series, evaluation_curves, plane, smoothed
from cluster.report.plots import MOST_POINTS, Chart, Line, thinned, to_svg, to_svg_file
from tasks.core import SEGMENTS
from tests.support.report_pages import (
    SEEING,
)


def test_evaluations_along_the_way_are_on_the_path(tmp_path: Path) -> None:
    metrics = {
        f"eval/sudoku/{m}": Series((0, 10, 20), (0.3, value, 0.5))
        for m, value in (("a", 0.4), ("a_p", 0.9), ("a_r", 0.7))
    }
    (curve,) = evaluation_curves(metrics)
    assert [line.y[1] for line in curve.lines] == [0.4, 0.9, 0.7]
    path = plane(metrics, {"sudoku": SEEING, "all tasks": SEEING})
    assert [(line.x, line.y) for line in path.lines] == [((0.3, 0.9, 0.8), (0.5, 0.7, 0.5))]


def test_curves_keep_their_mean_when_smoothed_or_thinned() -> None:
    values = np.random.default_rng(0).random(5000)
    x, y = thinned(tuple(range(5000)), tuple(values))
    assert len(x) == len(y) == MOST_POINTS
    assert np.mean(y) == pytest.approx(values.mean(), abs=1e-3)
    assert smoothed([0.5] * 100) == pytest.approx([0.5] * 100)
    assert smoothed(values[:10]) == tuple(values[:10])
    middle = smoothed(values[:160])[80]
    assert middle == pytest.approx(values[70:91].mean())


def test_a_drawing_of_its_own_has_all_its_colours_and_its_legend() -> None:
    evil = "a<script>&\u202e"
    lines = tuple(Line(name, (1.0, 2.0), (0.5, 0.25), "c1", "dashed") for name in ("b", evil))
    colours = {"light": "#111111", "dark": "#eeeeee"}
    roles = (*SEGMENTS, "ink", "muted", "c1", "c2", "c3", "c4", "grid")
    schemes = [dict.fromkeys((*roles, "paper"), value) for value in colours.values()]
    drawn = to_svg_file(Chart("c", "t", "", lines, alt=evil), *schemes)
    root = ElementTree.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg" and not root.findall(f".//{space}script")
    defined = set(re.findall(r"--([\w-]+):#", drawn))
    assert set(re.findall(r"var\(--([\w-]+)\)", drawn)) <= defined == {*roles, "paper"}
    written = [text.text for text in root.iter(f"{space}text")]
    assert "b" in written and any("<script>" in str(t) for t in written)
    assert "\u202e" not in drawn and "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
    # In the page the legend is the page's own.
    assert ">b<" not in to_svg(Chart("c", "t", "", lines[:1]))


@pytest.mark.parametrize("kind", ["lines", "stack", "plane", "joined", "close", "rows", "change"])
def test_a_drawing_names_roles_and_no_colours(kind: str) -> None:
    x, y = (0.3,), (0.5,)
    if kind in ("lines", "stack", "plane", "close", "change"):
        x, y = (0.3, 0.6), (0.5, 0.25)  # type: ignore[assignment]
    ends = tuple((v - 0.1, v + 0.1) for v in x)
    line = Line("$x <b>", x, y, "perception", x_range=ends, y_range=ends)
    drawn = {"joined": "plane", "close": "plane", "change": "rows"}.get(kind, kind)
    close = kind in ("joined", "close")
    chart = Chart("c", "t", "", (line,), drawn, close=close, joined=kind == "joined")  # type: ignore[arg-type]
    svg = to_svg(chart)
    assert "var(--perception)" in svg
    assert not re.search(r"#0102|http|<script|<!--|<b>", svg)
    assert svg == to_svg(chart)
    assert ("$x <b>" in chart.alt and "0.5" in chart.alt) or kind in ("rows", "change")
