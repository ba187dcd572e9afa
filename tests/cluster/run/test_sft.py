"""`equipoise sft`: measured on the way; stopped, and gone on with as if it had not been."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.recipe.recipe import Recipe, RecipeError, UserError, load_recipe, resolved_toml
from cluster.record.evaluation import EvalTable
from cluster.record.stored import read_metrics
from cluster.record.terminal import Progress
from cluster.record.tracker import Tracker
from cluster.run.checkpoints import Position, newest, resume
from cluster.run.passes import PASSES
from cluster.run.sft import demonstrations, measure_checkpoint, past_shares
from learner.balance import Balance, SegmentGradients
from learner.checkpoint import checkpoint_folder, seal, write_json
from learner.settings import SftConfig
from learner.sft import Demonstrator, Source
from rollout.tokens import load_processor
from tasks.files import replacing
from tests.cluster.run.test_resume import TABLE
from tests.support.live_driver import Driver
from tests.support.recipes import GRAPH, SUDOKU, made_recipe, recipe_file, recipe_text
from tests.support.samples import SPEC, TASK

STEPS, SAVED = 12, 5
RECIPE = f"""
seed = 3
model.max_model_len = 512

[sampler]
max_tokens = 48
start_timeout_seconds = 900.0

[sft]
steps = {STEPS}
batch_size = 4
learning_rate = 1e-3
warmup_steps = 6
balance = "ngdiff"
norm_every = 3
vision_warmup_steps = 2

[eval]
problems = 4
passes = ["greedy", "sampled", "oracle", "oracle_blank", "blind"]
text = true
every = {SAVED}

[checkpoint]
every = {SAVED}
"""


def stored(folder: Path, position: Position) -> Path:
    """The folder of a run with one training checkpoint."""
    folder.mkdir()
    recipe = load_recipe(recipe_file(folder.parent, RECIPE), ["sft.steps=9"])
    (folder / "recipe.toml").write_text(resolved_toml(recipe))
    with replacing(checkpoint_folder(folder, position.step)) as fresh:
        (fresh / "training").mkdir()
        write_json(fresh / "training" / "state.json", position.to_dict())
        seal(fresh)
    return folder


def test_a_position_keeps_the_balance_and_whose_run_it_is(tmp_path: Path) -> None:
    position = Position(
        6, 6, before={"sudoku": TABLE}, command="sft", balance={"ngdiff": 0.3, "pull": 0.2}
    )
    run = stored(tmp_path / "run", position)
    _, resumed = resume(run, (), "sft")
    assert resumed.position == position
    with pytest.raises(UserError, match=r"a run of `equipoise sft`; .* equipoise sft --resume"):
        resume(run)
    with pytest.raises(RecipeError, match=r"sft\.steps is 5, but 6 steps are done"):
        resume(run, ["sft.steps=5"], "sft")
    with pytest.raises(RecipeError, match=r"changes sft\.learning_rate"):
        resume(run, ["sft.learning_rate=1e-4"], "sft")
    (run / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match=r"all 6 steps are done.*--set sft\.steps=N"):
        resume(run, ["sft.steps=6"], "sft")
    recipe, _ = resume(run, ["sft.steps=12"], "sft")
    assert recipe.sft is not None and recipe.sft.steps == 12
    rl = stored(tmp_path / "rl", Position(6, 6))
    with pytest.raises(UserError, match="a run of `equipoise train`"):
        resume(rl, (), "sft")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_the_batches_that_the_driver_still_needs(
    tiny_models: dict[str, Path], number: signal.Signals
) -> None:
    sft = SftConfig(steps=20, batch_size=2)
    writer = partial(Demonstrator, load_processor(str(tiny_models["qwen3_vl"])))
    batches = demonstrations([Source(TASK, 1.0, "terse", SPEC)], writer, sft, seed=1)
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, number)
    later = [next(batches) for _ in range(8)]  # more than were made ahead
    assert {len(batch) for batch in [first, *later]} == {2}
    assert worker.is_alive()


def test_a_balance_goes_on_from_what_it_measured() -> None:
    def fresh() -> Balance:
        return Balance(SftConfig(steps=6, balance="ngdiff", norm_every=2, norm_smoothing=0.7))

    whole, later = fresh(), fresh()
    assert fresh().state() == {}
    for step, norms in ((1, (1.0, 3.0)), (3, (2.0, 0.5))):
        whole.observe(step, SegmentGradients(*norms, 0.0))
        if step == 1:
            later.restore(json.loads(json.dumps(whole.state())))
        else:
            later.observe(step, SegmentGradients(*norms, 0.0))
    assert later == whole
    unmeasured = fresh()
    unmeasured.restore({})
    assert unmeasured == fresh()


def test_going_on_keeps_the_warm_up_and_forgets_later_updates(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        for step in range(1, 9):
            tracker.log(step, {"warmup/sudoku/loss": 1.0})
        for step in range(1, 6):
            told = {"sft/tokens/perception": step, "sft/tokens/reasoning": 9 - step}
            tracker.log(step, told | {"sft/nll/perception": 1.0, "sft/nll/reasoning": 3.0})
    with Tracker(tmp_path, after_step=3):
        pass
    kept = [(r["step"], r["name"].split("/")[0]) for r in read_metrics(tmp_path).to_pylist()]
    assert max(step for step, name in kept if name == "sft") == 3
    assert max(step for step, name in kept if name == "warmup") == 8
    shares = past_shares(tmp_path)
    assert [s.perception_tokens for s in shares] == pytest.approx([1 / 9, 2 / 9, 3 / 9])
    assert shares[1].perception_loss == pytest.approx(2 / (2 + 3 * 7))


# --- on real parts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Lived:
    """A run of SFT on both tasks that ended, lost its last checkpoint, and went on.

    Attributes:
        before: its folder when it had ended; torn: a file of its last checkpoint, cut short then.
        ended, again: (step, metric) -> value, when it had ended, and when it was told to stop.
        printed: in its second life.
    """

    run: Path
    before: Path
    torn: Path
    ended: dict[tuple[int, str], float]
    again: dict[tuple[int, str], float]
    printed: str


def metrics_of(run: Path) -> dict[tuple[int, str], float]:
    return {(row["step"], row["name"]): row["value"] for row in read_metrics(run).to_pylist()}


@pytest.fixture(scope="module")
def lived(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Lived:
    recipe = recipe_text(RECIPE, model=tiny_models["qwen3_vl"], tasks=f"{SUDOKU}, {GRAPH}")
    driver = Driver(tmp_path_factory.mktemp("sft"), recipe, command="sft")
    try:
        assert driver.end() == 0, driver.printed()
        torn = driver.keep_and_tear()
        driver.resume("sft.steps=1000", "eval.every=0")
        # By then what the first life left of later updates is gone.
        driver.wait("its going on", lambda: "going on after update" in driver.printed())
        driver.wait("new updates", lambda: driver.logged() > STEPS % SAVED, pause=0.05)
        driver.stop()
    finally:
        driver.clean_up()
    assert not driver.extensions.exists(), "a learner starts without minutes of compiling"
    ended, again = metrics_of(driver.before), metrics_of(driver.run)
    return Lived(driver.run, driver.before, torn, ended, again, driver.printed())


def test_it_goes_on_as_if_it_had_not_ended(lived: Lived) -> None:
    """From the checkpoint before the torn one, so that updates come again."""
    goes_on = STEPS // SAVED * SAVED
    assert f"checkpoint refused: {lived.torn}: has" in lived.printed
    assert f"going on after update {goes_on}" in lived.printed
    before, after = (
        {key: v for key, v in found.items() if key[1][:4] == "sft/" and "seconds" not in key[1]}
        for found in (lived.ended, lived.again)
    )
    assert {step for step, _ in before} == set(range(1, STEPS + 1))
    assert {"sft/lambda", "sft/loss", "sft/grad_norm/perception"} <= {name for _, name in before}
    for key in before:
        assert after[key] == pytest.approx(before[key], rel=2e-3, abs=2e-5), key
    # Neither λ nor the loss stands still, so going on from another state would show.
    for name in ("sft/lambda", "sft/loss"):
        again = {v for (step, of), v in before.items() if of == name and step > goes_on - 3}
        assert len({round(v, 4) for v in again}) > 1


def test_a_first_signal_lets_the_update_end_and_leaves_a_checkpoint(lived: Lived) -> None:
    stored = newest(lived.run)
    done = max(step for step, name in lived.again if name == "sft/loss")
    assert not stored.refused and stored.position.step == done > STEPS
    assert f"stopped after update {done}; equipoise sft --resume {lived.run}" in lived.printed
    assert stored.position.command == "sft"
    assert set(stored.position.balance) == {"ngdiff", "pull"}


def test_it_is_measured_on_the_way_and_tells_before_and_after(lived: Lived) -> None:
    for task in ("sudoku", "graph_coloring"):
        measured = {step for step, name in lived.ended if name == f"eval/{task}/a_r"}
        assert measured == {0, 5, 10, STEPS}
    # Each measurement but the first follows a transfer of the weights.
    sent = {step for step, name in lived.ended if name == "transfer/bytes"}
    assert sent == {5, 10, STEPS} and lived.ended[STEPS, "transfer/bytes"] > 1e6
    evaluation = json.loads((lived.before / "evaluation.json").read_text())
    kept = {
        name: {row["metric"]: row for row in table["before"]["rows"]}
        for name, table in evaluation.items()
    }
    assert all(rows["text_loss"]["n"] == 10 for rows in (kept["sudoku"], kept["graph_coloring"]))
    assert kept["sudoku"]["text_right"] == kept["graph_coloring"]["text_right"]
    # Random weights: about as sure as a die with as many sides as there are tokens.
    assert 5.5 < kept["sudoku"]["text_loss"]["value"] < 7.5
    assert "text_loss" not in kept["all tasks"]
    for task in ("sudoku", "graph_coloring"):
        for when, step in (("before", 0), ("after", STEPS)):
            for row in evaluation[task][when]["rows"]:
                assert row["value"] == lived.ended[step, f"eval/{task}/{row['metric']}"]
            assert len(evaluation[task][when]["per_problem"]["a_r"]) == 4
        assert "metric" in evaluation[task]["change"]["rows"][0]
        found = {row["metric"]: row for row in evaluation[task]["after"]["rows"]}
        for name in ("a", "a_p", "a_p_graded", "a_r", "a_r_blank", "blind", "leak", "a avg@1"):
            assert found[name]["n"] == 4
            assert 0 <= found[name]["low"] <= found[name]["value"] <= found[name]["high"] <= 1


def test_it_learns_each_segment_after_a_warm_up_and_leaves_a_card(lived: Lived) -> None:
    for segment in ("perception", "reasoning", "answer"):
        assert lived.ended[10, f"sft/nll/{segment}"] < lived.ended[1, f"sft/nll/{segment}"]
    assert (2, "warmup/sudoku/accuracy") in lived.ended
    card = (lived.before / "checkpoint" / "README.md").read_text()
    assert "perception's share" in card and "a_r_blank" in card
    assert (lived.before / "sft.json").is_file()


def test_without_measuring_on_the_way_a_run_is_measured_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By samplers of its last checkpoint, when the learner has gone, in all passes."""
    recipe = made_recipe("sft.steps=9", 'eval.passes=["greedy"]')
    asked: list[str] = []
    passes: list[str] = []

    @contextmanager
    def samplers(recipe: Recipe, model: str, command: str) -> Iterator[tuple[str, dict, None]]:
        asked.append(model)
        yield "samplers", {}, None

    def evaluated(samplers: str, sources: Any, recipe: Recipe, frozen: Any) -> dict[str, EvalTable]:
        passes.extend(recipe.eval.passes)
        return {"sudoku": TABLE}

    monkeypatch.setattr("cluster.run.sft.sampling_from", samplers)
    monkeypatch.setattr("cluster.run.sft.evaluate_all", evaluated)
    assert measure_checkpoint(recipe, [], tmp_path, Progress(9)) == {"sudoku": TABLE}
    assert asked == [str(tmp_path / "checkpoint")] and passes == [*PASSES]
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored == {"sudoku": TABLE.to_dict()}
