"""A table as plain data, and how it is written: terminal, text, Markdown (HTML is the page's)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box, table
from rich.console import Console
from rich.markup import escape

from cluster.record.terminal import printable


@dataclass(frozen=True)
class Table:
    """Cells are text, hostile where a name is a user's or a model's; every writer makes it inert.

    Attributes:
        align: one of l and r a column; by default the first is left, the others are numbers.
        note: a sentence below.
        folded: shown only when asked for.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    align: str = ""
    folded: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.align:
            object.__setattr__(self, "align", "l" + "r" * (len(self.columns) - 1))

    def to_rich(self) -> table.Table:
        """For a terminal, as wide as it is."""
        rich_table = table.Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title=escape(printable(self.title)) or None,
            caption=escape(printable(self.note)) or None,
            title_justify="left",
            caption_justify="left",
        )
        for heading, side in zip(self.columns, self.align, strict=True):
            rich_table.add_column(
                heading, justify="right" if side == "r" else "left", overflow="fold"
            )
        for row in self.rows:
            rich_table.add_row(*[escape(printable(cell)) for cell in row])
        return rich_table

    def to_text(self) -> str:
        """Lines of columns without rules, each as wide as its widest cell; no note."""
        rows = [[printable(cell) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [printable(self.title)] if self.title else []
        for row in rows:
            cells = zip(row, widths, self.align, strict=True)
            aligned = (c.rjust(w) if side == "r" else c.ljust(w) for c, w, side in cells)
            lines.append("  ".join(aligned).rstrip())
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """A heading, the table and its note."""
        rules = "|".join("---:" if side == "r" else "---" for side in self.align)
        lines = [f"### {inert(self.title)}", "", f"| {' | '.join(self.columns)} |", f"|{rules}|"]
        lines += ["| " + " | ".join(map(inert, row)) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", inert(self.note)] if self.note else [])])


def print_sheets(sheets: Iterable[Table], as_markdown: bool = False) -> None:
    """To a terminal, or as Markdown and nothing else."""
    if as_markdown:
        print("\n\n".join(sheet.to_markdown() for sheet in sheets))
        return
    wide = Console()
    # A log file has no width; its tables should not be squeezed into 80 columns.
    console = wide if wide.is_terminal else Console(width=160)
    for sheet in sheets:
        console.print(sheet.to_rich())
        console.print()


def inert(text: str) -> str:
    """Text that stays text in Markdown and inside a table's cell."""
    safe = printable(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*[]|$~" else c for c in safe)


def finite(value: Any) -> Any:
    """JSON-able: NaN and infinities as null, tuples as lists, keys as text."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
