"""`equipoise diagnose` on runs whose truth is known: who is reliable, who hacks, who failed."""

from __future__ import annotations

import io
import json
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.recipe.recipe import UserError
from cluster.record.tracker import Tracker
from cluster.report.diagnose import run_diagnose, sheets, task_reports
from cluster.report.rescore import load_scores, rescored_term
from rewards.compose import Composition, compose_groups
from rewards.coupling import coupling
from rewards.scored import ScoredGroup
from rewards.terms import Outcome, Perception
from rollout.record import Group
from tasks.core import DataError, Task
from tests.support.terminal import Equipoise
from tests.support.toys import TASK, group, score

EVIL = "evil [red]\x1b[2J|*x*"


class Noisy:
    """A surrogate: 1 where the text's own mark says so."""

    def __init__(self, name: str, mark: str) -> None:
        self.name, self.mark = name, mark

    def __call__(self, task: Task, group: Group) -> list[float]:
        return [float(self.mark in r.parsed.defects) for r in group.rollouts]


class Sometimes:
    """Fails on every problem whose number is even."""

    name = "sometimes"

    def __call__(self, task: Task, group: Group) -> list[float]:
        if group.problem.truth["n"] % 2 == 0:
            raise RuntimeError("even")
        return [float(len(r.text)) for r in group.rollouts]


class Waits:
    """A term that waits for a server."""

    name = "waits"

    async def __call__(self, task: Task, group: Group) -> list[float]:
        return [0.0 for _ in group.rollouts]


class Asks:
    """A term that asks a model."""

    name = "asks"
    model = ""

    def __call__(self, task: Task, group: Group) -> list[float]:
        raise AssertionError("never called")

    def ask(self, task: Task, group: Group, other: object) -> list[object]:
        return []

    def score(self, task: Task, group: Group, replies: object) -> list[float]:
        return []


def scored_step(rng: np.random.Generator, share: float) -> list[ScoredGroup]:
    """Ten groups of eight: `good` agrees with sight 9 in 10 times, `hack` rises as sight falls."""
    groups = []
    for place in range(10):
        n = int(rng.integers(1, 9))
        texts = []
        for _ in range(8):
            sees = rng.random() < 0.8 - 0.6 * share
            marks = ["good"] if (rng.random() < 0.9) == sees else []
            marks += ["hack"] if rng.random() < 0.2 + 0.6 * share else []
            p = n if sees else n + 1
            answer = 2 * p if rng.random() < 0.7 else 1
            texts.append(f"{p};{answer};{','.join(marks)}")
        groups.append(group(n, *texts, name=f"{share:.2f}-{place}"))
    terms = [Outcome(), Perception(), Noisy("good", "good"), Noisy(EVIL, "hack"), Sometimes()]
    composition = Composition({"outcome": 0.1, EVIL: 1.0}, on_failure={"sometimes": "zero"})
    return compose_groups(groups, [score(g, *terms) for g in groups], composition)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "known"
    rng = np.random.default_rng(0)
    with Tracker(folder) as tracker:
        for step in range(1, 10):
            tracker.log_rollouts(step, scored_step(rng, (step - 1) / 8))
    return folder


def test_reliability_coupling_failures_and_hacking_of_a_known_run(run: Path) -> None:
    scores = load_scores(run)
    (report,) = task_reports(scores)
    whole = report.phases[0]
    assert [p.phase for p in report.phases] == ["all", "first third", "second third", "last third"]
    assert (whole.groups, whole.rollouts, whole.steps) == (90, 720, (1, 9))
    assert [p.steps for p in report.phases[1:]] == [(1, 3), (4, 6), (7, 9)]
    assert sum(p.groups for p in report.phases[1:]) == 90

    good, evil = whole.terms["good"].reliability, whole.terms[EVIL].reliability
    assert good.auc_within.value == pytest.approx(0.9, abs=0.03)
    assert good.auc_within.low is not None and good.auc_within.low > 0.8
    assert evil.auc_within.low is not None and evil.auc_within.low < 0.5 < evil.auc_within.high
    assert whole.terms["perception"].reliability.within.value == 1.0
    # Groups on which a term failed are counted, and their stand-in zeros are not judged.
    even = sum(s.group_id and "sometimes" in {f.term for f in s.failures} for s in scores)
    sometimes = whole.terms["sometimes"]
    assert sometimes.failures == even > 0
    assert sometimes.reliability.groups == 90 - even

    a = [s.diagnosis.a for s in scores if s.diagnosis]
    a_p = [s.diagnosis.a_p for s in scores if s.diagnosis]
    assert whole.perception.within.value == pytest.approx(coupling(a, a_p).within.value)
    # By construction seeing and thinking are independent, and leaks are rare.
    for found, expected in zip((whole.perception, whole.reasoning), whole.independent, strict=True):
        assert found.pooled.value == pytest.approx(expected, abs=0.1)
    assert whole.q == pytest.approx(0.7, abs=0.05)
    assert whole.leak == np.concatenate([s.diagnosis.leak for s in scores if s.diagnosis]).mean()

    flags = {name: found is not None and found.flagged for name, found in report.drifts.items()}
    assert flags == {
        **dict.fromkeys(("outcome", "perception", "good", "sometimes"), False),
        EVIL: True,
        "total": True,
    }


def test_intervals_are_over_puzzles(run: Path) -> None:
    # Groups of the same puzzles again and again are no news, and no interval gets narrower.
    scores = load_scores(run)
    more = [replace(s, group_id=f"{s.group_id}-{copy}") for s in scores for copy in range(3)]
    (one,), (three,) = task_reports(scores), task_reports(more)
    for read in (
        lambda r: r.phases[0].perception.within,
        lambda r: r.phases[0].reasoning.pooled,
        lambda r: r.phases[0].terms["good"].reliability.auc,
        lambda r: r.drifts[EVIL].reward,
        lambda r: r.drifts[EVIL].a_p,
    ):
        assert astuple(read(three)) == pytest.approx(astuple(read(one)))


def test_a_rescored_term_is_judged_beside_the_stored_one(run: Path) -> None:
    specs = ["perception", "perception_graded", 'tests.support.toys:Length={"scale": 2}']
    (report,) = task_reports(load_scores(run, specs))
    terms = report.phases[0].terms
    again = terms["perception (rescored)"].reliability
    assert again == terms["perception"].reliability
    assert terms["perception_graded (rescored)"].reliability.auc.value == 1.0
    length = terms['tests.support.toys:Length={"scale": 2} (rescored)'].reliability
    assert length.mean is not None and length.mean > 8
    (failing,) = task_reports(load_scores(run, ["tests.cluster.report.test_diagnose:Sometimes"]))
    stored = failing.phases[0].terms["sometimes"]
    assert (
        failing.phases[0].terms["tests.cluster.report.test_diagnose:Sometimes (rescored)"] == stored
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("percption", 'did you mean "perception"'),
        ("format={", "JSON object"),
        ("format=[1]", "JSON object"),
        ('format={"default": -1}', "default = -1: Input should be greater"),
        ("tests.cluster.report.test_diagnose:Waits", "asks a model or a server"),
        ("tests.cluster.report.test_diagnose:Asks", "asks a model or a server"),
    ],
)
def test_a_term_that_cannot_be_rescored_is_refused(spec: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        rescored_term(spec)
    assert str(caught.value).startswith(f"--rescore {spec}: ")
    assert words in str(caught.value)


def test_names_cannot_steer_a_terminal_or_a_document(run: Path) -> None:
    (report,) = task_reports(load_scores(run))
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    for sheet in sheets(report):
        console.print(sheet.to_rich())
        lines = sheet.to_markdown().splitlines()
        table = [line for line in lines if line.startswith("|")]
        assert len(table) == len(sheet.rows) + 2
        for line in table:
            assert line.replace("\\|", "").count("|") == len(sheet.columns) + 1
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2J" not in shown
    assert "evil [red]\\x1b[2J|*x*" in shown
    assert "REWARD UP, a_p DOWN" in shown


def test_the_command(run: Path, tmp_path: Path, equipoise: Equipoise) -> None:
    code, tables, _ = equipoise("diagnose", run)
    assert code == 0 and "what the outcome is coupled with" in tables and "REWARD UP" in tables
    code, printed, _ = equipoise("diagnose", run, "--json", "--rescore", "format")
    found = json.loads(printed)
    assert code == 0 and found["run"] == "known"
    (task,) = found["tasks"]
    assert task["task"] == TASK.name
    assert task["drifts"]["total"]["flagged"] is True
    assert "format (rescored)" in task["phases"][0]["terms"]
    code, printed, _ = equipoise("diagnose", run, "--markdown")
    assert code == 0 and printed.startswith("### ")
    for arguments, words in (
        ((tmp_path / "nowhere",), "nowhere: no folder"),
        ((tmp_path,), "no run with rollouts"),
        ((run, "--json", "--markdown"), "choose one"),
        ((run, "--rescore", "percption"), "no reward term"),
    ):
        code, _, error = equipoise("diagnose", *arguments)
        assert code == 2 and words in error and "Traceback" not in error


def test_a_run_where_the_task_failed_on_everything_is_no_crash(tmp_path: Path) -> None:
    groups = [group(1, "1;666;", "1;2;", name=f"p{i}") for i in range(3)]
    lenient = Composition({"perception": 1.0}, on_failure={"perception": "drop_group"})
    with Tracker(tmp_path) as tracker:
        scored = compose_groups(groups, [score(g, Perception()) for g in groups], lenient)
        tracker.log_rollouts(1, scored)
    (report,) = run_diagnose(tmp_path, as_markdown=True)
    (whole,) = report.phases
    assert (whole.groups, whole.undiagnosed, whole.a) == (0, 3, None)
    assert report.drifts == {"perception": None, "total": None}
    with pytest.raises(DataError, match="no run"):
        run_diagnose(tmp_path / "rollouts")
