"""What is named by URI (`s3://…`, `gs://…`, `file:///…`), fetched once a node and kept by content.

A run pins what it is given (`pinned`): `s3://bucket/policy#sha256=…` is one content for ever.
Whoever reads a model's or data's files, in whatever process on whatever node, asks `fetched` where
they are: it gives this node's copy of that content, brought first where there is none, or raises.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from tasks.core import DataError
from tasks.files import put_text, replacing, user_cache
from tasks.wheels import sha256_of

Say = Callable[[str], None]

PIN = re.compile(r"(.+)#sha256=([0-9a-f]{64})", re.DOTALL)
OF_A_MODEL = {".safetensors", ".json", ".txt", ".jinja", ".model"}
"""Of a model's folder what ends otherwise stays where it is: pickles, Python, other states."""
TRIES = 3
"""For a file whose bytes do not all come."""
TELL_SECONDS = 10.0
EXTRAS = {"s3fs": "s3", "gcsfs": "gcs"}
REMEDY = "is the address right, the network up, and are its keys in the environment?"


def is_uri(place: str) -> bool:
    """Whether it names files by URI; else it is a path or a name on the hub."""
    return "://" in place


def opened(uri: str) -> tuple[Any, str]:
    """The file system that a URI names, and the path in it.

    Raises DataError: an unknown protocol, one upon another, a package that is not installed, what
    may be keys in the URI.
    """
    import fsspec

    parts = urlsplit(uri)
    if parts.username or parts.password or parts.query:
        raise DataError("keys in a URI would be stored with the run; set them in the environment")
    if "::" in uri:
        raise DataError(f"{uri}: one protocol upon another is not read; unpack what is there")
    try:
        file_system, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        extra = next((e for package, e in EXTRAS.items() if package in str(error)), "")
        install = f'; pip install "equipoise[{extra}]"' if extra else ""
        raise DataError(f"{uri}: {error}{install}") from error
    except ValueError as error:
        raise DataError(f"{uri}: {error}") from error
    return file_system, str(path).rstrip("/")


def pinned(uri: str, say: Say, *, weights: bool = False, fetch: bool = True) -> str:
    """A URI with the hash of what lies there now, which this node has by then.

    Args:
        uri: a file or folder; one that is pinned is looked for in the cache first, without network.
        say: told size and progress.
        weights: it is a model's, so a folder with `config.json` and safetensors.
        fetch: without it, a URI that this node has not the present content of comes back as it is.

    Raises DataError, a line: nothing there, no network, no room, no model.
    """
    if pin := PIN.fullmatch(uri):
        if _place(pin[2]) is None and fetch:
            _bring(pin[1], say, weights, pin[2])
        return uri
    with _asking(uri):
        there = _There.at(uri)
    there.require(weights)
    digest = _known(there)
    if not digest and not fetch:
        return uri
    return f"{uri}#sha256={digest or _bring(uri, say, weights)}"


def local(place: str) -> str:
    """Where a pinned URI's content is on this node; all else, and what is not here, as it is."""
    pin = PIN.fullmatch(place)
    return str((pin and _place(pin[2])) or place)


def fetched(place: str) -> str:
    """`local`, once this node has the content of a pinned URI.

    Raises DataError for content that cannot be had, or is other than what was pinned.
    """
    pin = PIN.fullmatch(place)
    if pin and _place(pin[2]) is None:
        _bring(pin[1], _tell, False, pin[2])
    return local(place)


class _There:
    """What lies at a URI: `files` is name -> (size, all that its file system says of it)."""

    def __init__(self, uri: str, file_system: Any, root: str, files: dict[str, tuple[int, str]]):
        self.uri, self.file_system, self.root, self.files = uri, file_system, root, files
        self.name = PurePosixPath(root).name or "files"
        self.is_file = [*files] == ["."]

    @classmethod
    def at(cls, uri: str) -> _There:
        """Ask its file system, which may raise anything; raises DataError for names that lead out
        of the folder."""
        file_system, root = opened(uri)
        file_system.invalidate_cache()
        files = {}
        for path, info in file_system.find(root, detail=True).items():
            name = str(PurePosixPath(path).relative_to(root))
            parts = PurePosixPath(name).parts
            if ".." in parts or "\\" in name or "\0" in name:
                raise DataError(f"{uri}: {name!r} there leads out of its folder; rename it")
            if not any(part.startswith(".") for part in parts):
                said = json.dumps(info, default=str, sort_keys=True)
                files[name] = int(info["size"] or 0), said
        if "config.json" in files and any(name.endswith(".safetensors") for name in files):
            files = {
                name: stamp
                for name, stamp in files.items()
                if "/" not in name and PurePosixPath(name).suffix in OF_A_MODEL
            }
        return cls(uri, file_system, root, files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    @property
    def stamp(self) -> str:
        """Changes with anything there."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    def require(self, weights: bool) -> None:
        """Raise DataError where there is nothing, or no model's weights."""
        if not self.files:
            raise DataError(f"{self.uri}: nothing is there; {REMEDY}")
        if weights and not any(name.endswith(".safetensors") for name in self.files):
            raise DataError(
                f"{self.uri}: no folder of a model: it holds config.json and the weights as "
                "safetensors, nothing else is read"
            )

    def get(self, folder: Path, say: Say) -> str:
        """Bring all of it below a folder; the hash of its content."""
        from fsspec.callbacks import Callback

        whole, digest = f"{_mib(self.size)} MiB", hashlib.sha256(f"{self.name}\n".encode())
        begun, last = 0, time.monotonic()

        def tell(size: int, value: int, **_: Any) -> None:
            nonlocal last
            if time.monotonic() - last >= TELL_SECONDS:
                last = time.monotonic()
                say(f"{self.uri}: {_mib(begun + value)} of {whole}")

        for name, (size, _) in sorted(self.files.items()):
            target = folder / self.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            remote = self.root if self.is_file else f"{self.root}/{name}"
            for left in reversed(range(TRIES)):
                callback = Callback(hooks={"tell": tell})
                self.file_system.get_file(remote, str(target), callback=callback)
                if (came := target.stat().st_size) == size:
                    break
                if not left:
                    raise DataError(f"{self.uri}: {name}: {came:,} of {size:,} bytes came")
            begun += size
            digest.update(f"{name}\0{size}\0{sha256_of(target)}\n".encode())
        return digest.hexdigest()


def _cache() -> Path:
    folder = user_cache("fetched")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from error
    return folder


def _place(digest: str) -> Path | None:
    """Where this node has a content whole, by the sizes of its files."""
    entry = user_cache("fetched") / digest
    try:
        kept = json.loads(entry.with_suffix(".json").read_text(encoding="utf-8"))
        whole = all((entry / n).stat().st_size == size for n, size in kept["files"].items())
        return entry / kept["name"] if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _index(uri: str) -> Path:
    """The file that says which content was last fetched from a URI."""
    return _cache() / f"{hashlib.sha256(uri.encode()).hexdigest()}.uri.json"


def _known(there: _There) -> str:
    """The hash of what is there, if this node has it: nothing has changed since it was fetched."""
    try:
        last: Mapping[str, str] = json.loads(_index(there.uri).read_text(encoding="utf-8"))
        digest = last["digest"] if last["stamp"] == there.stamp else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return digest if digest and _place(digest) else ""


def _bring(uri: str, say: Say, weights: bool, wanted: str = "") -> str:
    """Fetch what is there and return its hash, which must be `wanted`, where that is given."""
    with _asking(uri), _alone(uri, say):
        if wanted and _place(wanted):  # by now: another process of this node fetched it
            return wanted
        there = _There.at(uri)
        there.require(weights)
        if not wanted and (digest := _known(there)):
            return digest
        cache = _cache()
        if (free := shutil.disk_usage(cache).free) < there.size:
            raise DataError(
                f"{uri}: {_mib(there.size)} MiB are to be fetched, and {_mib(free)} MiB are free "
                f"in {cache}; free some, or set XDG_CACHE_HOME to a folder with more"
            )
        say(f"{uri}: fetching {len(there.files)} files, {_mib(there.size)} MiB, into {cache}")
        with tempfile.TemporaryDirectory(dir=cache, prefix=".coming-") as coming:
            digest = there.get(Path(coming), say)
            if _There.at(uri).stamp != there.stamp:
                raise DataError(f"{uri}: it was changed while it was fetched; try again")
            if wanted and digest != wanted:
                raise DataError(
                    f"{uri}: other content lies there (sha256 {digest[:12]}…) than the run was "
                    f"started with ({wanted[:12]}…); put that back, or start another run"
                )
            entry = cache / digest
            if _place(digest) is None:
                sizes = {
                    str(file.relative_to(coming)): file.stat().st_size
                    for file in Path(coming).rglob("*")
                    if file.is_file()
                }
                with replacing(entry) as fresh:
                    (Path(coming) / there.name).rename(fresh / there.name)
                kept = {"uri": uri, "name": there.name, "files": sizes}
                put_text(entry.with_suffix(".json"), json.dumps(kept))
        put_text(_index(uri), json.dumps({"stamp": there.stamp, "digest": digest}))
        return digest


@contextmanager
def _alone(uri: str, say: Say) -> Iterator[None]:
    """One fetch at a time on a node; whoever comes second finds what the first has brought."""
    cache = _cache()
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{uri}: waiting for another process of this node that fetches ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(".coming-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def _asking(uri: str) -> Iterator[None]:
    """Whatever a file system raises becomes a DataError that names the URI."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        why = (str(error).splitlines() or [""])[0]
        raise DataError(f"{uri}: {type(error).__name__}: {why}; {REMEDY}") from error


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
