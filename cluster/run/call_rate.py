"""Whether a policy still chooses when to call: its rate went to none, or to all there may be.

Either way the calls of a group no longer differ, so no reward says which are worth it.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.recipe.recipe import Recipe

PATIENCE = 3
"""Steps in a row after which it is told."""
NONE, SOME = 0.01, 0.05
"""Shares of responses that call: at most this is none, at least that is some."""
ALL, FEWER = 0.95, 0.8
"""Calls of a response, as shares of the most there may be: from the one on it is all, and told of a
run that was once below the other; a game in which each turn is a move was not."""


def most_calls(recipe: Recipe) -> int:
    """How many calls a response may have and still be answered, or paid; 0 where there are none."""
    if recipe.environment is None:
        return 0
    caps = [term.args["most"] for term in recipe.reward.terms if term.name == "call_cap"]
    return min(recipe.environment.turns - 1, *caps) if caps else recipe.environment.turns - 1


class CallRate:
    """Watches the rate of calls from step to step; a collapse is told once, until it is over."""

    def __init__(self, most: int) -> None:
        """`most`: calls a response; 0: nothing is watched."""
        self._most = most
        self._last_some, self._was_fewer = 0, False
        self._none_in_a_row = self._all_in_a_row = 0

    def step(self, number: int, metrics: Mapping[str, float]) -> str | None:
        """What there is to say after a step, by its metrics."""
        if "episode/called" not in metrics or not self._most:
            return None
        called, mean = metrics["episode/called"], metrics["episode/calls_mean"]
        if called >= SOME:
            self._last_some = number
        self._none_in_a_row = self._none_in_a_row + 1 if called <= NONE else 0
        self._all_in_a_row = self._all_in_a_row + 1 if mean >= ALL * self._most else 0
        self._was_fewer = self._was_fewer or mean < FEWER * self._most
        if self._none_in_a_row == PATIENCE:
            last = f"the last with {SOME:.0%} was step {self._last_some}"
            return (
                f"in {PATIENCE} steps in a row at most {NONE:.0%} of the responses called the "
                f"environment ({last if self._last_some else 'no step had more'}); a policy that "
                "never calls learns nothing of calling: raise call_bonus, lower call_cost, or "
                "teach calls first"
            )
        if self._all_in_a_row == PATIENCE and self._was_fewer:
            return (
                f"in {PATIENCE} steps in a row responses called {mean:.2f} times, of {self._most} "
                "that they may (environment.turns, call_cap); where all call as often as they can, "
                "nothing is learnt of when: raise call_cost, lower call_bonus, or allow more"
            )
        return None
