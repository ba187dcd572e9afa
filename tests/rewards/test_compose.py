"""Composition: against references written out in plain Python from the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rewards.advantages import EPS
from rewards.compose import (
    Composition,
    compose_groups,
    normalize_then_sum,
    weighted_sum,
)
from rewards.scored import RewardError, ScoredGroup, ScoredTerms
from rewards.settings import Method, RewardConfig, RewardTermConfig
from rewards.terms import Format, Outcome, Perception
from tasks.core import SEGMENTS
from tests.support.toys import Length, Misbehaves, group, score


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
    (found,) = compose(
        groups, [Outcome(), Perception()], Composition({"perception": 0.3, "outcome": 0.7})
    )
    assert found.totals.tolist() == [1.0, 0.3, 0.7, 0.0]


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
        assert (found[2].advantages[0] > 0).all() and (found[2].advantages[1] < 0).all()


def test_plain_reinforce_pp_keeps_groups_that_cannot_be_told_apart() -> None:
    # Three right, none right, half right: without a group baseline all of them have a gradient.
    batch = [group(5, *["5;10;"] * 4), group(4, *["4;7;"] * 4), group(3, "3;6;", "3;5;")]
    found = {}
    for estimator in ("reinforce_pp", "reinforce_pp_baseline"):
        composition = Composition({"outcome": 1.0}, estimator=estimator)
        found[estimator] = compose(batch, [Outcome()], composition)
    plain, baseline = found["reinforce_pp"], found["reinforce_pp_baseline"]
    assert [g.zero_variance for g in plain] == [False] * 3
    assert (plain[0].advantages > 0).all() and (plain[1].advantages < 0).all()
    assert [g.zero_variance for g in baseline] == [True, True, False]
    whole = np.concatenate([g.advantages for g in baseline])
    np.testing.assert_allclose(whole.std(axis=0), 1, rtol=1e-4)
    # Dropped groups are not in the batch; a batch of equals has no signal at all.
    (same,) = compose(
        batch[:1], [Outcome()], Composition({"outcome": 1.0}, estimator="reinforce_pp")
    )
    assert same.zero_variance


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
    assert (found.advantages[0] > 0).all()
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
        ({"weights": {}}, "at least one"),
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


def random_batch(rng: np.random.Generator, names: list[str]) -> list[dict[str, np.ndarray]]:
    return [
        {
            name: rng.choice([0.0, 0.5, 0.9, 1.0], size)
            if rng.random() < 0.8
            else np.full(size, 0.9)
            for name in names
        }
        for size in rng.integers(2, 7, size=int(rng.integers(1, 5)))
    ]


def scored(batch: list[dict[str, np.ndarray]], composition: Composition) -> list[ScoredGroup]:
    groups = [group(1, *["1;2;"] * len(next(iter(values.values())))) for values in batch]
    found = [ScoredTerms(values, (), {}, None) for values in batch]
    return compose_groups(groups, found, composition)


@pytest.mark.parametrize("method", ["sum_then_normalize", "normalize_then_sum"])
def test_each_segments_tokens_learn_from_exactly_the_terms_credited_to_it(method: Method) -> None:
    # What a token gets is what a whole-response composition of its own terms would give it.
    rng = np.random.default_rng(3)
    names = ["a", "b", "c"]
    for _ in range(100):
        weights = {name: float(rng.normal()) for name in names}
        credit = {
            name: tuple(s for s in SEGMENTS if rng.random() < 0.6) or SEGMENTS for name in names
        }
        batch = random_batch(rng, names)
        routed = scored(batch, Composition(weights, method=method, credit=credit))
        for column, segment in enumerate([*SEGMENTS, "none"]):
            mine = {n: w for n, w in weights.items() if segment == "none" or segment in credit[n]}
            if not mine:
                assert all(not g.advantages[:, column].any() for g in routed)
                continue
            alone = scored(batch, Composition(mine, method=method))
            for ours, whole in zip(routed, alone, strict=True):
                np.testing.assert_array_equal(ours.advantages[:, column], whole.advantages[:, -1])
        whole = scored(batch, Composition(weights, method=method))
        for ours, theirs in zip(routed, whole, strict=True):
            np.testing.assert_array_equal(ours.totals, theirs.totals)
            assert ours.zero_variance == (not ours.advantages.any())


def test_mean_centred_credit_adds_up_to_the_whole_responses_advantage() -> None:
    # Dr. GRPO is linear: with every term credited to one segment, the segments share the whole.
    rng = np.random.default_rng(4)
    names = ["a", "b", "c", "d"]
    credit = dict(zip(names, ((s,) for s in SEGMENTS), strict=True))
    for _ in range(100):
        weights = {name: float(rng.normal()) for name in names}
        composition = Composition(weights, estimator="dr_grpo", credit=credit)
        for g in scored(random_batch(rng, names), composition):
            np.testing.assert_allclose(
                g.advantages[:, :-1].sum(1), g.advantages[:, -1], rtol=0, atol=1e-12
            )


def test_a_gate_lets_reasoning_earn_only_behind_passed_perception() -> None:
    batch = [{"outcome": np.array([1.0, 1, 0, 1]), "perception": np.array([1.0, 0, 1, 0.5])}]
    composition = Composition(
        {"outcome": 1.0, "perception": 0.0}, gates={"outcome": ("perception", 0.5)}
    )
    (found,) = scored(batch, composition)
    assert found.totals.tolist() == [1, 0, 0, 1]
    assert found.terms["outcome"].tolist() == [1, 1, 0, 1]  # logged as it is
    assert (found.advantages[:, 0] > 0).tolist() == [True, False, False, True]
    with pytest.raises(RewardError, match="percption"):
        scored(batch, Composition({"outcome": 1.0}, gates={"outcome": ("percption", 0.5)}))


def test_weights_are_those_of_alpha_or_of_their_schedule() -> None:
    terms = RewardConfig(alpha=0.25).effective_terms()
    assert {t.name: t.weight_at(0.5) for t in terms} == {"perception": 0.25, "outcome": 0.75}

    def at(start: float, end: float, schedule: Any, share: float = 1.0) -> Callable[[float], float]:
        fields = {"weight": start, "final_weight": end, "schedule": schedule}
        return RewardTermConfig(name="outcome", schedule_share=share, **fields).weight_at

    for schedule in ("linear", "cosine"):
        weight = at(0.2, 0.8, schedule, share=0.5)
        found = [weight(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        assert found == pytest.approx([0.2, 0.5, 0.8, 0.8])
        falls = [at(1.0, 0.0, schedule)(x) for x in np.linspace(0, 1, 21)]
        assert falls == sorted(falls, reverse=True)
    assert at(1.0, 0.0, "linear")(0.25) == 0.75
    assert at(1.0, 0.0, "cosine")(0.25) == pytest.approx(0.5 + math.sqrt(2) / 4)
