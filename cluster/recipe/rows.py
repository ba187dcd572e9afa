"""The rows of stored data, measured once: what was found is kept by content, beside no run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

from cluster.recipe.context import Context, Fault, Size, Taken
from tasks.core import DataError
from tasks.datasets import Example, file_hash
from tasks.files import user_cache
from tasks.images import check_image

MEASURING = 3
"""Raise it when rows are measured differently: what was kept before counts no more."""
MANY = 2000
"""Rows from which on measuring them shows its progress."""


def row_takes(file: Path, examples: Sequence[Example], context: Context) -> list[Taken]:
    """What prompt and images of each row of a split take; its file tells what was kept of it."""
    whole = f"{MEASURING} {file_hash(file)} {context.fingerprint}"
    folder = _cache_folder()
    kept = folder / f"{hashlib.sha256(whole.encode()).hexdigest()}.json" if folder else None
    found = _read(kept, len(examples)) if kept else None
    if found is None:
        found = _measured(file, examples, context)
        if kept:
            _write(kept, found)
    return found


def _measured(file: Path, examples: Sequence[Example], context: Context) -> list[Taken]:
    sizes: list[tuple[Size, ...] | Fault] = []
    with ThreadPoolExecutor() as threads:  # Pillow decodes without Python's lock
        sizes.extend(
            track(
                threads.map(_sizes, examples),
                f"measuring {file}",
                len(examples),
                console=Console(stderr=True),
                transient=True,
                disable=len(examples) < MANY,
            )
        )
    asked = [
        (example.problem.prompt, size)
        for example, size in zip(examples, sizes, strict=True)
        if not isinstance(size, Fault)
    ]
    takes = iter(context.taken(asked))
    return [Taken(fault=size) if isinstance(size, Fault) else next(takes) for size in sizes]


def _sizes(example: Example) -> tuple[Size, ...] | Fault:
    """Pixels of a row's images, which are decoded whole."""
    try:
        return tuple(check_image(image, "image").size for image in example.problem.images)
    except DataError as error:
        return Fault("image", str(error).removeprefix("image: "), damaged=True)


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
