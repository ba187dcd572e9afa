"""What a reader tells: by hand, against brute force, intervals over puzzles, refused readers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewards.coupling import coupling
from rewards.reader import LEAST, NEAR, Reading, believed, refused
from rewards.sufficiency import Sufficiency, asymmetry_change, sufficiency


def reading(
    enough: Any, blind: bool = False, ceiling: bool | None = None, stated: Any = False
) -> Reading:
    told = np.broadcast_to(np.array(stated, bool), np.shape(enough))
    return Reading(np.array(enough, bool), blind, ceiling, told)


def test_numbers_worked_out_by_hand() -> None:
    right = [np.array(a, bool) for a in ([1, 1, 0, 0], [1, 0, 0, 0])]
    found = sufficiency(
        right,
        [
            reading([1, 0, 1, 0], blind=True, ceiling=True, stated=[1, 0, 0, 0]),
            reading([1, 1, 0, 0], blind=False, stated=[0, 0, 0, 0]),
        ],
    )
    assert found.sufficiency.value == 4 / 8
    assert found.used.value == 2 / 4  # the 1st of each; not the 3rd, and not the 6th
    assert found.unused.value == 1 / 4
    assert found.blind.value == 4 / 8 and found.gain.value == 0.0
    # One labelled problem, which p* does not help: too few to refuse the reader for it.
    assert (found.ceiling.value, found.labelled) == (1.0, 1)
    assert found.stated.value == 1 / 8
    assert (found.rollouts, found.groups) == (8, 2)


def random_groups(rng: np.random.Generator, count: int = 40, skill: float = 0.7) -> Any:
    right, found = [], []
    for _ in range(count):
        enough = rng.random(6) < rng.uniform(0.2, 0.8)
        a = np.where(enough, rng.random(6) < skill, rng.random(6) < 0.15)
        right.append(a)
        found.append(reading(enough, rng.random() < 0.2, True if rng.random() < 0.5 else None))
    return right, found


def test_random_groups_equal_counting_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        right, found = random_groups(rng, int(rng.integers(2, 12)))
        pairs = [
            (bool(a), bool(s), r.blind)
            for own, r in zip(right, found, strict=True)
            for a, s in zip(own, r.sufficient, strict=True)
        ]

        def share(values: list[bool]) -> float | None:
            return sum(values) / len(values) if values else None

        made = sufficiency(right, found, resamples=0)
        expected = {
            "sufficiency": share([s for _, s, _ in pairs]),
            "used": share([a for a, s, _ in pairs if s]),
            "unused": share([a for a, s, _ in pairs if not s]),
            "blind": share([b for *_, b in pairs]),
            "gain": share([s for _, s, _ in pairs]) - share([b for *_, b in pairs]),  # type: ignore[operator]
        }
        assert made.refusal is None
        for name, value in expected.items():
            assert getattr(made, name).value == pytest.approx(value), name
        if expected["used"] is not None:
            gap = expected["used"] - expected["sufficiency"]  # type: ignore[operator]
            assert made.asymmetry.value == pytest.approx(gap)
        assert made.outcome == coupling(right, [r.sufficient for r in found])
        assert made.stated.value == 0.0


def test_intervals_hold_their_value_and_are_over_puzzles() -> None:
    right, found = random_groups(np.random.default_rng(1))
    names = [f"p{k}" for k in range(len(right))]
    one = sufficiency(right, found, names)
    four = sufficiency(right * 4, found * 4, names * 4)
    for name in ("sufficiency", "used", "unused", "blind", "gain", "ceiling", "asymmetry"):
        a, b = getattr(one, name), getattr(four, name)
        assert a.low <= a.value <= a.high and a.low < a.high
        # The same puzzles four times over are no news.
        assert (b.low, b.high) == pytest.approx((a.low, a.high), abs=0.02)


def test_the_intervals_of_a_known_world_hold_the_truth() -> None:
    truth = {"used": 0.7, "unused": 0.15, "sufficiency": 0.5, "asymmetry": 0.2}
    hits = dict.fromkeys(truth, 0)
    for seed in range(50):
        right, found = random_groups(np.random.default_rng(seed), 60)
        made = sufficiency(right, found, resamples=200)
        for name, value in truth.items():
            low, high = getattr(made, name).low, getattr(made, name).high
            hits[name] += low <= value <= high
    assert all(44 <= count <= 50 for count in hits.values()), hits


def test_a_reader_that_p_star_hardly_helps_is_refused() -> None:
    def of(ceilings: int, floors: int, n: int = 20, unlabelled: int = 0) -> list[Reading]:
        made = [reading([1, 0], i < floors, i < ceilings) for i in range(n)]
        return made + [reading([1, 1], False) for _ in range(unlabelled)]

    assert refused(of(20, 2)) is None
    assert refused(of(5, 3)) is None  # 0.25 against 0.15: just `NEAR`
    assert NEAR == 0.1
    told = refused(of(5, 4, unlabelled=30))
    assert told is not None and "0.25 of 20 labelled" in told and "0.20" in told
    assert refused(of(4, 9)) is not None
    assert refused(of(0, 9, n=LEAST)) is not None and refused(of(0, 9, n=LEAST - 1)) is None
    assert refused([reading([1, 1], True)] * 5) is None  # nothing is known of its ceiling
    groups = of(5, 4)
    withheld = sufficiency([np.array([True, False])] * 20, groups)
    assert withheld.refusal and withheld.ceiling.value == 0.25 and withheld.blind.value == 0.2
    for name in ("sufficiency", "used", "unused", "gain", "asymmetry"):
        assert getattr(withheld, name).value is None
    assert withheld.outcome == Sufficiency().outcome


def test_a_reader_is_judged_on_each_kind_of_question_by_itself() -> None:
    """Of the kinds it is refused for nothing counts: the numbers are those of the others alone."""
    rng = np.random.default_rng(5)
    right, found = random_groups(rng, 30)
    good = [replace(r, kind="count", ceiling=True) for r in found]
    bad = [replace(r, kind="sum", ceiling=r.blind) for r in reversed(found)]
    few = [replace(r, kind="walk", ceiling=False) for r in found[: LEAST - 1]]
    mixed = [r for pair in zip(good, bad, strict=True) for r in pair]
    names = [f"p{k}" for k in range(30)]
    twice = [k for k in range(30) for _ in range(2)]
    both = sufficiency([right[k] for k in twice], mixed, [names[k] for k in twice])
    alone = sufficiency(right, good, names)
    assert both == replace(alone, refusal=both.refusal) and alone.refusal is None
    told = both.refusal or ""
    assert told.startswith("questions of kind sum: from p* it answers") and "count" not in told
    assert believed(mixed) == list(range(0, 60, 2))
    assert refused([*good, *few]) is None and len(believed([*good, *few])) == 30 + len(few)
    whole = sufficiency(right, bad, names)
    assert whole.refusal and whole.sufficiency.value is None and whole.groups == 30


def test_without_groups_or_without_enough_nothing_is_a_number() -> None:
    assert sufficiency([], []) == Sufficiency()
    none = sufficiency([np.array([True, False])] * 3, [reading([0, 0])] * 3)
    assert none.sufficiency.value == 0.0 and none.sufficiency.high > 0.1  # type: ignore[operator]
    assert none.used.value is None and none.asymmetry.value is None
    assert none.unused.value == 0.5


def test_the_change_of_the_asymmetry_is_that_of_used_less_that_of_sufficiency() -> None:
    rng = np.random.default_rng(3)
    lots = [(*random_groups(rng, 40, skill), [f"p{k}" for k in range(40)]) for skill in (0.3, 0.9)]
    found = asymmetry_change(*lots)
    was, now = (sufficiency(right, readings, names) for right, readings, names in lots)
    assert found.value == pytest.approx(now.asymmetry.value - was.asymmetry.value)  # type: ignore[operator]
    assert found.low is not None and 0.2 < found.low < found.value < found.high < 1.1  # type: ignore[operator]
    assert asymmetry_change(lots[0], lots[0]).value == 0.0
    assert asymmetry_change(lots[0], ([], [], [])).value is None
