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

from cluster.recipe.context import Context, Fault, TokenCounts
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


def row_takes(rows: Rows, context: Context) -> list[TokenCounts]:
    """What prompt and images of each row take."""
    whole = f"{MEASURING} {rows.fingerprint} {context.fingerprint}"
    folder = _cache_folder()
    cache = folder / f"{hashlib.sha256(whole.encode()).hexdigest()}.json" if folder else None
    counts = _read_cache(cache, len(rows)) if cache else None
    if counts is None:
        prompts = (example.problem.prompt for example in rows.without_images())
        counts = context.token_counts([(p, rows.fact(at).sizes) for at, p in enumerate(prompts)])
        if cache:
            _write_cache(cache, counts)
    return counts


def _cache_folder() -> Path | None:
    """Where measurements are kept; None where this user has no folder that can be written."""
    folder = user_cache("rows")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if folder.is_absolute() and os.access(folder, os.W_OK) else None


def _read_cache(file: Path, rows: int) -> list[TokenCounts] | None:
    try:
        counts = [
            TokenCounts(prompt, image, Fault(*fault) if fault else None)
            for prompt, image, fault in json.loads(file.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError):
        return None
    return counts if len(counts) == rows else None


def _write_cache(file: Path, counts: Sequence[TokenCounts]) -> None:
    """Whole or not at all; a full disk costs only the time to measure again."""
    rows = [
        (count.prompt, count.image, count.fault and tuple(vars(count.fault).values()))
        for count in counts
    ]
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(rows), encoding="utf-8")
        beside.replace(file)
    except OSError:
        beside.unlink(missing_ok=True)
