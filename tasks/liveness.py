"""Whether a run gets on, and where its processes stand when it does not. Linux; without Ray.

A driver's parts `beat` whenever an actor has answered. An actor's process `listens`: whoever may
look into it (its user, on its machine) can have its stacks, whatever it hangs in.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_NAME = "equipoise-stacks"
_ANSWER_SECONDS = 5.0
_last_beat = time.monotonic()


def beat() -> None:
    """An actor answered: this process's run gets on."""
    global _last_beat
    _last_beat = time.monotonic()


def silent_since() -> float:
    """When this process's run last got on, monotonic."""
    return _last_beat


def listen(role: str = "") -> None:
    """From now on this process tells `stacks_of` where its threads are; a second call does nothing.

    It is told in C, so that a thread that holds the interpreter cannot keep it from it. What is
    told is in memory: no file is left, and no other user can read it. `role`: whose log the lines
    go to that it prints from here on, `sampler-0`.
    """
    for stream in (sys.stdout, sys.stderr) if role else ():
        print(f":actor_name:{role}", file=stream, flush=True)  # what Ray's log monitor reads
    if _stack_file(os.getpid()) is None:
        faulthandler.register(signal.SIGUSR2, os.memfd_create(_NAME), all_threads=True)


def stacks_of(pid: int) -> str:
    """Where the threads of a process on this machine are, or a line that says why nobody knows."""
    try:
        stack_file, catches = _stack_file(pid), int(_status(pid)["SigCgt"], 16)
        # Who does not catch the signal would die of it.
        if stack_file is None or not catches >> (signal.SIGUSR2 - 1) & 1:
            return f"it does not listen; its state: {_status(pid)['State']}"
        before = size = stack_file.stat().st_size
        os.kill(pid, signal.SIGUSR2)
        until = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < until:
            time.sleep(0.1)
            if before < size == stack_file.stat().st_size:
                with stack_file.open("rb") as file:
                    return file.read()[before:].decode(errors="backslashreplace")
            size = stack_file.stat().st_size
        return f"no answer within {_ANSWER_SECONDS:g} s; its state: {_status(pid)['State']}"
    except OSError as error:
        return f"no such process, or not ours: {error.strerror}"


def _status(pid: int) -> dict[str, str]:
    """What the system says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _stack_file(pid: int) -> Path | None:
    """What `listen` has opened in a process."""
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(file).startswith(f"/memfd:{_NAME}"):
                return file
    return None
