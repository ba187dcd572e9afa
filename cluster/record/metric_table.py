"""The table of metrics: what a run may log, as data; `python -m cluster.record.metric_table`
prints docs/metrics.md from it.

A name in it may hold placeholders: `reward/<term>/mean` stands for those of all terms.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core import SEGMENTS

STANDS_FOR = {
    "segment": f"({'|'.join(SEGMENTS)}|other|none)",
    "pair": "(outcome_perception|outcome_reasoning)",
    "learner": "(learner|sft)",
    "skill": "(a|a_p|a_r)",
    "shown": "(blank|other|elsewhere)",
    "kind": "[^/]+",
    "k": r"\d+",
}
"""Other placeholders are names that users give: of a term, a task, a defect, a count."""


class Metric(NamedTuple):
    """A row of the table; `writer` is the file that makes the number."""

    name: str
    unit: str
    meaning: str
    writer: str


@cache
def _read_table() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("metrics.toml").read_text(encoding="utf-8"))


def _rows(section: dict[str, Any]) -> Iterator[Metric]:
    for writer, rows in section["made_by"].items():
        for name, unit, meaning in rows:
            yield Metric(name, unit, meaning, writer)


def all_metrics() -> list[Metric]:
    """The rows, in the order of the page."""
    return [row for section in _read_table()["sections"] for row in _rows(section)]


def pattern(name: str) -> str:
    """The regular expression of what a name of the table stands for."""
    parts = re.split(r"<(\w+)>", name)
    pieces = [STANDS_FOR.get(p, ".+") if i % 2 else re.escape(p) for i, p in enumerate(parts)]
    return "".join(pieces)


@cache
def _any_of_them() -> re.Pattern[str]:
    return re.compile("|".join(pattern(row.name) for row in all_metrics()), re.DOTALL)


def unlisted(names: Iterable[str]) -> list[str]:
    """Those that are not in the table, sorted."""
    return sorted(name for name in names if not _any_of_them().fullmatch(name))


def page() -> str:
    """docs/metrics.md."""
    lines = [_read_table()["introduction"]]
    for section in _read_table()["sections"]:
        lines += [f"## {section['title']}", "", section["text"]]
        lines += ["| name | unit | meaning | made by |", "|---|---|---|---|"]
        lines += [
            f"| `{row.name}` | {row.unit} | {_cell(row.meaning)} | `{row.writer}` |"
            for row in _rows(section)
        ]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    print(page(), end="")
