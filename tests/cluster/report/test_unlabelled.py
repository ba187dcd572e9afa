"""Where nobody has said what is to be seen, a number is absent: in metrics, files and reports.

A run holds rollouts of three kinds: a task that knows no labels, one that knows some problems', and
Sudoku. Every figure about seeing must be what it is on the labelled rollouts alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.record.evaluation import before_after, eval_table, pooled
from cluster.record.stored import read_scored, read_scores
from cluster.record.table import Table
from cluster.record.tracker import Tracker
from cluster.report.diagnose import run_diagnose, sheets, task_reports
from cluster.report.rescore import load_scores
from cluster.report.run_report import build, read_run
from cluster.run.standstill import unread_step
from cluster.run.step_metrics import step_metrics
from rewards.scored import ScoredGroup
from tasks.core import Problem, Task
from tasks.load import load_task
from tests.support.prose import LabelledProse, Prose, prose, says, unlabelled
from tests.support.report_pages import (
    HOSTILE,
    Page,
    assert_inert,
    four_cells,
    grid_problem,
    rollouts,
)

PROSE, LABELLED, SUDOKU = (load_task(n) for n in (Prose.name, LabelledProse.name, "sudoku"))
SEEN = ("a_p", "a_p_graded", "leak")


def dots(number: int) -> str:
    return f"{number} dots"


def asked(number: int, step: int, task: Task = PROSE, knows: bool = False) -> ScoredGroup:
    """Four rollouts of a problem: (seen right, answered right) in all four ways, shuffled."""
    made = {PROSE: Prose, LABELLED: LabelledProse}[task]
    problem = prose(number, made, dots if knows else unlabelled)
    order = np.random.default_rng([number, step]).permutation(4)
    ways = [(number + wrong, 2 * number + off) for wrong in (0, 1) for off in (0, 1)]
    texts = [says(dots(ways[i][0]), ways[i][1]) for i in order[: 3 + (number + step) % 2]]
    return rollouts(task, problem, texts, step)


def grids(step: int) -> ScoredGroup:
    problem = grid_problem(step)
    return rollouts(SUDOKU, problem, four_cells(problem)[: 3 + step % 2], step)


def stored(folder: Path, steps: Sequence[Sequence[ScoredGroup]]) -> Path:
    with Tracker(folder) as tracker:
        for step, groups in enumerate(steps, 1):
            tracker.log_rollouts(step, groups)
            tracker.log(step, step_metrics(groups, step) | {"time/step": 1.0})
    return folder


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unknown"
    return stored(folder, [[asked(n, step) for n in range(3, 7)] for step in range(1, 7)])


def test_metrics_of_a_step_leave_out_what_nobody_can_tell() -> None:
    bare = [asked(n, 1) for n in (3, 4, 5)]
    metrics = step_metrics(bare, 1)
    assert metrics["acc/a"] == pytest.approx(
        np.concatenate([g.terms["outcome"] for g in bare]).mean()
    )
    assert metrics["acc/labelled"] == 0.0
    absent = [f"acc/{name}" for name in (*SEEN, "self_consistency")]
    assert not [n for n in metrics if n in absent or n.startswith(("coupling/", "reliability/"))]
    assert "reward/perception/mean" not in metrics  # its zeros stand for no value
    assert metrics["reward/perception/failures"] == 3
    assert unread_step(metrics | {"defects/empty": 1e9}) is None  # nothing is known to be unread

    # Beside labelled groups: of all, or of those alone.
    seen = [grids(1), grids(2), asked(8, 1, LABELLED, knows=True)]
    mixed, alone = step_metrics([*bare, *seen], 1), step_metrics(seen, 1)
    about_seeing = [
        name for name in alone
        if name.startswith(("reliability/", "coupling/", "reward/perception/"))
        or name in absent
    ]  # fmt: skip
    assert len(about_seeing) > 20
    for name in about_seeing:
        if "seconds" not in name and "failures" not in name:
            assert mixed[name] == pytest.approx(alone[name]), name
    every = np.concatenate([g.diagnosis.a for g in (*bare, *seen) if g.diagnosis])
    assert mixed["acc/a"] == pytest.approx(every.mean())
    share = sum(len(g.group.rollouts) for g in seen) / len(every)
    assert mixed["acc/labelled"] == pytest.approx(share) and "acc/labelled" not in alone


def test_what_is_unknown_is_null_in_the_file_and_comes_back_so(unknown: Path) -> None:
    rows = pq.read_table(unknown / "rollouts" / "step-000001.parquet").to_pylist()
    assert all(row[name] is None for row in rows for name in (*SEEN, "self_consistency"))
    assert all(isinstance(row["a"], bool) for row in rows)
    for scores in read_scores(unknown, 1):
        assert scores.diagnosis is not None and scores.diagnosis.a.dtype == bool
        assert all(getattr(scores.diagnosis, name) is None for name in SEEN)
    (first, *_) = read_scored(unknown, 1)
    assert first.diagnosis is not None and first.diagnosis.a_p is None


def cells(tables: Sequence[Table]) -> list[str]:
    return [cell for table in tables for row in table.rows for cell in row]


def test_a_run_without_labels_is_not_called_innocent(
    unknown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (report,) = run_diagnose(unknown, as_json=True)
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    whole = task["phases"][0]
    assert whole["rollouts"] > 0 and whole["a"] is not None
    assert [whole[name] for name in ("a_p", "q", "leak", "labelled")] == [None, None, None, 0]
    assert whole["perception"]["pooled"]["value"] is None
    assert task["drifts"] == {"outcome": None, "perception": None, "total": None}
    found = sheets(report)
    assert [table.title.split(": ")[1][:14] for table in found] == [
        "what the outco",
        "from the first",
    ]
    assert "no" not in cells(found) and cells(found).count("no labels") == 3
    assert "0.00" not in cells(found)
    said = "No problem has a perception label"
    assert sum(said in table.note for table in found) == 1

    page = build(read_run(unknown))
    assert sum(said in line for line in page.warnings) == 1
    told = page.to_markdown("figures")
    assert "leak" not in told.replace("leaks", "") and "a_p 0" not in told
    for view in page.shown.rollouts:
        assert [view[name] for name in ("saw", "thought", "leak", "graded")] == [None] * 4
    page.to_html()


def test_a_column_labelled_on_some_rows_says_what_the_labelled_rows_alone_say(
    tmp_path: Path,
) -> None:
    steps = [
        [asked(n, step, LABELLED, knows=n % 2 == 0) for n in range(3, 11)] for step in range(1, 7)
    ]
    some = stored(tmp_path / "some", steps)
    only = stored(
        tmp_path / "only",
        [[g for g in groups if g.group.problem.perception] for groups in steps],
    )
    (half,), (known,) = (task_reports(load_scores(run)) for run in (some, only))
    assert [p.labelled for p in half.phases] == [p.groups for p in known.phases]
    assert half.phases[0].groups == 2 * known.phases[0].groups
    for ours, theirs in zip(half.phases, known.phases, strict=True):
        for name in ("a_p", "leak", "perception", "independent"):
            assert getattr(ours, name) == getattr(theirs, name)
        for term in ("outcome", "perception"):
            assert ours.terms[term].reliability == theirs.terms[term].reliability
    assert half.drifts == known.drifts
    assert (
        half.phases[0].a != known.phases[0].a or half.phases[0].rollouts > known.phases[0].rollouts
    )
    note = sheets(half)[0].note
    assert "24 of 48 groups have a perception label" in note and "so no q" in note
    warning = "% of the rollouts are of problems with a perception label"
    assert sum(warning in line for line in build(read_run(some)).warnings) == 1


def test_an_evaluation_has_rows_of_what_is_known_and_pools_what_each_task_has() -> None:
    def groups(task: Task, problems: Sequence[Problem], answers: Sequence[str]) -> list[Any]:
        made = [
            rollouts(task, p, [text], 1).group for p, text in zip(problems, answers, strict=True)
        ]
        return [replace(group, group_id=f"{task.name}-{i}") for i, group in enumerate(made)]

    bare = [prose(n) for n in range(3, 9)]
    some = [prose(n, LabelledProse, dots if n % 3 else unlabelled) for n in range(3, 9)]
    texts = [says(dots(n), 2 * n + n % 2) for n in range(3, 9)]
    tables = {
        "bare": eval_table(PROSE, {"greedy": groups(PROSE, bare, texts), "oracle": []}),
        "some": eval_table(LABELLED, {"greedy": groups(LABELLED, some, texts)}),
    }
    assert list(tables["bare"].per_problem) == ["a"]
    assert {row.metric: row.n for row in tables["some"].rows} == {
        "a": 6, "a_p": 4, "a_p_graded": 4, "leak": 4,
    }  # fmt: skip
    whole = pooled(tables)
    assert {row.metric: row.n for row in whole.rows} == {
        "a": 12, "a_p": 4, "a_p_graded": 4, "leak": 4,
    }  # fmt: skip
    assert whole["a_p"].value == 1.0 and whole["a"].value == 0.5
    changed = {change.metric for change in before_after(tables["bare"], tables["bare"])}
    assert changed == {"a"}
    sampled = eval_table(PROSE, {"sampled": [rollouts(PROSE, bare[0], texts[:4], 1).group]})
    assert set(sampled.per_problem) == {"a avg@4", "a maj@4", "a pass@2", "a pass@4"}


def test_free_text_is_shown_whole_marked_where_a_label_says_what_is_right_and_inert(
    tmp_path: Path,
) -> None:
    text = says(f"6 dots, {HOSTILE[0]} in a row", 12)
    groups = [
        rollouts(PROSE, prose(6), [text], 1),
        rollouts(LABELLED, prose(6, LabelledProse, lambda n: "6 red dots,"), [text], 1),
    ]
    run = stored(tmp_path / "run", [groups])
    record = read_run(run)
    bare, known = (view["figure"] for view in record.shown.rollouts)
    assert [mark for mark, _ in bare["rows"]] == ["plain"] and HOSTILE[0] in bare["rows"][0][1]
    marks = {word: mark for mark, words in known["rows"] for word in words.split()}
    assert (marks["6"], marks["red"], marks["row"]) == ("right", "missing", "extra")
    page = build(record)
    html = page.to_html()
    assert_inert(Page(html), html)
    assert "alert(1)" not in page.to_markdown("figures")
