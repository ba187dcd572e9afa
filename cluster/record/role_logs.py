"""`logs/sampler-0.log`, `logs/driver.log`, …: what each process of a run printed, a file a role.

What is kept cannot steer a terminal, holds no key of this process's environment, and is bounded: of
a role the last LIMIT bytes or more, in two files.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from cluster.recipe.machine import os_error_text
from cluster.recipe.sections import is_key
from cluster.record.terminal import printable

LOGS = "logs"
LIMIT = 4 * 2**20
"""Bytes of a file; what was before is in `<role>.1.log`, and before that, gone."""
LINE = 10_000
"""Characters of a line; of a longer one this is said."""
ROLES = 256
"""More than these are one file, `others.log`: what is printed may look like a role."""
KEY_LENGTH = 8
"""Values of variables that are shorter are words, not keys."""
_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours and moves of the cursor, which a progress bar is made of."""


class RoleLogs:
    """Files of lines by role, in a run's folder once that is there."""

    def __init__(self, run: Path, environment: Mapping[str, str] = os.environ) -> None:
        """Lines are held in memory until `open`, since a run that is refused writes nothing.

        `environment`: whose keys are replaced by their variables' names.
        """
        self._folder = run / LOGS
        keys = {
            line: name
            for name, value in environment.items()
            for line in value.splitlines()
            if is_key(name) and len(line) >= KEY_LENGTH
        }
        self._keys = sorted(keys.items(), key=lambda key: -len(key[0]))  # one may hold another
        self._held: list[tuple[str, str, list[str]]] = []
        self._sizes: dict[str, int] = {}
        self._process: dict[str, str] = {}
        self._lock = threading.RLock()
        self._state = "held"

    def open(self) -> None:
        """From now on, and what was held, in files."""
        with self._lock:
            self._state, held, self._held = "open", self._held, []
            for each in held:
                self.take(*each)

    def take(self, role: str, process: str, lines: Iterable[str]) -> None:
        """Lines that a process printed; where another began to speak for the role, this is said.

        A disk that takes them no more ends these logs, and is told once.
        """
        with self._lock:
            if self._state == "held":
                self._held.append((role, process, [*lines]))
            if self._state != "open":
                return
            try:
                self._write(self._named(role), process, lines)
            except OSError as error:
                self._state = "ended"
                print(f"warning: logs: {os_error_text(error)}; no more are kept", file=sys.stderr)

    def cleaned(self, line: str) -> str:
        """A line as it is kept."""
        line = _MOVES.sub("", line).rstrip("\r").rpartition("\r")[2].expandtabs()
        for value, name in self._keys:
            line = line.replace(value, f"<{name}>")
        if len(line) > LINE:
            line = f"{line[:LINE]} ... {len(line) - LINE:,} characters more"
        return printable(line)

    def _named(self, role: str) -> str:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", role)[:64].lstrip(".-") or "others"
        return name if name in self._sizes or len(self._sizes) < ROLES else "others"

    def _write(self, role: str, process: str, lines: Iterable[str]) -> None:
        file = self._folder / f"{role}.log"
        if role not in self._sizes:
            self._folder.mkdir(exist_ok=True)
            self._sizes[role] = file.stat().st_size if file.exists() else 0
        parts: list[bytes] = []
        if self._process.get(role) != process:
            self._process[role] = process
            parts.append(f"== {process}\n".encode())
        parts += (f"{self.cleaned(line)}\n".encode(errors="backslashreplace") for line in lines)
        fitting: list[bytes] = []
        for part in parts:
            if self._sizes[role] + len(part) > LIMIT:
                _append(file, fitting)
                fitting = []
                os.replace(file, self._folder / f"{role}.1.log")
                self._sizes[role] = 0
            fitting.append(part)
            self._sizes[role] += len(part)
        _append(file, fitting)


def _append(file: Path, parts: Iterable[bytes]) -> None:
    with file.open("ab") as out:
        out.writelines(parts)


@contextmanager
def driver_log(logs: RoleLogs | None) -> Iterator[None]:
    """Within, what Python prints in this process is in `driver.log` too."""
    if logs is None:
        yield
        return
    of_driver = f"process {os.getpid()}"

    def take(line: str) -> None:
        logs.take("driver", of_driver, [line])

    out, err = _Teed(sys.stdout, take), _Teed(sys.stderr, take)
    with redirect_stdout(out), redirect_stderr(err):
        yield


class _Teed:
    """A stream whose whole lines are taken, too."""

    def __init__(self, stream: Any, take: Callable[[str], None]) -> None:
        self._stream, self._take, self._begun = stream, take, ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """As the stream does."""
        with self._lock:
            *lines, begun = (self._begun + text).split("\n")
            self._begun = begun[-LINE:]  # of a bar, which ends no line
            for line in lines:
                self._take(line)
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
