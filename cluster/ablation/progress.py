"""The grid of an ablation on the terminal: the plan before, the cells while they run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.ablation.grid import Ablation, Cell
from cluster.recipe.hardware import Machine
from cluster.recipe.placement import plan
from cluster.record import table as tables
from cluster.record.terminal import printable


def cost_table(
    ablation: Ablation, machine: Machine, finished: Mapping[str, float], slots: int
) -> str:
    """The plan: a line a cell with what it will learn from and how long that may take.

    `finished` has the seconds of finished cells by id. A cell's time is the mean of the measured
    ones of its arm, else of all, else what the file expects; "unknown" without any.
    """
    arms = {cell.id: cell.arm for cell in ablation.cells}
    budget = ablation.config.budget
    of_updates = budget.kind == "updates"
    learnt_from = "rollouts" if ablation.config.command == "train" else "demonstrations"
    rows = []
    seconds_left: float | None = 0.0
    for cell in ablation.cells:
        recipe, sft = cell.recipe, cell.recipe.sft
        if cell.id in finished:
            minutes = f"{finished[cell.id] / 60:.1f} (done)"
        else:
            guess = _expected(ablation, cell, finished, arms)
            minutes = "unknown" if guess is None else f"about {guess / 60:.1f}"
            seconds_left = None if seconds_left is None or guess is None else seconds_left + guess
        # Under a budget of tokens or seconds a run finds out how many steps it makes.
        each = recipe.algorithm.problems_per_step * recipe.algorithm.group_size
        if cell.command == "sft" and sft is not None:
            each = sft.batch_size
        rows.append(
            (
                cell.id,
                str(budget.amount),
                str(cell.steps * each) if of_updates else "?",
                str(_eval_responses(cell)) if of_updates or not recipe.eval.every else "?",
                f"{plan(recipe, machine, cell.command).cpus:g}",
                minutes,
            )
        )
    columns = ("cell", str(budget.kind), learnt_from, "eval responses", "cores", "minutes")
    table = tables.Table("", columns, tuple(rows), align="l" * len(columns))
    waiting = len(ablation.cells) - len(finished)
    total = "time unknown until a cell ran"
    if seconds_left is not None:
        total = f"about {seconds_left / slots / 60:.0f} minutes"
    return (
        f"{table.to_text()}\n\n{len(ablation.cells)} cells, {len(finished)} finished, {waiting} to "
        f"run, {slots} at a time on {machine.cores} cores: {total if waiting else 'nothing to do'}"
    )


def _expected(
    ablation: Ablation, cell: Cell, finished: Mapping[str, float], arms: Mapping[str, str]
) -> float | None:
    same = [seconds for name, seconds in finished.items() if arms[name] == cell.arm]
    if same or finished:
        return fmean(same or finished.values())
    minutes = ablation.config.budget.expected_minutes
    return None if minutes is None else 60 * minutes


def _eval_responses(cell: Cell) -> int:
    """Responses of all evaluations: before, after and between, over tasks and passes."""
    chosen, steps = cell.recipe.eval, cell.steps
    between = (steps - 1) // chosen.every if chosen.every else 0
    each = sum(chosen.samples if name == "sampled" else 1 for name in chosen.pass_names)
    return (2 + between) * each * chosen.problems * len(cell.recipe.tasks)


class GridProgress:
    """Cells by state. A live table on a terminal, a line an event elsewhere.

    Nothing here starts a thread: the launcher forks.
    """

    def __init__(self, cells: Sequence[Cell], console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self._steps = {
            cell.id: "" if cell.recipe.algorithm.budget else f"/{cell.steps}" for cell in cells
        }
        self._state = {cell.id: "waiting" for cell in cells}
        self._seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._steps_done: dict[str, int] = {}
        self._shown_at = 0.0
        self._live = (
            Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        )

    def __enter__(self) -> GridProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def started(self, cell: str) -> None:
        """A cell's process was started."""
        self._began[cell] = time.monotonic()
        self._state[cell] = "running"
        self._say(f"started   {cell}", "cyan")

    def at_step(self, cell: str, step: int) -> None:
        """A running cell has finished `step` steps."""
        self._steps_done[cell] = step

    def finished(self, cell: str, seconds: float, ran: bool = True) -> None:
        """A cell has its result; `ran` is False where an earlier launcher made it."""
        self._state[cell], self._seconds[cell] = "finished", seconds
        self._say(f"{'finished ' if ran else 'had result'} {cell}  {seconds:.1f} s", "green")

    def failed(self, cell: str, seconds: float, error: str) -> None:
        """A cell failed; the others go on."""
        self._state[cell], self._seconds[cell] = "failed", seconds
        self._say(f"FAILED    {cell}  {seconds:.1f} s: {error}", "red")

    def refresh(self) -> None:
        """Redraw, at most twice a second."""
        now = time.monotonic()
        if self._live and now - self._shown_at > 0.5:
            self._shown_at = now
            self._live.update(self._table(), refresh=True)

    def _say(self, line: str, style: str) -> None:
        count = sum(state in ("finished", "failed") for state in self._state.values())
        text = Text(printable(f"[{count}/{len(self._state)}] {line}"), style)
        self.console.print(text, soft_wrap=True, highlight=False)

    def _table(self) -> Table:
        """The cells at work and those that failed; how many others there are below."""
        counts = Counter(self._state.values())
        durations = [s for cell, s in self._seconds.items() if self._state[cell] == "finished"]
        caption = f"{counts['finished']} finished, {counts['failed']} failed, "
        caption += f"{counts['waiting']} waiting"
        if durations:
            seconds_left = (
                fmean(durations)
                * (counts["waiting"] + counts["running"])
                / max(1, counts["running"])
            )
            caption += f"; about {seconds_left / 60:.0f} minutes left"
        table = Table(caption=caption)
        for heading in ("cell", "state", "steps", "time"):
            table.add_column(heading, justify="left" if heading in ("cell", "state") else "right")
        for cell, state in self._state.items():
            if state not in ("running", "failed"):
                continue
            seconds = self._seconds.get(cell) or time.monotonic() - self._began[cell]
            clock = f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
            style = "red" if state == "failed" else "cyan"
            steps = f"{self._steps_done.get(cell, 0)}{self._steps[cell]}"
            table.add_row(cell, Text(state, style), steps, clock)
        return table
