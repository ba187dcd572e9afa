"""Who starts a run again, and when not: the rule by properties, the processes with plain drivers.

That a real run goes on when a learner rank dies is in `test_faults.py`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.recipe.recipe import RecipeError, load_recipe
from cluster.record.events import FOR_GOOD, read_events
from cluster.run.supervise import End, why_not
from tests.support.recipes import ROOT, recipe_file

CODES = st.sampled_from([1, 2, -9, -11, 137])
DIFFERENT = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1, max_size=6)


@given(causes=DIFFERENT, budget=st.integers(0, 6), code=st.sampled_from([1, -9, 137]))
def test_a_budget_of_restarts_is_spent_and_no_more(
    causes: list[str], budget: int, code: int
) -> None:
    """Causes that differ, at one step: started again exactly `budget` times."""
    ends = [End(code, cause, 7) for cause in causes]
    refused = [bool(why_not(ends[: n + 1], budget, True)) for n in range(len(ends))]
    assert refused == [n >= budget for n in range(len(ends))]


@given(code=CODES, good=st.booleans(), saved=st.booleans())
def test_what_would_come_again_is_not_retried(code: int, good: bool, saved: bool) -> None:
    reason = why_not([End(code, "why", 3, good)], 9, saved)
    assert bool(reason) == (code == 2 or good or not saved)


@given(
    pids=st.tuples(*[st.integers(1, 99999)] * 2),
    ids=st.tuples(*[st.text("0123456789abcdef", min_size=16, max_size=16)] * 2),
    steps=st.tuples(*[st.integers(0, 3)] * 2),
    other=st.booleans(),
)
def test_the_same_cause_at_the_same_step_ends_it(
    pids: tuple[int, int], ids: tuple[str, str], steps: tuple[int, int], other: bool
) -> None:
    one, two = (
        f"rank 0 died: pid {pid}, actor {name}" for pid, name in zip(pids, ids, strict=True)
    )
    ends = [End(1, one, steps[0]), End(1, f"not {two}" if other else two, steps[1])]
    assert bool(why_not(ends, 9, True)) == (steps[0] == steps[1] and not other)


def test_restarts_without_a_checkpoint_to_go_on_from_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"checkpoint\.restarts: got 2.*checkpoint\.every is 0"):
        load_recipe(recipe_file(tmp_path, "checkpoint.restarts = 2"))


SUPERVISOR = """
import sys
from pathlib import Path
import cluster.run.supervise as s
def command(words):
    return [sys.executable, "-c", *words]
s.driver_command, s.LEFT_SECONDS = command, 1
code, run, budget = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
sys.exit(s.supervise([code, "first", str(run)], [code, "again", str(run)], run, budget))
"""
DRIVER = """
import os, signal, sys, time
from pathlib import Path
from cluster.record.events import Event, add_events
how, run = sys.argv[1], Path(sys.argv[2])
(run / "checkpoints" / "step-000001").mkdir(parents=True, exist_ok=True)
lives = run / "lives"
lives.write_text((lives.read_text() if lives.exists() else "") + how + "\\n")
def end(code, what, why):
    add_events(run, Event("driver", what, why)); sys.exit(code)
"""


@pytest.fixture
def supervised(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a supervisor of a driver that is only a few lines of Python."""

    def start(driver: str, budget: int = 3) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", SUPERVISOR, DRIVER + driver, str(tmp_path), str(budget)]
        own = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(words, cwd=ROOT, env=own, stdout=subprocess.PIPE, text=True)

    return start


def told(run: Path) -> list[tuple[str, str]]:
    return [(event.who, event.what) for event in read_events(run)]


@pytest.mark.parametrize(
    ("blow", "meant"),
    [("SIGKILL", ""), ("SIGBUS", ": /dev/shm, or the disk .* was full; .*-shm-size")],
)
def test_a_driver_that_is_killed_goes_on_and_ends_well(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path, blow: str, meant: str
) -> None:
    code = f"if how == 'first': os.kill(os.getpid(), signal.{blow})\nend(0, 'ended', '')"
    assert supervised(code).wait(300) == 0
    assert (tmp_path / "lives").read_text().split() == ["first", "again"]
    assert told(tmp_path) == [("driver", "died"), ("supervisor", "restart"), ("driver", "ended")]
    assert re.fullmatch(f"killed by {blow}{meant}", read_events(tmp_path)[1].why)


def test_a_failure_that_comes_again_ends_it_with_the_reason(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    assert supervised("end(1, 'failed', f'rank died, pid {os.getpid()}')").wait(300) == 1
    assert told(tmp_path) == [
        *[("driver", "failed"), ("supervisor", "restart")],
        *[("driver", "failed"), ("supervisor", "gave up")],
    ]
    assert "same reason before" in read_events(tmp_path)[-1].why


def test_a_failure_for_good_is_not_tried_again(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    assert supervised(f"end(1, {FOR_GOOD!r}, 'the disk is full')").wait(300) == 1
    assert told(tmp_path) == [("driver", FOR_GOOD), ("supervisor", "gave up")]


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_clock_that_jumps_an_hour_hides_no_reason(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path, jump: int
) -> None:
    code = f"""
now, time.time = time.time, lambda: now() + {jump}
end(1, {FOR_GOOD!r}, "a reward term fails")
"""
    assert supervised(code).wait(300) == 1
    assert told(tmp_path) == [("driver", FOR_GOOD), ("supervisor", "gave up")]


def test_a_driver_that_was_told_to_stop_is_not_started_again_however_it_ends(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    code = "signal.signal(signal.SIGTERM, lambda *_: end(1, 'failed', 'on its way to the end'))\n"
    code += "print('up', flush=True); time.sleep(300); end(0, 'ended', '')"
    process = supervised(code)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 1
    assert told(tmp_path) == [("driver", "failed")]


def test_a_driver_ends_in_order_with_its_supervisor(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    code = """
def stopped(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one comes for each thread of the supervisor's
    end(0, "stopped", "asked")
signal.signal(signal.SIGTERM, stopped)
print("up", flush=True)
time.sleep(300)
end(1, "failed", "late")
"""
    process = supervised(code)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.kill()
    assert process.stdout.read() == ""  # the driver has closed it too
    assert told(tmp_path) == [("driver", "stopped")]


def test_what_a_dead_driver_leaves_behind_is_ended_before_the_next_begins(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    code = """
import subprocess
if how == "first":
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (run / "left").write_text(str(left.pid))
    os.kill(os.getpid(), signal.SIGKILL)
try:
    os.kill(int((run / "left").read_text()), 0)
except ProcessLookupError:
    end(0, "ended", "")
end(1, "failed", "it lives")
"""
    assert supervised(code).wait(300) == 0
