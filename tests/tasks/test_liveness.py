"""Where a process stands is told from outside of it, whatever it hangs in; and nobody is hurt."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tasks.liveness import stacks_of
from tests.support.recipes import ROOT
from tests.support.waiting import until

Started = Callable[[str], subprocess.Popen[str]]
HANGS = """
import signal, sys, threading
from tasks.liveness import listen
listen(); listen()
def waits_for_ever():
    {what}
def another_thread():
    threading.Event().wait()
threading.Thread(target=another_thread, daemon=True).start()
print("up", flush=True)
waits_for_ever()
"""
# The first is in C and holds the interpreter, so that no thread of Python's could tell.
IN_C = "import re; re.match(r'(a|aa)+$', 'a' * 200 + 'b')"
IN_PYTHON = "threading.Event().wait()"


@pytest.fixture
def started() -> Iterator[Started]:
    """Starts a process of some lines that prints once it is up."""
    made: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code]
        made.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert made[-1].stdout and made[-1].stdout.readline() == "up\n"
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()


@pytest.mark.parametrize("what", [IN_C, IN_PYTHON], ids=["in C", "in Python"])
def test_each_thread_of_a_process_that_hangs_is_told_of_each_time(
    started: Started, what: str
) -> None:
    process = started(HANGS.format(what=what))
    until(lambda: "in waits_for_ever" in stacks_of(process.pid), 60)  # it is up, and about to
    for _ in range(2):
        told = stacks_of(process.pid)
        assert told.count("in waits_for_ever") == told.count("in another_thread") == 1
    assert process.poll() is None


def test_of_one_that_cannot_tell_the_state_is_told_and_it_lives_on(started: Started) -> None:
    frozen = started(HANGS.format(what=IN_PYTHON))
    frozen.send_signal(signal.SIGSTOP)
    assert "T (stopped)" in stacks_of(frozen.pid)
    frozen.send_signal(signal.SIGCONT)
    silent = started("import time; print('up', flush=True); time.sleep(600)")
    assert stacks_of(silent.pid).startswith("it does not listen; its state: ")
    assert silent.poll() is None
    silent.kill()
    silent.wait()
    assert stacks_of(silent.pid).startswith("no such process")
