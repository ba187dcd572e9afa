"""A policy that cannot learn: what is said of it, when, and that nothing is said of others."""

from __future__ import annotations

import numpy as np

from cluster.record.evaluation import eval_table, with_readings
from cluster.run.standstill import Standstill, unread, unread_step, unread_tables, why_no_update
from cluster.run.step_metrics import step_metrics
from rewards.compose import Composition, compose_groups
from rewards.reader import Reading
from rewards.scored import ScoredGroup
from rewards.terms import Outcome
from rollout.record import Group
from tests.support.toys import TASK, Misbehaves, group, score

PROSE = ";;missing_perception,missing_answer"


def scored(*groups: Group, fails: bool = False) -> list[ScoredGroup]:
    terms = [Outcome(), *([Misbehaves("nan")] if fails else [])]
    weights = {"outcome": 1.0} | ({"nan": 0.0} if fails else {})
    composition = Composition(weights, on_failure={"nan": "drop_group"})
    return compose_groups(groups, [score(g, *terms) for g in groups], composition)


def test_a_policy_that_never_writes_the_form_is_named_before_the_first_step() -> None:
    tables = {
        "prose": eval_table(TASK, {"greedy": [group(i, PROSE) for i in range(10)]}),
        "cut": eval_table(
            TASK, {"greedy": [group(i, PROSE, finish_reason="length") for i in range(10)]}
        ),
        "wrong": eval_table(TASK, {"greedy": [group(i, "0;1;") for i in range(1, 10)]}),
        "able": eval_table(TASK, {"greedy": [group(1, "1;2;"), *[group(2, PROSE)] * 20]}),
        "no greedy pass": eval_table(TASK, {"oracle": [group(1, PROSE)]}),
    }
    prose, cut = unread_tables(tables)
    assert prose == (
        "prose: missing_answer in 10 of 10 responses, and no answer is right; teach the form "
        "first (`equipoise sft`, section [sft]) or let the prompt ask for it (built-in tasks: "
        'knobs.prompt = "full")'
    )
    assert cut == (
        "cut: truncated in 10 of 10 responses, and no answer is right; raise sampler.max_tokens"
    )
    # The same of training's own responses, where nothing was measured before.
    first = scored(*(group(i, PROSE, PROSE) for i in range(5)))
    line = unread_step(step_metrics(first, 7))
    assert line is not None and line.startswith("training: missing_answer in 10 of 10 responses")


def test_a_reader_that_is_refused_is_told_with_its_bounds() -> None:
    table = eval_table(TASK, {"greedy": [group(i, "1;2;", name=f"p{i}") for i in range(20)]})

    def told(right: int) -> list[str]:
        yes, no = np.array([True]), np.array([False])
        read = {f"p{i}": Reading(yes, i < 5, i < right, no) for i in range(20)}
        return unread_tables({"t": with_readings(table, read)})

    (line,) = told(6)
    assert line.startswith("t: eval.reader: no sufficiency and no used: from p* it answers 0.30")
    assert "from nothing 0.25" in line and told(20) == []


def test_only_a_defect_that_spoils_nearly_every_response_is_named() -> None:
    assert unread("x", 10, 0.0, 0.5, {"bad_cell": 0.8, "missing_answer": 0.1}) is None
    assert unread("x", 10, 0.0, 0.5, {"text_before_perception": 1.0}) is None
    assert unread("x", 10, 0.1, 0.1, {"missing_answer": 0.9}) is None
    lacking = unread("x", 10, 0.7, 0.0, {"missing_perception": 1.0})
    assert lacking is not None and "and no perception is right" in lacking


def test_a_run_that_never_updates_says_so_as_it_happens_and_at_its_end() -> None:
    said: list[str] = []
    run = Standstill(said.append)
    right = group(1, "1;2;", "1;2;")
    run.measured({"toy": eval_table(TASK, {"greedy": [group(1, "1;2;")]})})
    for groups, fails in (
        *[([group(1, "1;3;", "1;3;")], False)] * 3,
        ([right, group(2, "2;5;", "2;5;")], False),
        ([right], False),
        ([right, group(0, "0;1;", "0;1;")], True),
        *[([group(0, "0;0;", "0;1;")], True)] * 6,
    ):
        run.step(step_metrics(scored(*groups, fails=fails), 7), updates=0)
    run.end()
    assert said == [
        "warning: no update in 3 steps in a row: every reward was 0",
        "warning: no update in 6 steps in a row: every reward was 1; nan failed on 1 of 2 groups",
        "warning: no update in 12 steps in a row: every group was dropped: nan failed on "
        "1 of 1 groups",
        "warning: the policy is unchanged: no update in 12 of 12 steps; in the last of them every "
        "group was dropped: nan failed on 1 of 1 groups",
    ]


def test_a_run_that_learns_is_left_alone() -> None:
    said: list[str] = []
    run = Standstill(said.append)
    mixed = step_metrics(scored(group(1, "1;2;", "1;3;"), group(2, "2;4;", "2;4;")), 7)
    equal = step_metrics(scored(group(1, "1;2;", "1;2;"), group(2, "2;5;", "2;5;")), 7)
    for updates in (1, 0, 0, 1, 0, 1):
        run.step(mixed if updates else equal, updates)
    run.end()
    assert said == []
    for _ in range(3):
        run.step(equal, 0)
    run.end()
    why = "in every group all rewards were equal"
    assert said == [
        f"warning: no update in 3 steps in a row: {why}",
        f"warning: no update in 6 of 9 steps; in the last of them {why}",
    ]


def test_a_term_whose_failures_count_as_zero_is_the_cause() -> None:
    asked = group(0, "0;0;", "0;0;")
    composition = Composition({"nan": 1.0}, on_failure={"nan": "zero"})
    found = compose_groups([asked], [score(asked, Misbehaves("nan"))], composition)
    assert why_no_update(step_metrics(found, 7)) == (
        "every reward was 0; nan failed on 1 of 1 groups"
    )
