"""A step's metrics on groups worked out by hand, and against SciPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from cluster.record.metric_table import unlisted
from cluster.run.step_metrics import step_metrics
from rewards.compose import Composition, compose_groups
from rewards.terms import Outcome, Perception
from rollout.record import Group, Rollout, Turn
from tests.support.toys import Misbehaves, group, score


def test_step_metrics_on_groups_worked_out_by_hand() -> None:
    groups = [
        group(1, "1;2;", "2;4;x", tokens=4),
        group(2, "2;4;", "2;4;", tokens=8, finish_reason="length"),
        group(0, "0;0;", "0;1;x,y", tokens=4),
    ]
    terms = [Outcome(), Perception(), Misbehaves("nan")]
    composition = Composition(
        {"outcome": 0.7, "perception": 0.3, "nan": 0.0}, on_failure={"nan": "drop_group"}
    )
    scored = compose_groups(groups, [score(g, *terms) for g in groups], composition)
    found = step_metrics(scored, policy_version=8)
    expected = {
        "reward/outcome/mean": 0.75,
        "reward/outcome/std": np.std([1, 0, 1, 1]),
        "reward/outcome/zero_variance": 0.5,
        "reward/outcome/failures": 0,
        "reward/nan/failures": 1,
        "reward/nan/failures/nan": 1,
        "reward/total/mean": 0.75,
        "group/count": 3,
        "group/dropped": 1,
        "group/zero_variance": 0.5,
        "acc/a": 4 / 6,
        "acc/a_p": 5 / 6,
        "acc/leak": 0.0,
        "acc/self_consistency": 5 / 6,
        "defects/x": 2,
        "defects/y": 1,
        "coupling/outcome_perception/n": 6,
        "coupling/outcome_perception/zero_variance": 1 / 3,
        "response/tokens_mean": (4 + 5 + 8 + 9 + 4 + 5) / 6,
        "response/tokens": 35,
        "response/truncated": 1 / 3,
        "policy/lag_mean": 1,
        "policy/lag_max": 1,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    a, a_p = [1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1]
    pooled = stats.pearsonr(a, a_p).statistic
    assert found["coupling/outcome_perception/pooled"] == pytest.approx(pooled)
    # Groups 1 and 3 vary in a; only group 1 varies in a_p with it.
    assert found["coupling/outcome_perception/within"] == pytest.approx(0.5 / np.sqrt(1.0 * 0.5))
    assert found["reward/outcome/seconds_max"] >= found["reward/outcome/seconds_mean"] > 0
    assert all(isinstance(value, float) and np.isfinite(value) for value in found.values())


def test_an_undefined_number_is_absent_not_nan() -> None:
    one = group(1, "1;2;", "1;2;")
    found = step_metrics(
        compose_groups([one], [score(one, Outcome())], Composition({"outcome": 1.0})), 7
    )
    assert "coupling/outcome_perception/pooled" not in found
    assert found["coupling/outcome_perception/zero_variance"] == 1.0
    assert step_metrics([], 0) == {"group/count": 0.0, "group/dropped": 0.0}


def test_a_step_tells_each_terms_reliability_where_it_is_defined() -> None:
    groups = [group(1, "1;2;", "1;3;", "2;4;"), group(2, "2;4;", "3;4;"), group(0, "0;0;", "1;0;")]
    composition = Composition({"outcome": 1.0}, on_failure={"nan": "zero"})
    found = [score(g, Outcome(), Perception(), Misbehaves("nan")) for g in groups]
    metrics = step_metrics(compose_groups(groups, found, composition), 7)
    a_p = np.array([1, 1, 0, 1, 0, 1, 0])
    a = np.array([1, 0, 0, 1, 1, 1, 1])
    assert metrics["reliability/outcome/pooled"] == pytest.approx(stats.pearsonr(a, a_p).statistic)
    # Only the first group's outcome varies.
    expected = stats.pearsonr(a[:3], a_p[:3]).statistic
    assert metrics["reliability/outcome/within"] == pytest.approx(expected)
    near = stats.pearsonr(a[:3], [1, 1, 0.5]).statistic  # 1 / (1 + distance)
    assert metrics["reliability/outcome/graded"] == pytest.approx(near)
    u = stats.mannwhitneyu(a[a_p == 1], a[a_p == 0]).statistic
    assert metrics["reliability/outcome/auc"] == pytest.approx(u / 12)
    assert metrics["reliability/perception/auc"] == 1.0
    # `nan` gives ones, and zeros for the group it failed on: those are not its values.
    assert "reliability/nan/pooled" not in metrics
    assert "reliability/nan/within" not in metrics
    assert metrics["reliability/nan/auc"] == 0.5


def test_what_episodes_did_is_counted_only_where_there_were_some() -> None:
    made = group(1, "1;2;", "2;4;", "1;2;")
    turns = (Turn("a", True, "so", 2, 0.5, ("odd",)), Turn("b", True, "", 0), Turn("c"))
    first, second, plain = made.rollouts
    rollouts = (
        replace(first, turns=turns, finish_reason="turn_budget"),
        replace(
            second,
            turns=turns[2:],
            failure="died: so",
            finish_reason="environment",
            parsed=replace(
                second.parsed, earlier=(replace(first.parsed, spans={"perception": (0, 1)}),)
            ),
        ),
        plain,
    )

    def found(*chosen: Rollout) -> dict[str, float]:
        one = replace(made, rollouts=chosen)
        scored = compose_groups([one], [score(one, Outcome())], Composition({"outcome": 1.0}))
        metrics = step_metrics(scored, 8)
        return {name: value for name, value in metrics.items() if name.startswith("episode/")}

    assert found(*rollouts) == {
        "episode/turns_mean": 2.0,
        "episode/calls_mean": 1.0,
        "episode/called": 0.5,
        "episode/images_mean": 1.0,
        "episode/reread": 0.5,
        "episode/finish/environment": 0.5,
        "episode/finish/turn_budget": 0.5,
        "episode/defects/odd": 1.0,
        "episode/failures/died": 1.0,
    }
    assert found(plain) == {} and not unlisted(found(*rollouts))


def test_calls_are_a_segment_of_responses_with_an_environment_alone() -> None:
    made = group(1, "1;2;", "1;3;", tokens=4)
    calls = np.array([3, 3, 0, -1], np.int8)
    first, other = made.rollouts
    called = replace(made, rollouts=(replace(first, segments=calls, turns=(Turn("a"),)), other))

    def found(one: Group) -> dict[str, float]:
        composition = Composition({"outcome": 1.0}, credit={"outcome": ("act",)})
        scored = compose_groups([one], [score(one, Outcome())], composition)
        return step_metrics(scored, 8)

    assert found(called)["response/share/act"] == pytest.approx(2 / (4 + len(other.segments)))
    assert found(called)["group/zero_variance/act"] == 0.0
    assert found(called)["group/zero_variance/perception"] == 1.0
    assert not unlisted(found(called))
    assert not [name for name in found(made) if name.endswith("/act")]
