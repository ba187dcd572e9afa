"""The folder of a training checkpoint: written whole or not at all, checked before it is used.

    step-000010/                  a plain Hugging Face folder: weights, processor, chat template
    step-000010/training/         what is needed to go on (see `learner.state`)
    step-000010/manifest.json     {"files": {"<path>": {"bytes": n, "sha256": "..."}}}

It is put in place whole (`tasks.files.replacing`). A folder without its manifest, or with any byte
changed, is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tasks.files import recover

MANIFEST = "manifest.json"
TRAINING = "training"
STATE = f"{TRAINING}/state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run keeps the training checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:06d}"


def checkpoint_folders(run: Path) -> list[Path]:
    """The training checkpoints of a run, oldest first, whole or not."""
    for aside in (run / "checkpoints").glob(".step-*.old"):
        recover(aside.with_name(aside.name[1:].removesuffix(".old")))
    candidates = (run / "checkpoints").glob("step-*")
    return sorted((f for f in candidates if f.name[5:].isdigit()), key=lambda f: int(f.name[5:]))


def prune(newest: Path, keep: int) -> None:
    """Keep the last `keep` checkpoints up to `newest`, just written.

    Later steps than its own are of a line that a resumed run left, because none of them could
    be used; they go too.
    """
    folders = checkpoint_folders(newest.parent.parent)
    newest_index = folders.index(newest)
    for folder in folders[: max(0, newest_index + 1 - keep)] + folders[newest_index + 1 :]:
        shutil.rmtree(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def seal(folder: Path) -> None:
    """Write the manifest of all files in a folder."""
    files = {}
    for path in _files(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    write_json(folder / MANIFEST, {"files": files})


def check(folder: Path) -> dict[str, Any]:
    """Read every byte of a training checkpoint and return its `state.json`.

    Raises CheckpointError naming the first file that is missing, cut off, changed or unknown.
    """
    listed = _read_json(folder / MANIFEST)
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed["files"].items()}
    except (TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{folder / MANIFEST}: not a list of files") from None
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, {size} were written")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise CheckpointError(f"{path}: changed since it was written (sha256 differs)")
    # A further weight file would be loaded along with the others.
    for path in _files(folder):
        if str(path.relative_to(folder)) not in files and path.name != MANIFEST:
            raise CheckpointError(f"{path}: not in {MANIFEST}")
    state = _read_json(folder / STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / STATE}: not a table")
    return state


class Writer:
    """Writes in a thread of its own, one checkpoint at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint-writer")
        self._writing: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work` once the last one is done; raises what the last one raised."""
        self.wait()
        self._writing = self._thread.submit(work)

    def wait(self) -> None:
        """Come back when nothing is being written; raises, once, what the last work raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; not a whole training checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
