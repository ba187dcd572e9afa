"""What benchmarks found, kept as JSON, and the tables of docs/performance.md made of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.files import put_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
FOLDER = ROOT / "docs" / "results" / "performance"
Row = dict[str, Any]


def keep(name: str, keys: Sequence[str], rows: Sequence[Row], to: Path | None = None) -> None:
    """Add rows to those of a benchmark, in place of those with the same `keys`; renew its table.

    `to`: a JSON file of one's own; docs/ is left alone then.
    """
    path = to or FOLDER / f"{name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    by_key = {tuple(row[key] for key in keys): row for row in (*known, *rows)}
    rows_kept = [by_key[key] for key in sorted(by_key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    put_text(path, json.dumps(rows_kept, indent=1) + "\n")
    if to is None:
        page = PAGE.read_text(encoding="utf-8")
        put_text(PAGE, between_marks(page, name, table(rows_kept)))
    print(table(rows))


def between_marks(page: str, name: str, text: str) -> str:
    """The page with `text` in the place that is marked for a benchmark.

    Raises ValueError where the page has no such place.
    """
    begin, end = f"<!-- {name}: written by its command -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{PAGE.name} has no place {begin} ... {end}")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: a column a field; machine and command stand below, once for all rows alike."""
    below: dict[str, str] = {}
    lines = []
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in NOTED))
    for row in rows:
        note = "; ".join(f"`{row[key]}`" if key == "command" else row[key] for key in NOTED)
        mark = below.setdefault(note, f"({len(below) + 1})")
        cells = [str(row.get(column, "")) for column in columns]
        lines.append("| " + " | ".join([*cells, mark]) + " |")
    head = "| " + " | ".join([*columns, "note"]) + " |"
    notes = [f"{mark} {note}." for note, mark in below.items()]
    return "\n".join([head, "|---" * (len(columns) + 1) + "|", *lines, "", *notes])


NOTED = ("machine", "command")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, smallest and largest."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Pair by pair: how many times as fast ours was."""
    return [a / b for a, b in zip(theirs, ours, strict=True)]
