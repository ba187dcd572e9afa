"""Asks the process of `algebra_process` whether pairs of expressions are equivalent."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

START_SECONDS = 120.0
"""The process imports for 1 to 4 s, longer where many start at once."""
CPU_SECONDS = 1.0
"""For all pairs of a question; the slowest honest one of the tests' table takes a third of it."""
ANSWER_SECONDS = 60.0
"""Its own deadline is on the processor's time; this one is for a process that was stopped."""

Pairs = tuple[tuple[str, str], ...]


class AlgebraError(RuntimeError):
    """There is no process: no verdict can be had, which is not the same as wrong."""


class TooLong(Exception):
    """A question took more than its time or memory: what was said is wrong."""


class Algebra:
    """The process: started when first asked, started again when lost. Any thread may ask."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def equivalent(self, pairs: Pairs) -> tuple[bool, ...] | None:
        """A verdict a pair, (gold, said); None where they take too long together.

        Raises:
            AlgebraError: the process does not start, or does not live.
        """
        line = json.dumps(pairs).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # it may have been killed since the last question
                process = self._running()
                try:
                    verdicts = self._ask(process, line)
                except TimeoutError:
                    self._end()
                    verdicts = None
                except OSError:
                    self._end()
                    continue
                return None if verdicts is None else tuple(verdicts)
        raise AlgebraError("checker expression: its process was killed twice; is memory short?")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """In a fork, the process is the parent's: let go of its pipes."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            _close_pipes(process)
            process.returncode = 0  # not ours to wait for

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            if self._process.poll() is None:
                return self._process
            self._end()  # its fork may live on
        script = Path(__file__).with_name("algebra_process.py")
        # -P: modules beside the script must not stand in for libraries of the same name.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(self._cpu_seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True, bufsize=0,
        )  # fmt: skip
        try:
            _line(self._process, START_SECONDS)
        except OSError as error:
            code = self._end()
            raise AlgebraError(
                f"checker expression: its process did not start ({error or code}); "
                f"see what `{sys.executable} -P {script}` says"
            ) from error
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], line: bytes) -> list[bool] | None:
        """The verdicts, or None: the fork did not live to give them."""
        assert process.stdin is not None
        process.stdin.write(line)
        word: list[bool] | int = json.loads(_line(process, ANSWER_SECONDS))
        if word in (-signal.SIGKILL, -signal.SIGTERM):
            raise ConnectionError("somebody ended it")  # perhaps before it read this question
        return word if isinstance(word, list) else None

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its fork
        _close_pipes(process)
        return process.wait()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """One line of what it says.

    Raises TimeoutError, or ConnectionError where it has ended.
    """
    assert process.stdout is not None
    line, deadline, ready = b"", time.monotonic() + seconds, select.poll()
    ready.register(process.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        seconds_left = deadline - time.monotonic()
        if seconds_left <= 0 or not ready.poll(1000 * seconds_left):
            raise TimeoutError(f"no word in {seconds:g} s")
        part = os.read(process.stdout.fileno(), 65_536)
        if not part:
            raise ConnectionError("it ended")
        line += part
    return line


_ALGEBRA = Algebra()
os.register_at_fork(after_in_child=_ALGEBRA.forget)


def equivalent(pairs: Pairs) -> tuple[bool, ...]:
    """As `Algebra.equivalent`, of one process for all of this one.

    Raises TooLong, and AlgebraError.
    """
    if (verdicts := _remembered(pairs)) is None:
        raise TooLong
    return verdicts


@lru_cache(maxsize=4096)
def _remembered(pairs: Pairs) -> tuple[bool, ...] | None:
    return _ALGEBRA.equivalent(pairs)  # a group's rollouts repeat one another
