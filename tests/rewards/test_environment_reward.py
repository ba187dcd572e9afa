"""What an environment gives is a term; what it fails is the recipe's word."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rewards.compose import Composition, compose_groups
from rewards.episodes import EnvironmentReward, environment_failures
from rewards.terms import term_facts
from rollout.record import Turn
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
