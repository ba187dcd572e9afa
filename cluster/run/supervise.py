"""Above a run's driver: a process that starts it again from its last checkpoint when it dies.

The driver cannot do it: what takes a rank, a node or the machine's memory takes the driver too,
and a Ray that lost a node is best left with the process. What is decided is pure (`why_not`).
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cluster.recipe.machine import killed_by
from cluster.record.events import ENDINGS, FOR_GOOD, Event, add_events, read_events
from cluster.record.stored import last_step
from learner.checkpoint import checkpoint_folders

SUPERVISED = "EQUIPOISE_SUPERVISED"
"""Set in the environment of a driver that has a supervisor."""
LEFT_SECONDS = 20
"""What a dead driver leaves behind ends by itself within this, or is killed."""
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


@dataclass(frozen=True)
class End:
    """How a driver ended other than well.

    code: its exit code, negative: the signal that killed it. step: the last it logged.
    """

    code: int
    why: str
    step: int
    for_good: bool = False

    def like(self, other: End) -> bool:
        """The same cause at the same step; processes, ports and times in it do not count."""
        return self.step == other.step and _plain(self.why) == _plain(other.why)


def why_not(ends: Sequence[End], budget: int, saved: bool) -> str:
    """Why a run that ended like the last of `ends` is not started again; "" where it is.

    `budget`: of restarts. `saved`: whether there is a checkpoint to go on from.
    """
    last = ends[-1]
    if last.code == 2 or last.for_good:
        return "it would only end the same way again"
    if not saved:
        return "there is no checkpoint to go on from yet"
    if any(last.like(other) for other in ends[:-1]):
        return f"it ended after step {last.step} for the same reason before"
    if len(ends) > budget:
        return f"it was started again checkpoint.restarts = {budget} times"
    return ""


def supervise(first: Sequence[str], resume_command: Sequence[str], run: Path, budget: int) -> int:
    """Run a driver, and again where it dies; its exit code, 128 + n for the signal n.

    `first`, `resume_command`: words of the command, to begin with and to go on. A SIGTERM or Ctrl-C
    is handed on to the driver, which saves and ends; it is not started again then.
    """
    ends: list[End] = []
    nurse = _Nurse()
    with nurse:
        command = first
        while True:
            before = len(read_events(run))
            code = nurse.run(command)
            if code == 0 or nurse.stop_requested or not run.is_dir():
                return _exit_code(code)
            end = end_of(run, code, before)
            ends.append(end)
            reason = why_not(ends, budget, bool(checkpoint_folders(run)))
            kind = "gave up" if reason else "restart"
            with suppress(OSError):  # a full disk may be what ended the run
                add_events(run, Event("supervisor", kind, reason or end.why))
            if reason:
                _say(f"not started again: {reason}; {end.why}")
                return _exit_code(code)
            _say(f"restart {len(ends)} of {budget}, from the last checkpoint: {end.why}")
            command = resume_command


def end_of(run: Path, code: int, before: int) -> End:
    """How a driver ended that began after so many events, whatever the clock said since.

    One that could not tell is told of in the events.
    """
    of_driver = [event for event in read_events(run)[before:] if event.who == "driver"]
    step = last_step(run)
    if of_driver and of_driver[-1].what in ENDINGS:
        return End(code, of_driver[-1].why, step, of_driver[-1].what == FOR_GOOD)
    why = f"exit code {code}"
    if code < 0:
        why = killed_by(-code)
    if code != 2:
        with suppress(OSError):
            add_events(run, Event("driver", "died", why))
    return End(code, why, step)


def driver_command(words: Sequence[str]) -> list[str]:
    """How `equipoise WORDS` is started in a process of its own."""
    return [sys.executable, "-m", "cluster", *words]


class _Nurse:
    """Starts drivers, one after another, hands signals on to them, and buries what they leave."""

    stop_requested = False

    def __init__(self) -> None:
        self._driver: subprocess.Popen[bytes] | None = None
        self._before = {int(n): signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self) -> None:
        _prctl(_SET_CHILD_SUBREAPER, 1)
        for number in self._before:
            signal.signal(number, self._hand_on)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """A driver's exit code, once nothing of it is left."""
        # A group of its own: a terminal's Ctrl-C comes to it once, from here. It ends with us.
        self._driver = subprocess.Popen(
            driver_command(command),
            env=os.environ | {SUPERVISED: "1"},
            process_group=0,
            preexec_fn=lambda: _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM),
        )
        if self.stop_requested:
            self._driver.send_signal(signal.SIGTERM)
        code = self._driver.wait()
        self._driver = None
        _bury(LEFT_SECONDS)
        return code

    def _hand_on(self, number: int, _: FrameType | None) -> None:
        self.stop_requested = True
        if self._driver is not None:
            self._driver.send_signal(number)


def _bury(seconds: float) -> None:
    """Wait for what came to us from a dead driver, engines that hold memory say, then kill it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until + seconds:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        if time.monotonic() > until:
            below = Path(f"/proc/self/task/{os.getpid()}/children")
            for pid in below.read_text().split() if below.exists() else ():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _plain(why: str) -> str:
    return re.sub(r"\b[0-9a-f]{6,}\b|\d+", "#", why)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _say(line: str) -> None:
    print(f"supervisor: {line}", file=sys.stderr, flush=True)
