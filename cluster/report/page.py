"""The page that reports are written as: a view model to HTML, Markdown or JSON.

`Report` is all that a page shows, as plain data; runs and ablations each make one of what their
folder holds. `to_html` needs `cluster/report/templates/` and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from cluster.record.terminal import printable
from cluster.report.charts import CELLS
from cluster.report.plots import Chart, to_svg, to_svg_file
from cluster.report.rollouts import Shown, embedded
from cluster.report.words import Table, Words

Format = Literal["html", "md", "json", "parquet"]


@dataclass(frozen=True)
class Section:
    """A part of the page: charts, then tables."""

    name: str
    title: str
    charts: tuple[Chart, ...]
    tables: tuple[Table, ...]
    missing: str = ""
    """What to say where both are empty."""


@dataclass(frozen=True)
class Report:
    """The view model: all a page shows, as plain data."""

    title: str
    question: str
    words: Words
    sections: tuple[Section, ...]
    shown: Shown
    error: str
    settings: Table | None
    kicker: str = "Equipoise report"
    """What kind of report it is."""


def to_html(report: Report) -> str:
    """One self-contained page. Its policy allows no script but its own and no network."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cluster.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["shown"] = printable
    assert environment.loader is not None
    style = environment.loader.get_source(environment, "report.css")[0]
    script = environment.loader.get_source(environment, "report.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    cells = [sum(row[i] for row in report.shown.cells.values()) for i in range(len(CELLS))]
    shown = [r["cell"] for r in report.shown.rollouts]
    data = {
        "rollouts": report.shown.rollouts,
        "images": report.shown.images,
        "cells": CELLS,
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        svg=lambda chart: jinja2.filters.Markup(to_svg(chart)),
        style=jinja2.filters.Markup(style),
        script=jinja2.filters.Markup(script),
        digest=digest,
        data=jinja2.filters.Markup(embedded(data)),
        cells=[(CELLS[i], cells[i], shown.count(i)) for i in range(len(CELLS))],
        steps=sorted({r["step"] for r in report.shown.rollouts}),
        arms=sorted({r["arm"] for r in report.shown.rollouts if "arm" in r}),
        tasks=sorted({r["task"] for r in report.shown.rollouts}),
        terms=sorted({name for r in report.shown.rollouts for name, _ in r["terms"]}),
        defects=sorted({d for r in report.shown.rollouts for d in r["defects"]}),
    )


def write_markdown(report: Report, path: Path, name: str) -> None:
    """Write the report's Markdown to `path`, its charts to `<stem of name>-figures/` beside it.

    `name` is what the file is called in the end: its links say so.
    """
    folder = f"{Path(name).stem}-figures"
    charts = [chart for section in report.sections for chart in section.charts]
    if charts:
        (path.parent / folder).mkdir(exist_ok=True)
    light, dark = _schemes()
    for chart in charts:
        drawn = to_svg_file(chart, light, dark)
        (path.parent / folder / f"{chart.name}.svg").write_text(drawn, encoding="utf-8")
    path.write_text(to_markdown(report, folder), encoding="utf-8")


def _schemes() -> list[dict[str, str]]:
    """The page's colours by variable, in light and dark."""
    style = resources.files("cluster.report").joinpath("templates", "report.css").read_text("utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    return [dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in blocks]


def to_markdown(report: Report, figures: str) -> str:
    """The summary, the tables, and links to the charts' files in the folder `figures`."""
    lines = [f"# {_md(report.title)}", ""]
    lines += [f"*{_md(report.question)}*", ""] if report.question else []
    lines += [_md(report.words.lead), ""]
    for finding in report.words.findings:
        lines += [f"- {_md(finding.text)}", *(f"  - {_md(text)}" for text in finding.details)]
    if report.words.warnings:
        lines += ["", "Warnings:", "", *(f"- {_md(text)}" for text in report.words.warnings)]
    for section in report.sections:
        lines += ["", f"## {section.title}"]
        if not section.charts and not section.tables:
            lines += ["", section.missing]
        for chart in section.charts:
            lines += ["", f"### {_md(chart.title)}", ""]
            lines += [f"![{_md(chart.alt)}]({figures}/{chart.name}.svg)", "", _md(chart.caption)]
        for table in section.tables:
            lines += ["", f"### {_md(table.title)}", "", f"| {' | '.join(table.columns)} |"]
            lines.append("|" + "|".join("---:" if a == "r" else "---" for a in table.align) + "|")
            lines += ["| " + " | ".join(_md(cell) for cell in row) + " |" for row in table.rows]
            lines += ["", _md(table.note)] if table.note else []
    return "\n".join(lines) + "\n"


def to_text(report: Report, *sections: str) -> str:
    """For a terminal: the words, then the tables of the named sections that are not folded."""
    lines = [report.title, report.question, "", report.words.lead, ""]
    for finding in report.words.findings:
        lines += [f"- {finding.text}", *(f"  - {text}" for text in finding.details)]
    lines += [f"! {text}" for text in report.words.warnings]
    for section in (s for s in report.sections if s.name in sections):
        if not section.tables:
            lines += ["", section.missing]
        for table in (t for t in section.tables if not t.folded):
            rows = [table.columns, *table.rows]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["", table.title]
            for row in rows:
                cells = zip(row, widths, table.align, strict=True)
                aligned = (c.rjust(w) if side == "r" else c.ljust(w) for c, w, side in cells)
                lines.append("  ".join(aligned).rstrip())
    return "\n".join(printable(line) for line in lines) + "\n"


def to_json(report: Report, more: Mapping[str, Any] | None = None) -> str:
    """The whole view model without the images, and `more` beside it."""
    found = asdict(report) | dict(more or {})
    found["shown"]["images"] = sorted(found["shown"]["images"])
    return json.dumps(_finite(found), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON-able: no NaN, tuples as lists, keys as text."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _md(text: str) -> str:
    """Text that stays text in Markdown and inside a table's cell."""
    safe = printable(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in safe)
