"""`equipoise status`: what a run folder tells of a run, whatever became of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.recipe.recipe import UserError, load_recipe, resolved_toml
from cluster.record.events import Event, add_events
from cluster.record.status import read_status
from cluster.record.tracker import Tracker
from tests.support.recipes import recipe_file
from tests.support.terminal import Equipoise

RECIPE = "algorithm.steps = 20\nreward.terms = [{ name = 'outcome' }]\ncheckpoint.every = 3\n"


def make_run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends: list[float],
    more: str = "",
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """A run whose step n was logged at `ends[n - 1]`."""
    folder.mkdir(exist_ok=True)
    recipe = load_recipe(recipe_file(folder, more + RECIPE))
    clock = iter(ends)
    run = folder / "run"
    with Tracker(run, resolved_toml(recipe)) as log, monkeypatch.context() as patched:
        for step in range(1, len(ends) + 1):
            now = next(clock)
            patched.setattr("cluster.record.tracker.time.time", lambda now=now: now)
            idle = {"idle/sampler": 0.7, "idle/learner": 0.2, "time/step": 1.0}
            log.log(step, idle | dict(metrics or {}))
    return run


def test_step_pace_and_what_is_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, monkeypatch, [100.0, 190.0, 200.0, 210.0, 220.0, 230.0, 240.0])
    found = read_status(run, now=247.0)
    assert (found.state, found.step, found.steps, found.silent) == ("runs", 7, 20, 7.0)
    assert found.step_seconds == 10.0 and found.left_seconds == 130.0
    assert found.next_checkpoint == 9
    assert found.waits().startswith("samplers for the learner")
    # Of a driver that went on, only its own steps tell how fast it goes.
    add_events(run, Event("driver", "went on", wall_seconds=225.0))
    assert read_status(run, now=247.0).step_seconds == 10.0
    add_events(run, Event("driver", "went on", wall_seconds=235.0))
    found = read_status(run, now=247.0)
    assert found.step_seconds is None and found.left_seconds is None


def test_under_a_budget_what_is_spent_tells_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 'algorithm.budget = { kind = "tokens", amount = 1000 }\n'
    run = make_run(tmp_path, monkeypatch, [100.0, 110.0], budget)
    assert read_status(run, now=111.0).left_seconds is None  # nothing tells what a step takes
    run = make_run(tmp_path / "b", monkeypatch, [100.0, 110.0], budget, {"spent/tokens": 400.0})
    found = read_status(run, now=111.0)
    # 200 tokens a step: three more, though the recipe allows 18.
    assert found.left_seconds == pytest.approx(30.0)
    assert found.spent == ("at most 1,000 tokens, 40% of them spent", 0.4)


def test_a_run_with_code_that_is_not_here_has_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, monkeypatch, [100.0, 110.0])
    file = run / "recipe.toml"
    file.write_text(file.read_text().replace('"sudoku"', '"gone_with_its_folder:Own"'))
    with pytest.raises(UserError, match="gone_with_its_folder"):
        load_recipe(file)
    found = read_status(run)
    assert (found.step, found.steps, found.next_checkpoint) == (2, 20, 3)
    file.write_text("seed = 3\n")
    with pytest.raises(UserError, match="none of a run: it has no 'algorithm'"):
        read_status(run)


def test_a_run_that_is_over_has_no_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, monkeypatch, [100.0, 110.0])
    add_events(run, Event("driver", "failed", "gone", wall_seconds=111.0))
    found = read_status(run, now=120.0)
    assert (found.state, found.left_seconds, found.silent) == ("failed", None, 9.0)
    add_events(run, Event("supervisor", "restart", wall_seconds=112.0))
    assert read_status(run, now=120.0).state == "runs"


def test_as_a_user_types_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equipoise: Equipoise
) -> None:
    run = make_run(tmp_path, monkeypatch, [100.0, 110.0])
    add_events(run, Event("sampler-0", "lost", "\x1b[2Jevil [red]text", "3 requests"))
    add_events(run, Event("sampler-0", "back", recovered_seconds=12.0))
    monkeypatch.setenv("COLUMNS", "300")
    code, said, _ = equipoise("status", run)
    assert code == 0 and "2 of 20" in said and "after step 3" in said and "12 s" in said
    assert "\x1b[2J" not in said and "evil [red]text" in said
    with pytest.raises(UserError, match="no run folder"):
        read_status(tmp_path / "none")
