"""The log that the loops talk to: what a step tells of its time, what is due when, how it ends."""

from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.record.evaluation import EvalTable
from cluster.record.stored import read_metrics, stored_steps
from cluster.record.terminal import Progress
from cluster.run.checkpoints import Position, Resumed
from cluster.run.run_log import RunLog, StepLog, run_log
from tests.support.recipes import made_recipe
from tests.support.toys import graded


class Learner:
    """Remembers what it was to save."""

    def __init__(self) -> None:
        self.saved: list[dict[str, Any]] = []

    def save_training(self, folder: Path, state: dict[str, Any], *_: Any) -> None:
        assert folder.name == f"step-{state['step']:06d}"
        self.saved.append(state)


def test_a_step_books_its_time_on_its_parts_and_tells_who_was_idle() -> None:
    idle = {"sampler/idle_seconds/sampler-0": 5.0, "sampler/idle_seconds/sampler-1": 7.0}
    step = StepLog(3, counts=lambda: dict(idle))
    time.sleep(0.02)
    assert step.part("sample", "groups") == "groups"
    time.sleep(0.01)
    assert step.part("learn", 2, {"learner/seconds": 0.01, "response/tokens": 30.0}) == 2
    idle["sampler/idle_seconds/sampler-0"] += step.seconds
    step.close()
    found = step.metrics
    assert found["time/sample"] >= 0.02 and found["time/learn"] >= 0.01
    assert found["time/step"] == pytest.approx(found["time/sample"] + found["time/learn"])
    assert found["idle/sampler"] == pytest.approx(0.5)
    assert found["idle/learner"] == pytest.approx(1 - 0.01 / found["time/step"])
    rate = found["throughput/sampler_tokens_per_second"]
    assert rate == pytest.approx(30 / (0.5 * found["time/step"]))
    alone = StepLog(1)
    alone.part("learn", 1)
    alone.close()
    assert set(alone.metrics) == {"time/learn", "time/step"}


def steps_of(log: RunLog, learner: Learner, stop_in: int = 0) -> list[int]:
    """Run the loop; the steps after which something was due to be measured."""
    due = []
    with log.keeping(learner):  # type: ignore[arg-type]
        for step in log.steps():
            step.metrics["response/tokens"] = 40.0
            step.part("learn", None)
            if step.number == stop_in:
                os.kill(os.getpid(), signal.SIGTERM)
            log.end(step, [graded([True, False], "a")], updates=1)
            due += [step.number] if log.is_due(2) else []
            log.save_if_due(learner, lambda: {"curriculum": {"x": [0.5, 1.0]}})  # type: ignore[arg-type]
    return due


def test_a_loop_ends_with_its_steps_its_budget_or_a_signal_and_goes_on_from_there(
    tmp_path: Path,
) -> None:
    recipe = made_recipe("algorithm.steps=6", "checkpoint.every=4")
    progress, tables = Progress(6, Console(file=io.StringIO())), {"toy": EvalTable({"a": {"p": 1}})}
    learner = Learner()
    with run_log(recipe, tmp_path / "run", progress) as log:
        log.begin(lambda: tables)
        assert steps_of(log, learner, stop_in=3) == [2]
        assert log.stopped and not log.over
    (state,) = learner.saved
    assert (state["step"], state["version"], state["spent"]["tokens"]) == (3, 3, 120)
    at = Position.from_dict(state)
    assert at.before == tables and at.curriculum == {"x": [0.5, 1.0]}
    with run_log(
        recipe, tmp_path / "run", progress, resumed=Resumed(tmp_path, tmp_path, at)
    ) as log:
        log.begin(lambda: pytest.fail("it was measured before"))
        assert steps_of(log, learner) == [4]  # the end has a measurement of its own
        assert log.over and not log.stopped
    assert [state["step"] for state in learner.saved] == [3, 4, 6]
    assert stored_steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    rows = read_metrics(tmp_path / "run").to_pylist()
    versions = [row["value"] for row in rows if row["name"] == "policy/version"]
    assert versions == [1, 2, 3, 4, 5, 6]
    budget = made_recipe("algorithm.steps=6", 'algorithm.budget={kind = "tokens", amount = 90}')
    with run_log(budget, tmp_path / "short", progress) as log:
        steps_of(log, learner)
        assert log.over and log.at.step == 3
    with run_log(budget, tmp_path / "four", progress, steps=4) as log:
        steps_of(log, learner)
        assert log.over and log.at.step == 4
