"""Coupling: against SciPy, against a regression, and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rewards.coupling import coupling, independent_reference, outcome_couplings
from rewards.diagnosis import diagnose
from rewards.intervals import Interval
from tests.support.toys import TASK, group


def test_the_pooled_correlation_equals_scipy_and_is_none_where_undefined() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = rng.normal(size=20)
        y = rng.normal() * x + rng.normal(size=20)
        found = coupling(np.split(x, 4), np.split(y, 4)).pooled.value
        assert found == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert coupling([np.full(6, 0.9)], [np.arange(6.0)]).pooled == Interval()
    assert coupling([np.array([1.0])], [np.array([2.0])]).pooled == Interval()


def test_within_equals_a_regression_on_group_dummies() -> None:
    rng = np.random.default_rng(1)
    rewards = [rng.normal(size=8) + 3 * i for i in range(10)]
    skills = [0.5 * r + rng.normal(size=8) - i for i, r in enumerate(rewards)]
    dummies = np.kron(np.eye(10), np.ones((8, 1)))

    def residual(y: np.ndarray) -> np.ndarray:
        return y - dummies @ np.linalg.lstsq(dummies, y, rcond=None)[0]

    x, y = residual(np.concatenate(rewards)), residual(np.concatenate(skills))
    found = coupling(rewards, skills)
    assert found.within.value == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert (found.n, found.n_within, found.zero_variance) == (80, 80, 0.0)


def test_pooled_and_within_can_disagree_in_sign() -> None:
    # Better problems, worse rollouts: the case for reporting both.
    rewards = [np.array([0.0, 1.0]) + 10 * i for i in range(5)]
    skills = [np.array([1.0, 0.0]) + 10 * i for i in range(5)]
    found = coupling(rewards, skills)
    assert found.pooled.value is not None
    assert found.pooled.value > 0.9
    assert found.within.value == pytest.approx(-1.0)


def test_groups_without_reward_variance_are_skipped_and_counted() -> None:
    rewards = [np.full(6, 0.9), np.array([0.0, 1.0, 1.0]), np.zeros(3)]
    skills = [np.arange(6.0), np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 0.0])]
    found = coupling(rewards, skills)
    assert found.within.value == pytest.approx(1.0)
    assert found.n_within == 3
    assert found.zero_variance == pytest.approx(2 / 3)
    # A skill that never varies where the reward does explains none of it.
    diluted = coupling([*rewards, np.array([0.0, 1.0])], [*skills, np.ones(2)])
    assert diluted.within.value is not None
    assert 0 < diluted.within.value < 1


def test_undefined_couplings_are_none() -> None:
    assert coupling([], []).pooled == Interval()
    constant = coupling([np.ones(4)], [np.arange(4.0)])
    assert (constant.pooled, constant.within) == (Interval(), Interval())
    assert constant.zero_variance == 1.0
    assert coupling([np.arange(4.0)], [np.ones(4)]).within == Interval()


def test_outcome_couplings_use_truth_and_self_consistency() -> None:
    # Perception decides the outcome; every answer fits its own perception.
    d = diagnose(TASK, group(5, "5;10;", "4;8;", "5;10;", "3;6;"))
    perception, reasoning = outcome_couplings([d])
    assert perception.within.value == pytest.approx(1.0)
    assert reasoning.within == Interval()


@pytest.mark.parametrize(("p", "q"), [(0.8, 0.3), (0.5, 0.5), (0.25, 0.9), (1.0, 0.4)])
def test_the_independent_reference_equals_simulation(p: float, q: float) -> None:
    rng = np.random.default_rng(2)
    seen, thought = rng.random(400_000) < p, rng.random(400_000) < q
    outcome = (seen & thought).astype(float)
    with_p, with_q = independent_reference(p, q)
    assert with_q == pytest.approx(stats.pearsonr(outcome, thought).statistic, abs=0.01)
    if p < 1:
        assert with_p == pytest.approx(stats.pearsonr(outcome, seen).statistic, abs=0.01)
        assert (with_q > with_p) == (p > q)  # type: ignore[operator]
    else:
        assert with_p is None


def test_the_independent_reference_outside_its_domain() -> None:
    assert independent_reference(0.0, 0.5) == (None, None)
    assert independent_reference(1.0, 1.0) == (None, None)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        independent_reference(1.2, 0.5)
