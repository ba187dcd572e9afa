"""The process that compares expressions: deadlines, loss, threads, forks, orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tasks.checkers import CHECKERS, Gold
from tasks.checkers import algebra as module
from tasks.checkers.algebra import Algebra, AlgebraError

SAME = (("x^2+2x+1", "(x+1)^2"),)
ENDLESS = (("1.5", "9^{9^{9^9}}"),)
PATIENCE = 60.0


@pytest.fixture(scope="module")
def algebra() -> Iterator[Algebra]:
    made = Algebra(cpu_seconds=1.0)
    yield made
    made.close()


def process_of(algebra: Algebra) -> psutil.Process:
    algebra.equivalent(SAME)
    assert algebra._process is not None
    return psutil.Process(algebra._process.pid)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_an_endless_pair_is_wrong_and_costs_no_new_start(algebra: Algebra) -> None:
    process = process_of(algebra)
    assert algebra.equivalent(ENDLESS) is None
    assert algebra.equivalent(SAME) == (True,)
    assert process_of(algebra) == process


def test_a_process_or_fork_that_was_killed_is_started_again(algebra: Algebra) -> None:
    process = process_of(algebra)
    fork = process.children()[0]
    fork.kill()
    assert gone([fork])
    assert algebra.equivalent((("2a", "a+a"), ("2a", "a"))) == (True, False)
    assert algebra.equivalent((("2a", "a"), ("2a", "a+a"))) == (False, True), "one answer late"
    process = process_of(algebra)
    process.kill()
    assert gone([process])
    assert algebra.equivalent(SAME) == (True,)
    assert process_of(algebra) != process


def test_threads_share_it(algebra: Algebra) -> None:
    def ask(n: int) -> bool:
        return algebra.equivalent(((f"{n}x+{n}x", f"{2 * n}x"), (f"{n}x", f"{n + 1}x"))) == (
            True,
            False,
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(1, 33)))


def test_a_fork_asks_a_process_of_its_own() -> None:
    own = process_of(module._ALGEBRA).pid
    fork = os.fork()
    if not fork:  # the copy must end here, whatever happens
        verdict = 1
        try:
            other = process_of(module._ALGEBRA).pid
            verdict = not (other != own and module._ALGEBRA.equivalent(SAME) == (True,))
            module._ALGEBRA.close()
        finally:
            os._exit(verdict)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0
    assert process_of(module._ALGEBRA).pid == own


def test_no_process_outlives_who_asked_and_the_libraries_stay_in_it() -> None:
    script = """
import sys, time
from tasks.checkers import CHECKERS, Gold, algebra
assert CHECKERS["expression"].right("x+x", Gold(("2x",)))
assert not {"math_verify", "sympy", "scipy"} & set(sys.modules)
print(algebra._ALGEBRA._process.pid, flush=True)
CHECKERS["expression"].right("9^{9^{9^9}}", Gold(("x",))) if sys.argv[1] == "busy" else 0
time.sleep(600)
"""
    for state in ("idle", "busy"):
        asker = subprocess.Popen([sys.executable, "-c", script, state], stdout=subprocess.PIPE)
        assert asker.stdout is not None
        process = psutil.Process(int(asker.stdout.readline()))
        until = time.monotonic() + PATIENCE
        while len(both := [process, *process.children()]) < 2:  # a fork in place of a slow one
            assert time.monotonic() < until, state
        asker.send_signal(signal.SIGKILL)
        asker.wait()
        asker.stdout.close()
        assert gone(both), state


def test_what_cannot_start_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(AlgebraError, match="did not start"):
        Algebra().equivalent(SAME)


def test_plain_answers_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pairs: object) -> tuple[bool, ...]:
        raise AssertionError(pairs)

    monkeypatch.setattr("tasks.checkers.expression.equivalent", refuse)
    right = CHECKERS["expression"].right
    assert right("6/4", Gold(("1.5",))) and not right("7", Gold(("1.5",)))
    assert right(r"\boxed{x^2}", Gold(("x^2",))) and right("(1, 2)", Gold(("(1,2)",)))
    assert not right("9" * 100_000, Gold(("x",)))
    assert module.equivalent is not refuse
