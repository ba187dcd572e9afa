"""What an environment gives is a term; what it fails is the recipe's word."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rewards.compose import Composition, compose_groups
from rewards.diagnosis import diagnose
from rewards.episodes import (
    CallBonus,
    CallCap,
    CallCost,
    EnvironmentReward,
    environment_failures,
)
from rewards.scored import TermError
from rewards.terms import load_term, term_facts
from rollout.record import Group, Turn
from tasks.load import load_task
from tasks.turns import read_turns
from tests.support.samples import problem as drawn
from tests.support.toys import group, score


def test_the_environments_own_reward_is_the_sum_over_turns() -> None:
    made = group(1, "1;2;", "2;4;")
    turns = (Turn("a", True, reward=0.25), Turn("b", reward=-1.0))
    made = replace(made, rollouts=(replace(made.rollouts[0], turns=turns), made.rollouts[1]))
    assert score(made, EnvironmentReward()).values["environment"].tolist() == [-0.75, 0.0]
    assert term_facts("environment").name == "environment"


def test_a_group_that_lost_an_environment_is_dropped_where_the_recipe_says_so() -> None:
    whole = group(1, "1;2;", "2;4;")
    lost = replace(whole.rollouts[1], turns=(Turn("a"),), failure="deadline: no answer within 1 s")
    broken = replace(whole, rollouts=(whole.rollouts[0], lost))
    assert environment_failures(whole) == ()
    (failure,) = environment_failures(broken)
    assert (failure.term, failure.kind) == ("environment", "deadline")
    assert failure.message == "no answer within 1 s (1 of 2 responses)"
    found = [score(one, EnvironmentReward()) for one in (whole, broken)]
    found[1].failures += (failure,)
    weights = Composition({"environment": 1.0}, on_failure={"environment": "drop_group"})
    kept, dropped = compose_groups([whole, broken], found, weights)
    assert (kept.dropped, dropped.dropped) == (False, True) and np.isnan(dropped.totals).all()


def test_a_perception_that_a_look_changed_is_a_gain_or_a_loss() -> None:
    task = load_task("sudoku")
    puzzle = drawn(0)
    right = task.demonstrate(puzzle, "terse")  # type: ignore[attr-defined]
    other = task.demonstrate(drawn(1), "terse")  # type: ignore[attr-defined]
    seen, seen_other = (text.partition("<reasoning>")[0] for text in (right, other))
    unread = "<perception>\nnothing\n</perception>\n"
    turns = [
        [seen_other, right],
        [unread, seen_other, right],
        [seen, other],
        [seen, unread],
        [seen, right],
        [seen_other, other],
        [right],
        ["I look", right],
    ]
    (plain,) = group(0, "0;0;").rollouts
    rollouts = tuple(
        replace(
            plain,
            text="".join(said),
            parsed=read_turns(task, said),
            turns=tuple(map(Turn, said)),
        )
        for said in turns
    )
    found = diagnose(task, Group("g", puzzle, rollouts))
    assert found.a_p is not None and found.reread_gain is not None and found.reread_loss is not None
    assert found.a_p.tolist() == [1, 1, 0, 0, 1, 0, 1, 1]
    assert found.reread_gain.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert found.reread_loss.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    alone = diagnose(task, Group("g", puzzle, (replace(rollouts[0], turns=()),)))
    assert alone.reread_gain is None and alone.reread_loss is None
    bare = diagnose(task, Group("g", replace(puzzle, perception=""), rollouts))
    assert bare.a_p is None and bare.reread_gain is None


def test_calls_are_paid_for_where_the_answer_is_right_and_cost_wherever_they_are() -> None:
    ok, bad, none = Turn("a", True), Turn("b", True, defects=("bad_number",)), Turn("c")
    turns = [(ok, ok, none), (bad, none), (bad, ok, bad), (none,), (), (ok, none)]
    texts = ["1;2;", "1;2;", "1;2;", "1;2;", "1;2;", "1;3;"]
    made = group(1, *texts)
    with_turns = tuple(replace(r, turns=t) for r, t in zip(made.rollouts, turns, strict=True))
    made = replace(made, rollouts=with_turns)
    for term, expected in (
        (CallBonus(), [1, 0, 1, 0, 0, 0]),
        (CallCost(), [-2, -1, -3, 0, 0, -1]),
        (CallCost(free=1), [-1, 0, -2, 0, 0, 0]),
        (CallCap(most=1), [-1, 0, -1, 0, 0, 0]),
        (CallCap(most=0), [-1, -1, -1, 0, 0, -1]),
    ):
        assert score(made, term).values[term.name].tolist() == expected
    for name, wrong in (("call_cost", {"free": -1}), ("call_cap", {"most": 1.5}), ("call_cap", {})):
        with pytest.raises(TermError, match=name):
            load_term(name, wrong)
