"""A run's budget: who stops when, in each unit."""

from __future__ import annotations

import pytest

from cluster.budget import BudgetKind, Meter

STEP = {"response/tokens": 90.0, "time/step": 2.5, "acc/a": 1.0}


@pytest.mark.parametrize(
    ("kind", "amount", "steps"), [("updates", 6, 3), ("sampled_tokens", 200, 3), ("seconds", 5, 2)]
)
def test_the_step_that_crosses_the_line_is_the_last(
    kind: BudgetKind, amount: float, steps: int
) -> None:
    meter = Meter(kind, amount)
    stops = [meter.add(STEP, updates=2) for _ in range(steps)]
    assert stops == [False] * (steps - 1) + [True]
    assert meter.spent >= amount > meter.spent * (steps - 1) / steps


def test_a_step_without_an_update_spends_tokens_and_no_update() -> None:
    updates, tokens = Meter("updates", 1), Meter("sampled_tokens", 90)
    assert not updates.add(STEP, updates=0)
    assert tokens.add(STEP, updates=0)
    with pytest.raises(KeyError, match="time/step"):
        Meter("seconds", 1).add({}, updates=1)
