"""A run's records: everything written is read back, and a crash costs one step at most."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.record.evaluation import EvalTable
from cluster.record.folder import METRIC_SCHEMA, ROLLOUT_SCHEMA, by_name
from cluster.record.stored import read_metrics, read_rollouts
from cluster.record.terminal import Progress, printable
from cluster.record.tracker import Tracker
from rewards.advantages import CREDIT_COLUMNS
from rewards.compose import Composition, compose_groups
from rewards.terms import Perception
from tests.support.toys import group, score, scored


def values(run: Path) -> dict[tuple[int, str], float]:
    return {(r["step"], r["name"]): r["value"] for r in read_metrics(run).to_pylist()}


def test_metrics_come_back_while_running_and_after_the_end(tmp_path: Path) -> None:
    expected = {(s, n): s + 0.5 for s in range(3) for n in ("acc/a", "reward/outcome/mean")}
    with Tracker(tmp_path) as tracker:
        for step in range(3):
            tracker.log(step, {n: v for (s, n), v in expected.items() if s == step})
        tracker.log(3, {})
        assert values(tmp_path) == expected
    assert values(tmp_path) == expected
    assert pq.read_schema(tmp_path / "metrics.parquet").equals(METRIC_SCHEMA)
    assert not list((tmp_path / "metrics").iterdir())
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [e.value for e in board.Scalars("acc/a")] == [0.5, 1.5, 2.5]
    assert [e.step for e in board.Scalars("acc/a")] == [0, 1, 2]


def test_a_crash_loses_the_unwritten_step_only_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    crashed = Tracker(tmp_path)
    crashed.log(1, {"acc/a": 1.0})
    crashed.log(2, {"acc/a": 2.0})
    # Killed while writing step 3: half a file under its temporary name, and never a close.
    (tmp_path / "metrics" / ".part-000003.parquet.tmp").write_bytes(b"PAR1 half")
    assert values(tmp_path) == {(1, "acc/a"): 1.0, (2, "acc/a"): 2.0}
    with Tracker(tmp_path) as resumed:
        resumed.log(2, {"acc/a": 20.0})  # the step is repeated
        resumed.log(3, {"acc/a": 30.0})
        assert values(tmp_path) == {(1, "acc/a"): 1.0, (2, "acc/a"): 20.0, (3, "acc/a"): 30.0}
    with Tracker(tmp_path) as again:
        again.log(4, {"acc/a": 40.0})
    assert values(tmp_path) == {
        (1, "acc/a"): 1,
        (2, "acc/a"): 20,
        (3, "acc/a"): 30,
        (4, "acc/a"): 40,
    }


def test_a_run_that_goes_on_from_a_step_forgets_those_after_it(tmp_path: Path) -> None:
    crashed = Tracker(tmp_path)
    for step in range(1, 6):
        crashed.log(step, {"acc/a": float(step)})
        crashed.log_rollouts(step, scored(group(5, "5;10;", "1;2;")))
    for step, a in ((3, 0.5), (5, 1.0)):
        tables = {"toy": EvalTable({"a": {"p": a}})}
        crashed.log_evaluation(step, tables)
    (tmp_path / "error.txt").write_text("it crashed")
    with Tracker(tmp_path, after_step=3) as again:
        assert not (tmp_path / "error.txt").exists()
        assert values(tmp_path) == {
            (1, "acc/a"): 1,
            (2, "acc/a"): 2,
            (3, "acc/a"): 3,
            (3, "eval/toy/a"): 0.5,
        }
        with pytest.raises(FileNotFoundError):
            read_rollouts(tmp_path, 4)
        again.log(4, {"acc/a": 40.0})
    assert values(tmp_path)[4, "acc/a"] == 40
    assert len(list((tmp_path / "rollouts").iterdir())) == 3
    (file,) = (tmp_path / "evaluations").iterdir()
    assert json.loads(file.read_text())["toy"]["per_problem"] == {"a": {"p": 0.5}}
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("acc/a")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    with Tracker(tmp_path / "new", after_step=0):
        pass


def test_a_metric_that_is_no_number_is_an_error_at_once(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker, pytest.raises(ValueError, match="high"):
        tracker.log(1, {"acc/a": "high"})  # type: ignore[dict-item]
    with pytest.raises(FileNotFoundError, match=r"metrics\.parquet"):
        read_metrics(tmp_path)


def test_rollouts_come_back_whole(tmp_path: Path) -> None:
    groups = scored(
        group(5, "5;10;", "4;10;bad_cell", ";;x,y"),
        group(3, "3;6;", kind="oracle", prefix="3", finish_reason="length"),
    )
    with Tracker(tmp_path) as tracker:
        tracker.log_rollouts(12, groups)
    table = read_rollouts(tmp_path, 12)
    assert table.schema.equals(ROLLOUT_SCHEMA)
    rows = table.to_pylist()
    flat = [(g, i, r) for g in groups for i, r in enumerate(g.group.rollouts)]
    assert len(rows) == len(flat) == 4
    for row, (g, i, rollout) in zip(rows, flat, strict=True):
        assert g.diagnosis is not None
        for name in ("prompt_ids", "response_ids", "logprobs", "versions", "segments"):
            array = getattr(rollout, name)
            assert np.array_equal(np.array(row[name], dtype=array.dtype), array)
        for name in ("rollout_id", "group_id", "kind", "view", "prefix", "text", "sampler"):
            assert row[name] == getattr(rollout, name)
        assert (row["step"], row["finish_reason"]) == (12, rollout.finish_reason)
        assert row["defects"] == list(rollout.parsed.defects)
        assert by_name(row["terms"]) == {name: v[i] for name, v in g.terms.items()}
        assert row["total"] == g.totals[i]
        stored = dict(zip(CREDIT_COLUMNS, g.advantages[i], strict=True))
        del stored["act"]  # of responses that cannot call
        assert by_name(row["advantages"]) == stored
        assert row["a"] == g.diagnosis.a[i]
        assert row["leak"] == g.diagnosis.leak[i]
        assert json.loads(row["truth"]) == dict(g.group.problem.truth)
        assert row["true_perception"] == g.group.problem.perception
    assert [row["answer"] for row in rows] == ["10", "10", None, "6"]
    assert [row["zero_variance"] for row in rows] == [False, False, False, True]
    with pytest.raises(FileNotFoundError, match="step 13"):
        read_rollouts(tmp_path, 13)


def test_an_image_is_stored_once_under_its_hash(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log_rollouts(1, scored(group(5, "5;10;", "1;2;"), group(3, "3;6;")))
        tracker.log_rollouts(2, scored(group(5, "5;10;")))
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 2
    for file in files:
        assert file.suffix == ".png"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem
    shas = {sha for row in read_rollouts(tmp_path, 1).to_pylist() for sha in row["image_sha256"]}
    assert shas == {file.stem for file in files}


def test_hostile_text_and_undiagnosed_groups_are_stored(tmp_path: Path) -> None:
    hostile = group(1, "1;2;\x00", "1;2;\ud800,[red]", "1;2;" + "é" * 1000)
    lenient = Composition({"perception": 1.0}, on_failure={"perception": "drop_group"})
    broken = group(2, "2;666;")
    undiagnosed = compose_groups([broken], [score(broken, Perception())], lenient)
    with Tracker(tmp_path) as tracker:
        tracker.log_rollouts(1, [*scored(hostile), *undiagnosed])
    rows = read_rollouts(tmp_path, 1).to_pylist()
    assert rows[0]["text"] == "1;2;\x00"
    assert rows[1]["text"] == "1;2;\\ud800,[red]"
    assert rows[3]["a"] is None
    assert rows[3]["failures"][0].startswith("diagnosis: exception: ArithmeticError")


def test_a_run_keeps_its_recipe_and_versions_and_no_paths(tmp_path: Path) -> None:
    with Tracker(tmp_path, recipe_toml='name = "é"\n'):
        pass
    assert (tmp_path / "recipe.toml").read_text(encoding="utf-8") == 'name = "é"\n'
    text = (tmp_path / "versions.json").read_text()
    found = json.loads(text)
    assert found["packages"]["ray"]
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_gib"] > 0
    assert str(Path.home()) not in text
    assert str(Path(__file__).parents[3]) not in text


def lines_of(progress: Progress) -> str:
    file = progress.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_progress_is_one_plain_line_a_step_where_there_is_no_terminal() -> None:
    progress = Progress(40, Console(file=io.StringIO(), width=80))
    metrics = {
        "acc/a": 0.5,
        "acc/a_p": 0.25,
        "reward/total/mean": 0.4321,
        "group/zero_variance": 0.125,
        "defects/[red]bad": 3.0,
        "defects/\x1b[2Jx": 1.0,
    }
    progress.step(1, metrics, seconds=4.0)
    progress.step(2, {}, seconds=2.0)
    progress.say("[bold]done\x1b]0;title\x07")
    first, second, third = lines_of(progress).splitlines()
    assert first == (
        "step  1/40  a 0.500  a_p 0.250  reward 0.432  zero-variance 0.125  4.0 s/step  ETA 2:36"
        "  defects [red]bad 3, \\x1b[2Jx 1"
    )
    assert second.startswith("step  2/40  a -  a_p -")
    assert "ETA 1:54" in second
    assert third == "[bold]done\\x1b]0;title\\x07"


def test_printable_leaves_text_alone_and_defuses_the_rest() -> None:
    assert printable("héllo [x] 数独\n") == "héllo [x] 数独\n"
    assert printable("\x1b\x00\ud800\u202e") == "\\x1b\\x00\\ud800\\u202e"
