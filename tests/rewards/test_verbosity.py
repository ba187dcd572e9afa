"""Length and repetition against values worked out by hand and other implementations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rewards.verbosity import Length, Repetition
from rollout.record import Group, Rollout
from tasks.core import ENVIRONMENT
from tests.support.toys import TASK, group


def with_tokens(*ids: list[int]) -> Group:
    one = group(1, *["1;2;"] * len(ids))
    rollouts = zip(one.rollouts, ids, strict=True)
    return replace(one, rollouts=tuple(with_turn(r, i) for r, i in rollouts))


def with_turn(rollout: Rollout, ids: list[int]) -> Rollout:
    """These tokens, with many equal ones of an environment after the second."""
    said = np.array([*ids[:2], *[9] * 30, *ids[2:]], np.int32)
    segments = np.array([0] * len(ids[:2]) + [ENVIRONMENT] * 30 + [0] * len(ids[2:]), np.int8)
    return replace(rollout, response_ids=said, segments=segments)


def test_overlong_responses_pay_along_the_buffer() -> None:
    lengths = [0, 5, 6, 7, 8, 9, 10, 11, 99]
    values = Length(max_tokens=10, buffer=4)(TASK, with_tokens(*[[1] * n for n in lengths]))
    assert values == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    assert not np.signbit(values[0])


def test_repeated_n_grams_pay_by_their_share() -> None:
    texts = ([], [7], [7, 7, 7, 7, 7], [1, 2, 1, 2, 1], [1, 2, 3, 4, 5], [256, 1, 1, 256, 1])
    values = Repetition(n=2, max_penalty=1.0)(TASK, with_tokens(*texts))
    # 4 bigrams each: 1 different; 12 21 12 21; 4 different; (256 1) (1 1) (1 256) (256 1)
    assert values == [0, 0, -0.75, -0.5, 0, -0.25]
    assert not np.signbit(values[4])


def test_both_equal_other_implementations_on_random_groups() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        ids = [rng.integers(3, size=rng.integers(30)).tolist() for _ in range(rng.integers(1, 9))]
        most, n = int(rng.integers(1, 30)), int(rng.integers(1, 5))
        buffer = int(rng.integers(1, most + 1))
        overlong = [
            0.0 if len(y) <= most - buffer
            else ((most - buffer) - len(y)) / buffer if len(y) <= most
            else -1.0
            for y in ids
        ]  # fmt: skip
        repeats = []
        for y in ids:
            grams = list(zip(*[y[i:] for i in range(n)], strict=False))
            again = sum(grams[i] in grams[:i] for i in range(len(grams)))
            repeats.append(-2.0 * again / len(grams) if grams else 0.0)
        one = with_tokens(*ids)
        np.testing.assert_allclose(Length(most, buffer)(TASK, one), overlong, rtol=0, atol=1e-12)
        np.testing.assert_allclose(Repetition(n)(TASK, one), repeats, rtol=0, atol=1e-12)


def test_a_long_loop_approaches_the_whole_penalty_in_linear_time() -> None:
    (value,) = Repetition()(TASK, with_tokens([5, 6] * 50_000))
    assert -2 < value < -1.999
