"""A copy of a run's folder below a URI (`s3://…`, `gs://…`), from which another machine goes on.

The copy has the tree of the folder. Records travel before the checkpoints that were whole when the
pass began, so a checkpoint that is there has the records of its steps; whether it is whole there
its own manifest says (`learner.checkpoint`). `mirror.json` in the folder names what was copied, and
stays at home, as do `logs/`, which grow while they are read.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.recipe.recipe import RunFailed, Say, UserError
from cluster.record.role_logs import LOGS
from learner.checkpoint import MANIFEST, checkpoint_folders
from tasks import fetched
from tasks.core import DataError
from tasks.files import put_text, replacing

STATE = "mirror.json"
STAYS = (STATE, LOGS)
STILL_SECONDS = 300.0
"""At the end of a run: without a byte on its way for so long, the copy is given up."""

BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "tos", "r2"}
"""Protocols without folders, where making one would make a bucket."""

Stamp = list[int]
"""Bytes and time of change in ns of a file that was copied."""


def opened(uri: str, label: str) -> tuple[Any, str]:
    """The file system that a URI names, and the path in it.

    Raises UserError, which begins with `label`: an unknown protocol, a package that is not
    installed, keys in the URI.
    """
    try:
        return fetched.opened(uri)
    except DataError as error:
        raise UserError(f"{label}: {error}") from error


def require_mirror(uri: str, run: Path, resumed: bool) -> None:
    """Raise UserError unless a run can be copied below a URI, where a new run has no copy yet."""
    label = "output.mirror"
    file_system, root = opened(uri, label)
    copy, probe = f"{root}/{run.absolute().name}", f"{root}/.{run.absolute().name}.probe"
    if "file" in file_system.protocol and Path(root).is_relative_to(run.absolute()):
        raise UserError(f"{label}: {uri} is in the run's own folder; choose one beside it")
    try:
        if not resumed and file_system.exists(f"{copy}/recipe.toml"):
            raise UserError(
                f"{label}: {uri}/{run.name} is another run's; choose another folder by --output"
            )
        _make_folder(file_system, root)
        file_system.pipe_file(probe, b"")
        file_system.rm_file(probe)
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{label}: {uri} cannot be written to: {_in_a_line(error)}") from error


class Mirror:
    """Keeps the copy of one run's folder up to date, by a thread of its own."""

    def __init__(self, uri: str, run: Path, say: Say) -> None:
        """Begin with what `mirror.json` says of an earlier life of the run."""
        self._file_system, root = opened(uri, "output.mirror")
        self._run, self._say = run, say
        self._root = f"{root}/{run.absolute().name}"
        self._copied = _read_state(run, self._root)
        self._wanted, self._closing = threading.Event(), False
        self._error = ""
        self._bytes = 0
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def send(self) -> None:
        """Have the copy brought up to date; never waits."""
        self._wanted.set()

    def close(self) -> None:
        """Bring the copy up to date, and wait for it as long as bytes move.

        Raises RunFailed where the copy is not whole.
        """
        self._closing = True
        self._wanted.set()
        while self._thread.is_alive():
            before = self._bytes
            self._thread.join(STILL_SECONDS)
            if self._thread.is_alive() and self._bytes == before:
                self._error = f"nothing moved for {STILL_SECONDS:g} s"
                break
        if self._error:
            raise RunFailed(
                f"output.mirror: the copy of the run is not whole: {self._error}; "
                f"all of it is in {self._run}"
            )

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            closing = self._closing
            try:
                self._copy()
                self._error = ""
            except (
                Exception
            ) as error:  # of any file system; the run goes on, and so does the next pass
                if not self._error:
                    why = _in_a_line(error)
                    self._say(f"warning: output.mirror: {why}; tried again after the next step")
                self._error = _in_a_line(error)
            if closing:
                return

    def _copy(self) -> None:
        """One pass: what is new or has changed is copied, what is gone is removed."""
        whole = [
            folder for folder in checkpoint_folders(self._run) if (folder / MANIFEST).is_file()
        ]
        files = [*_files(self._run, without="checkpoints")]
        for folder in whole:
            files += sorted(_files(folder), key=lambda file: file.name == MANIFEST)
        names = {str(file.relative_to(self._run)) for file in files}
        try:
            for file in files:
                try:
                    self._copy_file(file)
                except FileNotFoundError:  # pruned, or joined with others, meanwhile
                    if file.exists():
                        raise
            for name in self._copied.keys() - names:
                with suppress(FileNotFoundError):
                    self._file_system.rm_file(f"{self._root}/{name}")
                del self._copied[name]
        finally:
            state = {"root": self._root, "files": self._copied}
            put_text(self._run / STATE, json.dumps(state))

    def _copy_file(self, file: Path) -> None:
        from fsspec.callbacks import Callback

        name, stamp = str(file.relative_to(self._run)), _stamp(file)
        if self._copied.get(name) == stamp:
            return

        def moved(size: int, value: int, **_: Any) -> None:
            self._bytes += 1

        remote = f"{self._root}/{name}"
        _make_folder(self._file_system, remote.rpartition("/")[0])
        self._file_system.put_file(str(file), remote, callback=Callback(hooks={"moved": moved}))
        self._copied[name] = stamp
        self._bytes += 1


@contextmanager
def mirrored(uri: str, run: Path, say: Say) -> Iterator[Callable[[], None]]:
    """Yields what brings a run's copy up to date; it is whole when the block ends.

    Raises RunFailed where it is not, unless the block itself raised. Without a URI nothing is done.
    """
    if not uri:
        yield lambda: None
        return
    mirror = Mirror(uri, run, say)
    try:
        yield mirror.send
    except BaseException as error:
        try:
            mirror.close()
        except RunFailed as failed:
            error.add_note(str(failed))
        raise
    mirror.close()


def fetch(uri: str, run: Path, say: Say) -> None:
    """Copy a mirrored run into a folder that is not there yet.

    Raises UserError: no run there, the folder is taken, or the network's own error.
    """
    label = f"--resume {uri}"
    file_system, root = opened(uri, label)
    if run.exists():
        raise UserError(f"{label}: {run} is there already; --resume {run} goes on with it")
    try:
        sizes = {
            str(PurePosixPath(path).relative_to(root)): int(info["size"] or 0)
            for path, info in file_system.find(root, detail=True).items()
        }
    except Exception as error:
        raise UserError(f"{label}: {_in_a_line(error)}") from error
    if "recipe.toml" not in sizes or any(".." in PurePosixPath(name).parts for name in sizes):
        raise UserError(f"{label}: no run there: it has no recipe.toml")
    say(f"{run}: fetching {len(sizes)} files, {sum(sizes.values()) / 2**20:,.0f} MiB, from {uri}")
    try:
        with replacing(run) as folder:
            for name in sizes:
                file = folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file_system.get_file(f"{root}/{name}", str(file))
            state = {"root": root, "files": {name: _stamp(folder / name) for name in sizes}}
            put_text(folder / STATE, json.dumps(state))
    except Exception as error:
        raise UserError(f"{label}: {_in_a_line(error)}") from error


def _make_folder(file_system: Any, path: str) -> None:
    """Make a folder where the file system has such."""
    protocols = file_system.protocol
    if not BUCKETS & {*([protocols] if isinstance(protocols, str) else protocols)}:
        file_system.makedirs(path, exist_ok=True)


def _read_state(run: Path, root: str) -> dict[str, Stamp]:
    """What was copied to `root` before; nothing where no state, or another copy's, is there."""
    try:
        state = json.loads((run / STATE).read_text(encoding="utf-8"))
        return dict(state["files"]) if state["root"] == root else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _files(folder: Path, without: str = "") -> Iterator[Path]:
    """All files of a folder but those that are being written, and of one folder in it."""
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if file.is_file() and not hidden and parts[0] not in (without, *STAYS):
            yield file


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
