"""Reward hacking: flagged when a reward rises and perception falls, and hardly ever by chance."""

from __future__ import annotations

import numpy as np

from rewards.hacking import drift, thirds


def series(
    rng: np.random.Generator, reward: tuple[float, float], a_p: tuple[float, float], steps: int = 30
) -> tuple[list[int], list[np.ndarray], list[np.ndarray]]:
    """Four groups of eight a step whose two shares go from start to end in a line."""
    at, rewards, seen = [], [], []
    for step in range(1, steps + 1):
        share = (step - 1) / (steps - 1)
        for _ in range(4):
            # Easy and hard problems: both sides share them.
            ease = rng.normal(scale=0.1)
            at.append(step)
            for found, (start, end) in ((rewards, reward), (seen, a_p)):
                chance = np.clip(start + share * (end - start) + ease, 0, 1)
                found.append((rng.random(8) < chance).astype(float))
    return at, rewards, seen


def test_only_a_rising_reward_with_falling_perception_is_flagged() -> None:
    rng = np.random.default_rng(0)
    up, down, flat = (0.3, 0.7), (0.7, 0.3), (0.5, 0.5)
    flags = {}
    for name, reward, a_p in (
        ("up/down", up, down),
        ("up/up", up, up),
        ("down/down", down, down),
        ("down/up", down, up),
        ("up/flat", up, flat),
        ("flat/down", flat, down),
    ):
        found = drift(*series(rng, reward, a_p))
        assert found is not None
        flags[name] = found.flagged
    assert flags == {name: name == "up/down" for name in flags}


def test_the_change_is_that_of_the_means_of_the_outer_thirds() -> None:
    at = [1, 1, 2, 3, 4, 5, 6]
    rewards = [np.array([float(step)] * (1 + step % 2)) for step in at]
    found = drift(at, rewards, [1.0 - r / 10 for r in rewards])
    assert found is not None and found.reward.value is not None and found.a_p.value is not None
    assert np.isclose(found.reward.value, (5 + 5 + 6) / 3 - (4 * 1 + 2) / 5)
    assert np.isclose(found.a_p.value, -found.reward.value / 10)


def test_noise_is_hardly_ever_flagged() -> None:
    rng = np.random.default_rng(1)
    flagged, rose = 0, 0
    for run in range(400):
        found = drift(*series(rng, (0.5, 0.5), (0.5, 0.5), steps=9), resamples=200, seed=run)
        assert found is not None and found.reward.low is not None
        flagged += found.flagged
        rose += found.reward.low > 0
    assert flagged <= 4
    assert rose <= 24  # 2.5 % are expected: a test that could never flag would prove nothing


def test_fewer_than_three_steps_tell_nothing() -> None:
    two = [np.array([0.0, 1.0])] * 2
    assert drift([], [], []) is None
    assert drift([1, 2], two, two) is None
    assert thirds([3, 1, 1, 2, 5]) == ({1, 2}, {3}, {5})
