"""`equipoise sft` on real parts: measured on the way; killed, and gone on with as if it had not."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from cluster.recipe.recipe import RecipeError, UserError, load_recipe, resolved_toml
from cluster.record.stored import read_metrics
from cluster.record.tracker import Tracker
from cluster.run.checkpoints import Position, newest, resume
from cluster.run.sft import past_shares
from learner.balance import Balance, SegmentGradients
from learner.checkpoint import checkpoint_folder, checkpoint_folders, seal, write_json
from learner.settings import SftConfig
from tasks.files import replacing
from tests.cluster.run.test_resume import TABLE
from tests.support.real_runs import TINY_SUDOKU, start, wait_for

RECIPE = (
    TINY_SUDOKU
    + """
[sampler]
max_tokens = 48
[sft]
steps = {steps}
batch_size = 4
learning_rate = 1e-3
warmup_steps = 6
balance = "ngdiff"
norm_every = 3
[eval]
problems = 4
every = {every}
[checkpoint]
every = {saved}
"""
)


def stored(folder: Path, position: Position) -> Path:
    """The folder of a run with one training checkpoint."""
    source = folder.parent / "source.toml"
    source.write_text(RECIPE.format(model="m", steps=9, every=2, saved=3))
    folder.mkdir()
    (folder / "recipe.toml").write_text(resolved_toml(load_recipe(source)))
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


def updates(run: Path) -> dict[tuple[int, str], float]:
    """What every update logged, without what only tells of time."""
    return {
        (row["step"], row["name"]): row["value"]
        for row in read_metrics(run).to_pylist()
        if row["name"].startswith("sft/") and "seconds" not in row["name"]
    }


def logged(run: Path) -> int:
    """Updates since the run was last started."""
    return len(list((run / "metrics").glob("part-*.parquet")))


def test_a_killed_sft_goes_on_as_if_it_had_not_been(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Killed, its last checkpoint torn: the updates since the one before come again."""
    recipe, run, log = tmp_path / "recipe.toml", tmp_path / "run", tmp_path / "out.log"
    recipe.write_text(RECIPE.format(model=tiny_models["qwen3_vl"], steps=1000, every=0, saved=5))
    driver = start(log, "sft", str(recipe), "--output", str(run))
    try:
        wait_for(lambda: logged(run) >= 13, driver, log)
        below = psutil.Process(driver.pid).children(recursive=True)
    finally:
        driver.kill()
        driver.wait()
    _, alive = psutil.wait_procs(below, timeout=20)
    for process in alive:
        process.kill()
    before = updates(run)
    killed = max(step for step, _ in before)
    kept, last = checkpoint_folders(run)
    torn = last / "training" / "optimizer-0000.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    goes_on = int(kept.name[5:])
    assert 0 < goes_on == int(last.name[5:]) - 5 < killed

    driver = start(log, "sft", "--resume", str(run))
    try:
        # By then what the killed run left of later updates is gone.
        wait_for(lambda: "going on after update" in log.read_text(), driver, log)
        wait_for(lambda: logged(run) >= killed - goes_on, driver, log)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 0, log.read_text()
    finally:
        driver.kill()
        driver.wait()
    printed = log.read_text()
    assert f"checkpoint refused: {torn}: has" in printed
    assert f"going on after update {goes_on}" in printed
    assert f"equipoise sft --resume {run}" in printed

    after = updates(run)
    assert {step for step, _ in before} == set(range(1, killed + 1))
    assert {"sft/lambda", "sft/loss", "sft/grad_norm/perception"} <= {name for _, name in before}
    for key in before:
        assert after[key] == pytest.approx(before[key], rel=2e-3, abs=2e-5), key
    # Neither λ nor the loss stands still, so going on from another state would show.
    for name in ("sft/lambda", "sft/loss"):
        again = {round(v, 4) for (step, of), v in after.items() if of == name and step > goes_on}
        assert len(again) > 1

    stopped = newest(run)
    assert stopped.position.command == "sft" and not stopped.refused
    assert stopped.position.step >= killed and set(stopped.position.balance) == {"ngdiff", "pull"}


def test_sft_measured_on_the_way_tells_before_and_after(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    recipe, run, log = tmp_path / "recipe.toml", tmp_path / "run", tmp_path / "out.log"
    recipe.write_text(RECIPE.format(model=tiny_models["qwen3_vl"], steps=5, every=2, saved=0))
    driver = start(log, "sft", str(recipe), "--output", str(run))
    try:
        assert driver.wait(900) == 0, log.read_text()
    finally:
        driver.kill()
        driver.wait()
    metrics = {(r["step"], r["name"]): r["value"] for r in read_metrics(run).to_pylist()}
    assert {step for step, name in metrics if name == "eval/sudoku/a_r"} == {0, 2, 4, 5}
    # Each measurement but the first follows a transfer of the weights.
    sent = {step for step, name in metrics if name == "transfer/bytes"}
    assert sent == {2, 4, 5} and metrics[5, "transfer/bytes"] > 1e6
    evaluation = json.loads((run / "evaluation.json").read_text())["sudoku"]
    for when, step in (("before", 0), ("after", 5)):
        for row in evaluation[when]["rows"]:
            assert row["value"] == metrics[step, f"eval/sudoku/{row['metric']}"]
        assert len(evaluation[when]["per_problem"]["a_r"]) == 4
    assert "metric" in evaluation["change"]["rows"][0]
    assert (run / "checkpoint" / "README.md").is_file() and (run / "sft.json").is_file()
