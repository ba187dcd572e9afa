"""Text for a terminal."""

from __future__ import annotations

from typing import Any

import typer
from rich.markup import escape
from typer.main import get_command


def as_written(app: typer.Typer) -> Any:
    """The command of an app, its help texts shown as they are: `[model]` in them is no markup."""
    made = get_command(app)
    commands: list[Any] = [made]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for part in (command, *command.params):
            if getattr(part, "help", None):
                part.help = escape(part.help)
    return made


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters and surrogates as escapes."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
