"""Composition: against references written out in plain Python from the papers' formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from rewards.advantages import EPS
from rewards.compose import (
    Composition,
    alpha_weights,
    compose_groups,
    normalize_then_sum,
    weighted_sum,
)
from rewards.records import RewardError, ScoredGroup
from rewards.terms import Format, Outcome, Perception
from tests.rewards.toys import Length, Misbehaves, group, score


def compose(groups: list, terms: list, composition: Composition) -> list[ScoredGroup]:
    return compose_groups(groups, [score(g, *terms) for g in groups], composition)


def reference_gdpo(batch: list[dict], weights: dict) -> list[list[float]]:
    """arXiv 2601.05242 in plain Python floats: normalise per group and reward, sum, whiten."""

    def mean_std(xs: list[float]) -> tuple[float, float]:
        mean = math.fsum(xs) / len(xs)
        return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in xs) / len(xs))

    sums = []
    for group_ in batch:
        size = len(next(iter(group_.values())))
        total = [0.0] * size
        for name, weight in weights.items():
            values = list(group_[name])
            mean, std = mean_std(values)
            for i, value in enumerate(values):
                same = min(values) == max(values)
                total[i] += 0.0 if same else weight * (value - mean) / (std + EPS)
        sums.append(total)
    mean, std = mean_std([x for total in sums for x in total])
    return [[0.0 if min(t) == max(t) else (x - mean) / (std + EPS) for x in t] for t in sums]


def test_alpha_is_the_papers_convex_combination() -> None:
    groups = [group(5, "5;10;", "5;9;", "4;10;", "4;9;")]
    (found,) = compose(groups, [Outcome(), Perception()], Composition(alpha_weights(0.3)))
    assert found.totals.tolist() == [1.0, 0.3, 0.7, 0.0]
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            alpha_weights(bad)


def test_gdpo_equals_the_reference_on_random_batches() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        weights = {"a": 0.7, "b": float(rng.normal()), "c": 0.1}
        batch = [
            {
                "a": rng.integers(0, 2, size).astype(float),
                "b": rng.choice([0.0, 0.5, 0.9], size),
                "c": np.full(size, 0.9) if rng.random() < 0.5 else rng.random(size),
            }
            for size in rng.integers(2, 9, size=int(rng.integers(1, 7)))
        ]
        batch.append({name: np.full(6, 0.9) for name in weights})  # a group without signal
        found = normalize_then_sum(batch, weights)
        for ours, theirs in zip(found, reference_gdpo(batch, weights), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
        assert found[-1].tolist() == [0.0] * 6


def test_gdpo_tells_apart_what_a_sum_cannot() -> None:
    # The case GDPO was made for: (1, 0) and (0, 1) have one sum and different rarity.
    batch = [{"a": np.array([1.0, 0, 0, 0]), "b": np.array([0.0, 1, 1, 1])}]
    weights = {"a": 1.0, "b": 1.0}
    assert np.ptp(weighted_sum(batch[0], weights)) == 0
    terms = {"a": np.array([1.0, 0, 0, 0]), "b": np.array([0.0, 1, 1, 0])}
    (found,) = normalize_then_sum([terms], weights)
    assert weighted_sum(terms, weights)[0] == weighted_sum(terms, weights)[1]
    assert found[0] > found[1] + 0.1


def test_groups_that_cannot_be_told_apart_are_zero_and_flagged() -> None:
    same = group(5, *["5;10;x"] * 6)  # 0.9 each with the format term below
    half = group(4, *["4;9;"] * 8)  # 0.5 each: mid-range, and still no signal
    mixed = group(3, "3;6;", "3;5;")
    terms = [Outcome(), Perception(), Format({"x": 0.2})]
    for method in ("sum_then_normalize", "normalize_then_sum"):
        composition = Composition({"outcome": 0.5, "perception": 0.0, "format": 0.5}, method=method)
        found = compose([same, half, mixed], terms, composition)
        assert [g.zero_variance for g in found] == [True, True, False]
        assert [g.has_gradient for g in found] == [False, False, True]
        assert found[0].totals.tolist() == [0.9] * 6
        assert found[1].totals.tolist() == [0.5] * 8
        assert not found[0].advantages.any()
        assert not found[1].advantages.any()
        assert found[2].advantages[0] > 0 > found[2].advantages[1]


def test_an_unweighted_term_is_logged_and_rewards_nothing() -> None:
    one = group(5, "5;10;", "5;10;zzzz")
    (found,) = compose([one], [Outcome(), Length()], Composition({"outcome": 1.0}))
    assert found.zero_variance
    assert found.terms["length"].tolist() == [5.0, 9.0]


def test_abort_puts_the_terms_own_traceback_on_top() -> None:
    composition = Composition({"raise": 1.0, "outcome": 1.0})
    with pytest.raises(RewardError) as error:
        compose([group(0, "0;0;")], [Misbehaves("raise"), Outcome()], composition)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("Traceback")
    assert "toys.py" in lines[1]
    assert "reward term 'raise' failed on group 'g-0'" in str(error.value)
    assert "on_failure" in lines[-1]


def test_drop_group_drops_that_group_alone_and_from_the_batch_statistics() -> None:
    bad, good, other = group(0, "0;0;", "0;1;"), group(1, "1;2;", "1;1;"), group(2, "2;4;", "2;1;")
    weights = {"nan": 1.0, "outcome": 1.0}
    for method in ("sum_then_normalize", "normalize_then_sum"):
        composition = Composition(weights, method=method, on_failure={"nan": "drop_group"})
        terms = [Misbehaves("nan"), Outcome()]
        found = compose([bad, good, other], terms, composition)
        assert [g.dropped for g in found] == [True, False, False]
        assert not found[0].advantages.any()
        assert not found[0].zero_variance
        assert np.isnan(found[0].totals).all()
        alone = compose([good, other], terms, composition)
        assert [g.advantages.tolist() for g in found[1:]] == [g.advantages.tolist() for g in alone]


def test_zero_counts_the_failed_term_as_zero_and_keeps_the_rest() -> None:
    composition = Composition({"nan": 1.0, "outcome": 1.0}, on_failure={"nan": "zero"})
    terms = [Misbehaves("nan"), Outcome()]
    (found,) = compose([group(0, "0;0;", "0;1;")], terms, composition)
    assert found.totals.tolist() == [1.0, 0.0]
    assert found.advantages[0] > 0
    assert [f.kind for f in found.failures] == ["nan"]


def test_a_task_that_fails_under_diagnosis_ends_the_run_unless_failures_are_allowed() -> None:
    one = group(1, "1;666;", "2;4;")
    with pytest.raises(RewardError, match="the checker cannot take 666"):
        compose([one], [Perception()], Composition({"perception": 1.0}))
    lenient = Composition({"perception": 1.0}, on_failure={"perception": "zero"})
    (found,) = compose([one], [Perception()], lenient)
    assert found.diagnosis is None
    assert found.totals.tolist() == [1.0, 0.0]
    assert [f.term for f in found.failures] == ["diagnosis"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weights": {}}, "needs a weight"),
        ({"weights": {"outcome": 0.0}}, "needs a weight"),
        ({"weights": {"outcome": math.nan}}, "finite"),
        (
            {"weights": {"a": 1}, "method": "normalize_then_sum", "estimator": "rloo"},
            "standardises",
        ),
    ],
)
def test_a_composition_without_sense_is_refused(fields: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Composition(**fields)


def test_a_weight_that_names_no_term_is_an_error() -> None:
    with pytest.raises(RewardError, match="percption"):
        compose([group(1, "1;2;")], [Outcome()], Composition({"percption": 1.0}))


def test_a_recipes_terms_fit_the_contract() -> None:
    from cluster.config import RewardConfig

    terms = RewardConfig(alpha=0.25).effective_terms()
    weights = {term.name: term.weight for term in terms}
    assert weights == alpha_weights(0.25)
    assert SimpleNamespace(**terms[0].model_dump()).on_failure == "abort"
