"""What stored rows take of a policy's context, measured once and kept by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from cluster.recipe.context import Context, Fault, Taken
from tasks.files import user_cache
from tasks.rows import Rows

MEASURING = 4
"""Raise it when rows are measured differently: what was kept before counts no more."""
MANY = 2000
"""Rows from which on going through them shows its progress."""


def watched(items: Iterable[Any], doing: str, rows: int) -> Iterable[Any]:
    """Items that are gone through under a bar on standard error, of many rows."""
    console = Console(stderr=True)
    return track(items, doing, console=console, transient=True, disable=rows < MANY)


def row_takes(rows: Rows, context: Context) -> list[Taken]:
    """What prompt and images of each row take."""
    whole = f"{MEASURING} {rows.fingerprint} {context.fingerprint}"
    folder = _cache_folder()
    kept = folder / f"{hashlib.sha256(whole.encode()).hexdigest()}.json" if folder else None
    found = _read(kept, len(rows)) if kept else None
    if found is None:
        prompts = (example.problem.prompt for example in rows.told())
        found = context.taken([(p, rows.fact(at).sizes) for at, p in enumerate(prompts)])
        if kept:
            _write(kept, found)
    return found


def _cache_folder() -> Path | None:
    """Where measurements are kept; None where this user has no folder that can be written."""
    folder = user_cache("rows")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if folder.is_absolute() and os.access(folder, os.W_OK) else None


def _read(file: Path, rows: int) -> list[Taken] | None:
    try:
        found = [
            Taken(prompt, image, Fault(*fault) if fault else None)
            for prompt, image, fault in json.loads(file.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError):
        return None
    return found if len(found) == rows else None


def _write(file: Path, found: Sequence[Taken]) -> None:
    """Whole or not at all; a full disk costs only the time to measure again."""
    rows = [
        (taken.prompt, taken.image, taken.fault and tuple(vars(taken.fault).values()))
        for taken in found
    ]
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(rows), encoding="utf-8")
        beside.replace(file)
    except OSError:
        beside.unlink(missing_ok=True)
