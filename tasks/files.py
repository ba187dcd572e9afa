"""Files and folders that are put in place whole, or not at all, whenever the process is killed."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def expanded(path: str) -> str:
    """A path with `~` and `$VARIABLES` replaced; unknown ones stay as they are."""
    return os.path.expanduser(os.path.expandvars(path))


def user_cache(name: str) -> Path:
    """Our part of this user's cache folder for files of one kind; not made, maybe not writable."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "equipoise" / name


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it into place: no reader sees half of it."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with _naming(path):
            write(beside)
            flush(beside)
            os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)  # half a file takes room that may be short
        raise


def put_text(path: Path, text: str) -> None:
    """`put` a file of text."""
    put(path, lambda beside: beside.write_text(text, encoding="utf-8"))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `folder` once the block ends without error.

    After an error, or if the process dies at any moment, `folder` is whole: as it was, or new.
    Raises OSError.
    """
    folder = folder.resolve()  # what a link points to is replaced, not the link
    recover(folder)
    fresh, old = _beside(folder, "partial"), _beside(folder, "old")
    _clear(fresh, old)
    fresh.mkdir(parents=True)
    try:
        with _naming(folder):
            yield fresh
            for path in (*fresh.rglob("*"), fresh):
                flush(path)
        if not folder.exists():
            fresh.rename(folder)
        elif not _exchange(fresh, folder):
            folder.rename(old)
            fresh.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        recover(folder)
        raise
    _clear(fresh, old)


def recover(folder: Path) -> None:
    """Put back what a process that was killed while `replacing` a folder had just moved aside."""
    old = _beside(folder, "old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)


def flush(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk is an OSError that names the path: libraries leave it out, or raise their own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        number = error.errno if isinstance(error, OSError) else None
        if "No space left" in str(error):
            number = errno.ENOSPC
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _clear(fresh: Path, old: Path) -> None:
    """Remove what is left beside a folder that is in its place."""
    shutil.rmtree(fresh, ignore_errors=True)
    if old.exists():
        old.rename(fresh)  # half of it must never be taken for what `recover` puts back
        shutil.rmtree(fresh, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that there is one at either name at any moment.

    False, and nothing done, where the system or the file system cannot.
    """
    if not sys.platform.startswith("linux"):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(here, bytes(one), here, bytes(other), swap) == 0
