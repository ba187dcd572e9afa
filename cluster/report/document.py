"""The document that reports of runs and of ablations are, and how it is written.

`Document` is all that a page shows, as plain data. `to_html` needs `cluster/report/templates/`
and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from cluster.record.table import Table, finite, inert
from cluster.record.terminal import printable
from cluster.report.charts import CELLS
from cluster.report.plots import Chart, to_svg, to_svg_file
from cluster.report.rollouts import Shown, embedded

Format = Literal["html", "md", "json", "parquet"]


@dataclass(frozen=True)
class Finding:
    """A sentence and the numbers behind it."""

    text: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A part of the page: charts, then tables; `missing` is said where both are empty."""

    name: str
    title: str
    charts: tuple[Chart, ...]
    tables: tuple[Table, ...]
    missing: str = ""

    @classmethod
    def of(cls, name: str, title: str, *content: Chart | Table, missing: str = "") -> Part:
        """Of its content, charts without lines and tables without rows left out."""
        charts = tuple(one for one in content if isinstance(one, Chart) and one.lines)
        tables = tuple(one for one in content if isinstance(one, Table) and one.rows)
        return cls(name, title, charts, tables, missing)


@dataclass(frozen=True)
class Document:
    """The view model: all a page shows.

    Attributes:
        kicker: what kind of report it is.
        lead: one paragraph; `findings`: what followed; `warnings`: what to be wary of.
        error: the whole of a run's `error.txt`.
    """

    kicker: str
    title: str
    question: str
    lead: str
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    parts: tuple[Part, ...]
    shown: Shown
    settings: Table
    error: str = ""

    def to_html(self) -> str:
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
        script, safe = _template("report.js"), jinja2.filters.Markup
        rollouts = self.shown.rollouts
        data = {"rollouts": rollouts, "images": self.shown.images, "cells": CELLS}
        here = [r["cell"] for r in rollouts]
        cells = [
            (label, sum(row[i] for row in self.shown.cells.values()), here.count(i))
            for i, label in enumerate(CELLS)
        ]
        return environment.get_template("report.html.j2").render(
            report=self,
            svg=lambda chart: safe(to_svg(chart)),
            style=safe(_template("report.css")),
            script=safe(script),
            digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            data=safe(embedded(data)),
            cells=cells,
            steps=sorted({r["step"] for r in rollouts}),
            arms=sorted({r["arm"] for r in rollouts if "arm" in r}),
            tasks=sorted({r["task"] for r in rollouts}),
            terms=sorted({name for r in rollouts for name, _ in r["terms"]}),
            defects=sorted({d for r in rollouts for d in r["defects"]}),
        )

    def to_markdown(self, figures: str) -> str:
        """The summary, the tables, and links to the charts' files in the folder `figures`."""
        lines = [f"# {inert(self.title)}", ""]
        lines += [f"*{inert(self.question)}*", ""] if self.question else []
        lines += [inert(self.lead), ""]
        for finding in self.findings:
            lines += [f"- {inert(finding.text)}", *(f"  - {inert(d)}" for d in finding.details)]
        if self.warnings:
            lines += ["", "Warnings:", "", *(f"- {inert(text)}" for text in self.warnings)]
        for part in self.parts:
            lines += ["", f"## {part.title}"]
            if not part.charts and not part.tables:
                lines += ["", part.missing]
            for chart in part.charts:
                picture = f"![{inert(chart.alt)}]({figures}/{chart.name}.svg)"
                lines += ["", f"### {inert(chart.title)}", "", picture, "", inert(chart.caption)]
            for table in part.tables:
                lines += ["", table.to_markdown()]
        return "\n".join(lines) + "\n"

    def write_markdown(self, path: Path, name: str) -> None:
        """Write the Markdown to `path`, its charts to `<stem of name>-figures/` beside it.

        `name` is what the file is called in the end: its links say so.
        """
        folder = f"{Path(name).stem}-figures"
        blocks = re.findall(r":root \{(.*?)\}", _template("report.css"), re.DOTALL)[:2]
        light, dark = (dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in blocks)
        for chart in (chart for part in self.parts for chart in part.charts):
            (path.parent / folder).mkdir(exist_ok=True)
            drawn = to_svg_file(chart, light, dark)
            (path.parent / folder / f"{chart.name}.svg").write_text(drawn, encoding="utf-8")
        path.write_text(self.to_markdown(folder), encoding="utf-8")

    def to_text(self, *parts: str) -> str:
        """For a terminal: the words, then the tables of the named parts that are not folded."""
        lines = [self.title, self.question, "", self.lead, ""]
        for finding in self.findings:
            lines += [f"- {finding.text}", *(f"  - {text}" for text in finding.details)]
        lines += [f"! {text}" for text in self.warnings]
        for part in (p for p in self.parts if p.name in parts):
            lines += [] if part.tables else ["", part.missing]
            for table in (t for t in part.tables if not t.folded):
                lines += ["", table.to_text()]
        return "\n".join(printable(line) for line in lines) + "\n"

    def to_json(self, extra: Mapping[str, Any] | None = None) -> str:
        """The whole view model without the images, and `extra` beside it."""
        content = asdict(self) | dict(extra or {})
        content["shown"]["images"] = sorted(content["shown"]["images"])
        return json.dumps(finite(content), indent=1, allow_nan=False) + "\n"


def _template(name: str) -> str:
    return resources.files("cluster.report").joinpath("templates", name).read_text("utf-8")
