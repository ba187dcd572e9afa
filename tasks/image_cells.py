"""The image cells of data files: bytes, structs, paths, base64, data URIs, URLs, lists of them."""

from __future__ import annotations

import base64
import re
import reprlib
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from tasks.core import DataError
from tasks.files import put, user_cache
from tasks.images import content_hash

MAX_FILE_BYTES = 64 * 2**20
FETCH_SECONDS = 20.0
PATIENCE = 3
"""Failures to fetch from a host after which it is asked no more."""
_BASE64_HEADS = ("iVBORw0KGgo", "/9j/", "UklGR")
"""How PNG, JPEG and WebP files begin as base64."""


@dataclass
class Beside:
    """Where the paths in a data file are looked for: folders, then the zip files in them."""

    folders: Sequence[Path]
    fetches: bool = False
    """Whether a URL is fetched, once, into the user's cache; if not, it is refused."""
    touched: dict[str, list[int] | None] = field(default_factory=dict, repr=False)
    """What was read, by path: size and time of each file; None where there was none."""
    _failed: Counter[str] = field(default_factory=Counter, repr=False)

    def untouched(self, touched: Mapping[str, list[int] | None]) -> bool:
        """Whether these files are still as they were, and none is there now that was missing."""
        return all(
            not self.holds(path) if state is None else _state(Path(path)) == state
            for path, state in touched.items()
        )

    def holds(self, path: str) -> bool:
        """Whether a path names a file in the folders."""
        try:
            return self._file(path) is not None
        except (OSError, ValueError):  # too long for a path
            return False

    def read(self, path: str) -> bytes:
        """The bytes that a path or a URL names. Raises DataError."""
        if re.match(r"\w+://", path):
            return self._fetched(path)
        try:
            file = self._file(path)
            self.touched[str(file or path)] = _state(file) if file else None
            if file is not None and file.stat().st_size <= MAX_FILE_BYTES:
                return file.read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{shown(path)} cannot be read ({reason}); check the path") from error
        if file is not None:
            _too_large(path)
        return self._unzipped(path)

    def _file(self, path: str) -> Path | None:
        # A device or a pipe would never end.
        return next((f / path for f in self.folders if (f / path).is_file()), None)

    def _unzipped(self, path: str) -> bytes:
        member_at = self._members.get(str(PurePosixPath(path)))
        if member_at is None:
            where = f" nor in a zip there ({', '.join(z.name for z in self._zips)})"
            raise DataError(
                f"no file {shown(path)} in {self.folders[0]}{where if self._zips else ''}; "
                "paths are relative to the data"
            )
        archive, member = member_at
        if member.file_size > MAX_FILE_BYTES:
            _too_large(path)
        self.touched[str(archive)] = _state(archive)
        try:
            with zipfile.ZipFile(archive) as opened, opened.open(member) as stream:
                return stream.read(MAX_FILE_BYTES)
        except (OSError, RuntimeError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"{shown(path)} in {archive.name} cannot be read ({error})") from error

    @cached_property
    def _zips(self) -> list[Path]:
        return sorted(p for folder in self.folders for p in folder.glob("*.zip") if p.is_file())

    @cached_property
    def _members(self) -> dict[str, tuple[Path, zipfile.ZipInfo]]:
        """Members by the paths that rows may name them by: their own, below the zip's name, and
        without their first folder; a member's own path goes first."""
        archived: dict[str, tuple[Path, zipfile.ZipInfo]] = {}
        loose: dict[str, tuple[Path, zipfile.ZipInfo]] = {}
        for archive in self._zips:
            try:
                with zipfile.ZipFile(archive) as opened:
                    members = [m for m in opened.infolist() if not m.is_dir()]
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(
                    f"{archive}: not a whole zip file ({error}); copy it again"
                ) from error
            for member in members:
                path = PurePosixPath(member.filename)
                archived.setdefault(str(path), (archive, member))
                loose.setdefault(str(archive.stem / path), (archive, member))
                if len(path.parts) > 1:
                    loose.setdefault(str(PurePosixPath(*path.parts[1:])), (archive, member))
        return loose | archived

    def _fetched(self, url: str) -> bytes:
        if not self.fetches or not url.lower().startswith(("http://", "https://")):
            raise DataError(f"{shown(url)} is a URL; store the file itself, or its path")
        cached = user_cache("images") / content_hash(url.encode())
        if cached.is_file():
            return cached.read_bytes()
        host = url.split("/")[2]
        if self._failed[host] >= PATIENCE:
            raise DataError(f"{shown(url)} cannot be fetched: {host} did not answer before")
        try:
            with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as reply:
                data: bytes = reply.read(MAX_FILE_BYTES + 1)
        except (OSError, ValueError) as error:
            self._failed[host] += 1
            raise DataError(f"{shown(url)} cannot be fetched ({error})") from error
        if len(data) > MAX_FILE_BYTES:
            _too_large(url)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            put(cached, lambda beside: beside.write_bytes(data))
        except OSError:
            pass  # it is fetched again
        return data


def cell_images(value: Any, beside: Beside) -> tuple[bytes, ...]:
    """All images of a cell, which may have none (null, an empty text, list or struct).

    Raises DataError.
    """
    if isinstance(value, list | tuple):
        return tuple(data for one in value for data in cell_images(one, beside))
    named = value.values() if isinstance(value, dict) else (value,)
    empty = all(one is None or one == "" for one in named)
    return () if empty else (image_bytes(value, beside),)


def image_bytes(value: Any, beside: Beside) -> bytes:
    """An image file's bytes, from any of the forms in which a cell holds one. Raises DataError."""
    cell = value
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, list):
        raise DataError(f"a list of {len(value)}, {shown(cell)}; a row has one image")
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str | bytes) and len(value) > MAX_FILE_BYTES * 4 // 3 + 4:  # as base64
        raise DataError(f"a cell of {len(value)} bytes; scale the image down")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{shown(cell)}; wanted bytes, a struct of bytes and path, a path, base64 or a data URI"
        )
    if value[:5].lower() == "data:":
        head, _, value = value.partition(",")
        if not head.lower().endswith(";base64"):
            raise DataError(f"{shown(cell)}: a data URI without base64; store the bytes")
    elif not value.lstrip().startswith(_BASE64_HEADS) or beside.holds(value):
        return beside.read(value)
    try:
        letters = "".join(value.split()).rstrip("=")
        alphabet = b"+/" if {"+", "/"} & {*letters} else b"-_"
        return base64.b64decode(letters + "=" * (-len(letters) % 4), alphabet, validate=True)
    except ValueError as error:
        raise DataError(f"{shown(cell)}: damaged base64 ({error})") from error


def _state(file: Path) -> list[int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _too_large(path: str) -> NoReturn:
    raise DataError(f"{shown(path)} is over {MAX_FILE_BYTES} bytes; scale it down")


def shown(value: Any) -> str:
    """What a value is, in a few words, however large or deep it is."""
    if isinstance(value, str):
        return repr(value) if len(value) < 80 else f"{value[:40]!r}... of {len(value)} characters"
    return f"{type(value).__name__} {reprlib.repr(value)}"[:80]
