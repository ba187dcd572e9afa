"""Text for a terminal, and what a run says there."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.main import get_command


def as_written(app: typer.Typer) -> Any:
    """The command of an app, its help texts shown as they are: `[model]` in them is no markup."""
    click_command = get_command(app)
    commands: list[Any] = [click_command]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for part in (command, *command.params):
            if getattr(part, "help", None):
                part.help = escape(part.help)
    return click_command


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters and surrogates as escapes."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


class Progress:
    """One line a step with the numbers that matter; plain text where there is no terminal."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.steps = steps
        # A log file has no width; its tables should not be squeezed into 80 columns.
        wide = Console()
        self.console = console or (wide if wide.is_terminal else Console(width=132))
        self._recent: deque[float] = deque(maxlen=10)

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        seconds: float,
        share: float | None = None,
    ) -> None:
        """Show step `step` of `steps`, which took `seconds`; absent metrics show as `-`.

        `share`: of a budget that ends the run before its steps do.
        """
        self._recent.append(seconds)
        pace = sum(self._recent) / len(self._recent)
        count, to_do = f"{step:>{len(str(self.steps))}}/{self.steps}", float(self.steps - step)
        if share:
            count, to_do = f"{step} ({share:.0%})", min(to_do, step / share - step)
        seconds_left = round(pace * to_do)
        line = Text.assemble((f"step {count}", "bold"))
        for label, name, style in (
            ("a", "acc/a", "green"),
            ("a_p", "acc/a_p", "cyan"),
            ("reward", "reward/total/mean", "yellow"),
            ("zero-variance", "group/zero_variance", "dim"),
        ):
            value = f"{metrics[name]:.3f}" if name in metrics else "-"
            line.append(f"  {label} ").append(value, style)
        line.append(f"  {seconds:.1f} s/step  ETA {seconds_left // 60}:{seconds_left % 60:02d}")
        defects = {
            k.removeprefix("defects/"): v for k, v in metrics.items() if k.startswith("defects/")
        }
        worst = sorted(defects.items(), key=lambda item: -item[1])[:3]
        if worst:
            worst_defects = ", ".join(f"{printable(name)} {count:.0f}" for name, count in worst)
            line.append(f"  defects {worst_defects}", "dim")
        self._print(line)

    def say(self, message: str) -> None:
        """A line of its own; the message is shown as it is, markup and control codes inert."""
        self._print(Text(printable(message)))

    def _print(self, line: Text) -> None:
        # Soft wrap: rich would break lines at 80 columns in a log file.
        self.console.print(line, soft_wrap=True, highlight=False)
