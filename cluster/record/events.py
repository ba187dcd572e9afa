"""What befell a run: `events.parquet` in its folder, a row an event, written whole at each.

One process writes at a time: the driver while it lives, whoever supervises it before and after.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.recipe.recipe import UserError
from tasks.files import put

EVENT_SCHEMA = pa.schema(
    {
        "wall_seconds": pa.float64(),  # since the epoch
        "who": pa.string(),  # driver, supervisor or an actor: sampler-0
        "what": pa.string(),
        "why": pa.string(),
        "lost": pa.string(),  # what has to be done again
        "recovered_seconds": pa.float64(),  # of what came back: since it was lost; else null
    }
)
ENDINGS = ("ended", "stopped", "failed", "failed for good", "died", "gave up")
"""Of `what`: after one of these no driver works on the run."""
FOR_GOOD = "failed for good"
"""A failure that would come again: of the recipe, a reward, the data or the disk."""
_LONGEST = 2000
_one_at_a_time = threading.Lock()


class Event(NamedTuple):
    """A row of the table, without its time where it is not written yet."""

    who: str
    what: str
    why: str = ""
    lost: str = ""
    recovered_seconds: float | None = None
    wall_seconds: float = 0.0


def read_events(run: Path) -> list[Event]:
    """The events of a run, oldest first; none of a run that has no such file.

    Raises UserError for a file that holds no events: nothing is written over it.
    """
    file = run / "events.parquet"
    if not file.exists():
        return []
    try:
        rows = pq.read_table(file, schema=EVENT_SCHEMA).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"{file}: holds no events that can be read; move it away: {why}") from None
    return [Event(**row) for row in rows]


def add_events(run: Path, *events: Event) -> None:
    """Write events below those of a run, at the time that they name or else now; raises OSError."""
    if not events:
        return
    with _one_at_a_time:
        rows = [event._asdict() for event in read_events(run)]
        for event in events:
            row = event._asdict() | {"wall_seconds": event.wall_seconds or time.time()}
            # A message may quote a model, or bytes that are no text.
            rows.append({n: _stored(v) if isinstance(v, str) else v for n, v in row.items()})
        table = pa.Table.from_pylist(rows, schema=EVENT_SCHEMA)
        put(run / "events.parquet", lambda path: pq.write_table(table, path))


def seconds_down(run: Path, now: float) -> float | None:
    """Since the run's last driver ended; None where that is not known."""
    for event in reversed(read_events(run)):
        if event.what in ENDINGS:
            return max(0.0, now - event.wall_seconds)
        if event.what not in ("restart", "stalled"):
            break
    return None


def _stored(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()[:_LONGEST]
