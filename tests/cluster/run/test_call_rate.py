"""A rate of calls that went to none, or to all there may be, is told once; nothing else is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cluster.run.call_rate import CallRate, most_calls
from tests.support.recipes import made_recipe

ZOOM = 'environment={name="zoom", turns=5}'


def told(most: int, calls: Sequence[float]) -> list[int]:
    """Steps after which something is said, of so many calls a response on average."""
    watch = CallRate(most)
    metrics = [{"episode/called": min(1.0, c), "episode/calls_mean": c} for c in calls]
    return [n for n, found in enumerate(metrics, 1) if watch.step(n, found)]


@pytest.mark.parametrize(
    ("most", "calls", "steps"),
    [
        (4, [1.0, 0.5, 0.2, 0.0, 0.01, 0.0, 0.0, 0.0], [6]),
        (4, [1.0, 0.0, 0.0, 0.02, 0.0, 0.0], []),
        (4, [1.0, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0], [4, 8]),
        (4, [0.0] * 9, [3]),
        (4, [2.0, 3.0, 3.9, 3.8, 4.0, 4.0, 3.9], [5]),
        (4, [3.9] * 9, []),  # each turn is a move
        (4, [1.0, 2.0, 3.5, 3.7, 3.7], []),
        (1, [0.5, 0.96, 1.0, 0.95], [4]),
        (0, [0.0] * 9, []),
    ],
)
def test_a_collapse_is_told_once_until_it_is_over(
    most: int, calls: list[float], steps: list[int]
) -> None:
    assert told(most, calls) == steps


def test_what_is_said_names_the_last_step_that_was_other_and_what_helps() -> None:
    watch = CallRate(3)
    for n, called in enumerate((0.4, 0.06, 0.0, 0.0), 1):
        assert watch.step(n, {"episode/called": called, "episode/calls_mean": called}) is None
    line = watch.step(5, {"episode/called": 0.0, "episode/calls_mean": 0.0})
    assert line and "the last with 5% was step 2" in line and "call_bonus" in line
    assert "\n" not in line and watch.step(6, {"acc/a": 1.0}) is None


def test_the_most_there_may_be_is_of_the_turns_and_of_the_cap() -> None:
    def cap(most: int) -> str:
        return f'reward.terms=[{{name="outcome"}}, {{name="call_cap", args={{most={most}}}}}]'

    assert most_calls(made_recipe()) == 0
    assert most_calls(made_recipe(ZOOM)) == 4
    assert [most_calls(made_recipe(ZOOM, cap(most))) for most in (2, 9)] == [2, 4]
