"""Starting an engine: a path of any name for it, and its own words when it does not start."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG

PLAIN = re.compile(r"[\w./-]+", re.ASCII)
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\)\s*)?((ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\]\s*)?")
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b")
_EMPTY = "See root cause above"


class EngineNotStarted(RuntimeError):
    """An engine that did not start; the message names the model and the engine's own last error."""


def plain_path(model: str) -> str:
    """A model's path as vLLM can be given it, which finds the weights by a pattern.

    A folder of another name than letters, digits, `_`, `.` and `-` is reached by a link in the
    folder for temporary files; hub names stay as they are.
    """
    if PLAIN.fullmatch(model) or not os.path.isdir(model):
        return model
    place = tempfile.gettempdir()
    target = os.path.realpath(model)
    name = f"equipoise-model-{os.getuid()}-{hashlib.sha256(os.fsencode(target)).hexdigest()[:16]}"
    link = Path(place if PLAIN.fullmatch(place) else "/tmp", name)
    fresh = link.with_name(f"{name}.{os.getpid()}")
    fresh.symlink_to(target)
    os.replace(fresh, link)
    return str(link)


@contextmanager
def own_errors(model: str) -> Iterator[None]:
    """Within, an engine that does not start raises EngineNotStarted with its own last error.

    It starts in a process of its own, and tells why it does not on the output that it shares with
    this one; that of an actor is a file.
    """
    before = {descriptor: _length(descriptor) for descriptor in (1, 2)}
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        if _EMPTY in why:
            written = "".join(_written(descriptor, at) for descriptor, at in before.items())
            why = last_error(written) or why
        raise EngineNotStarted(f"model {model}: the engine does not start: {why}") from error


def own_words(message: str) -> str:
    """What an engine that did not start said, of a longer message about its actor; else that."""
    said = re.findall(r"EngineNotStarted: (.*)", message)
    return said[-1] if said else message


def last_error(output: str) -> str:
    """The line of an output that names an error: the last `SomeError: ...`; "" without one."""
    lines = [_PREFIX.sub("", line.strip()).strip() for line in output.splitlines()]
    named = [line for line in lines if _ERROR.match(line) and _EMPTY not in line]
    return named[-1][:300] if named else ""


def _length(descriptor: int) -> int:
    with suppress(OSError):
        status = os.fstat(descriptor)
        return status.st_size if S_ISREG(status.st_mode) else -1
    return -1


def _written(descriptor: int, start: int) -> str:
    """What was written to a file since it had a length; nothing of what is no file."""
    if start < 0:
        return ""
    with suppress(OSError), open(f"/proc/self/fd/{descriptor}", "rb") as file:
        file.seek(start)
        return file.read().decode("utf-8", "replace")
    return ""
