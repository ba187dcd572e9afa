"""`equipoise status RUN`: how far a run is and what befell it, read from its folder alone.

It asks no process, so it works from any machine that sees the folder, whatever became of the run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.recipe.recipe import UserError, read_toml
from cluster.record.events import ENDINGS, Event, read_events
from cluster.record.stored import read_metrics
from cluster.record.table import Table

LATELY = 5
"""Steps whose mean says how fast it goes."""
EVENTS_SHOWN = 10


@dataclass(frozen=True)
class Status:
    """A run as its folder tells it.

    Attributes:
        state: `runs`, or the ending that its last event is.
        silent: seconds since it last wrote a metric or an event; None: it wrote none.
        step, steps: done, and of the recipe (at most, under a budget).
        spent: the share of its budget, in words and in [0, 1]; None where it has none.
        step_seconds: mean of the last steps, logging and evaluation included; None: under two.
        latest: name -> the last value of each metric.
        events: oldest first.
    """

    state: str
    silent: float | None
    step: int
    steps: int
    step_seconds: float | None
    latest: Mapping[str, float]
    events: tuple[Event, ...]
    next_checkpoint: int | None
    spent: tuple[str, float] | None = None

    @property
    def left_seconds(self) -> float | None:
        """Until the last step is done, or the budget spent, at the last steps' pace; None where
        it does not run, or nothing is spent yet."""
        if self.state != "runs" or self.step_seconds is None:
            return None
        to_do = float(self.steps - self.step)
        if self.spent is not None:
            share = self.spent[1]
            if not share:
                return None
            to_do = min(to_do, max(0.0, self.step / share - self.step))
        return to_do * self.step_seconds

    def waits(self) -> str:
        """Who waits for whom, in words: by the idle shares of the last step."""
        sampler, learner = (self.latest.get(f"idle/{side}") for side in ("sampler", "learner"))
        if sampler is None or learner is None:
            return "not known"
        if max(sampler, learner) < 0.1:
            return "nobody"
        who = ("samplers", "the learner") if sampler > learner else ("the learner", "samplers")
        shares = f"idle: samplers {sampler:.0%}, learner {learner:.0%} of the last step"
        return f"{who[0]} for {who[1]} ({shares})"


def read_status(run: Path, now: float | None = None) -> Status:
    """Raises UserError for a folder that is no run's."""
    now = time.time() if now is None else now
    if not (run / "recipe.toml").is_file():
        raise UserError(f"status {run}: no run folder: it has no recipe.toml")
    # Not `load_recipe`, which needs the user's own modules; a run's has every default spelled out.
    recipe, events = read_toml(run / "recipe.toml"), tuple(read_events(run))
    rows = _metric_rows(run)
    # The warm-up of vision counts steps of its own.
    rows = [row for row in rows if not row["name"].startswith("warmup/")]
    of_sft = any(row["name"].startswith("sft/") for row in rows)
    ended_at: dict[int, float] = {}
    latest: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        latest[row["name"]] = row["value"]
        if row["step"] and not row["name"].startswith("eval/"):
            ended_at[row["step"]] = row["wall_seconds"]
    step = max(ended_at, default=0)
    signs = [row["wall_seconds"] for row in rows] + [event.wall_seconds for event in events]
    last = events[-1].what if events else ""
    try:
        steps = (recipe["sft"] if of_sft else recipe["algorithm"])["steps"]
        every = recipe["checkpoint"]["every"]
    except KeyError as no:
        raise UserError(f"status {run}: its recipe.toml is none of a run: it has no {no}") from no
    return Status(
        state=last if last in ENDINGS else "runs",
        silent=max(0.0, now - max(signs)) if signs else None,
        step=step,
        steps=steps,
        step_seconds=_pace(ended_at, events),
        latest=latest,
        events=events,
        next_checkpoint=(step // every + 1) * every if every else None,
        spent=None if of_sft else _spent(recipe["algorithm"].get("budget"), latest),
    )


def status_table(run: Path, status: Status) -> Table:
    """What a person reads first."""
    latest, seconds_left, every = status.latest, status.left_seconds, status.next_checkpoint
    pace = "not known" if status.step_seconds is None else f"{status.step_seconds:.1f} s a step"
    silent = "" if status.silent is None else f"; last sign {_span(status.silent)} ago"
    rates = [
        f"{who} {latest[name]:.0f} tokens/s"
        for who in ("sampler", "learner")
        if (name := f"throughput/{who}_tokens_per_second") in latest
    ]
    restarts = sum(event.what == "restart" for event in status.events)
    lost = sum(event.what == "lost" for event in status.events)
    rows = [
        ("state", status.state + silent),
        ("step", f"{status.step} of {status.steps if status.spent is None else status.spent[0]}"),
        ("pace", ", ".join([pace, *rates])),
        ("who waits", status.waits()),
        ("restarts", f"{restarts} of the run, {lost} of samplers"),
        ("next checkpoint", "none" if every is None else f"after step {every}"),
        ("time left", "not known" if seconds_left is None else f"about {_span(seconds_left)}"),
    ]
    return Table(str(run), ("", ""), tuple(rows), align="ll")


def event_table(status: Status) -> Table:
    """The last events, oldest first."""
    latest = status.events[-EVENTS_SHOWN:]
    rows = tuple(
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.wall_seconds)),
            event.who,
            event.what,
            event.why.partition("\n")[0][:200],
            event.lost,
            "" if event.recovered_seconds is None else f"{event.recovered_seconds:.0f} s",
        )
        for event in latest
    )
    omitted = len(status.events) - len(latest)
    note = f"{omitted} before these in events.parquet" if omitted else ""
    return Table(
        "events", ("when", "who", "what", "why", "lost", "back after"), rows, note, "lllllr"
    )


def _metric_rows(run: Path) -> list[dict[str, Any]]:
    """A run that ends joins its parts, so one may go while it is read: then the whole is there."""
    for _ in range(3):
        try:
            return list(read_metrics(run).to_pylist())
        except FileNotFoundError:
            continue
    return []


def _pace(ended_at: Mapping[int, float], events: tuple[Event, ...]) -> float | None:
    """Seconds a step of the last ones that this driver did."""
    since = max((e.wall_seconds for e in events if e.what in ("began", "went on")), default=0.0)
    steps = sorted(step for step, when in ended_at.items() if when >= since)[-LATELY - 1 :]
    if len(steps) < 2:
        return None
    return (ended_at[steps[-1]] - ended_at[steps[0]]) / (steps[-1] - steps[0])


def _spent(
    budget: Mapping[str, Any] | None, latest: Mapping[str, float]
) -> tuple[str, float] | None:
    if budget is None:
        return None
    kind, amount = budget["kind"], budget["amount"]
    share = min(1.0, latest.get(f"spent/{kind}", 0.0) / amount)
    return f"at most {amount:,} {kind}, {share:.0%} of them spent", share


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
