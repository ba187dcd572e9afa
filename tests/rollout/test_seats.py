"""Samplers that take turns with a learner: no process of theirs has the GPU in its turn.

The rules of `Dispatch` in any order of deaths and delays, on a clock that the test turns.
"""

from __future__ import annotations

import pytest

from rollout.dispatch import Dispatch
from rollout.jobs import Command, Died, Job
from rollout.record import Group
from tests.rollout.test_dispatch import LIMITS, World, sends, up
from tests.support.pretend import VOCABULARY, group, request


class Turning(World):
    """A `World` whose samplers share GPUs; `holding` are the processes with memory of one."""

    def __init__(self, seed: int, names: int, trouble: float) -> None:
        super().__init__(seed, names, trouble)
        self.holding: set[tuple[str, int]] = set()
        self.asleep: set[tuple[str, int]] = set()
        self.learning = False
        self.lost_asleep = 0

    def carry_out(self, command: Command, at: tuple[str, int]) -> None:
        d = self.dispatch
        if command.do in ("start", "wake", "send", "renew"):
            assert not self.learning, f"{command.do} in the learner's turn"
        if command.do in ("send", "renew", "sleep"):
            assert at not in self.asleep, f"{command.do} to one that sleeps"
        if command.do in ("start", "wake"):
            self.holding.add(at)
        if command.do == "kill":
            self.lost_asleep += at in self.asleep
            self.holding.discard(at)
            self.asleep.discard(at)
        super().carry_out(command, at)
        if command.do not in ("sleep", "wake"):
            return
        assert at not in self.dead and at not in self.running.values()
        luck = self.rng.random() / self.trouble if self.trouble else 1.0
        if luck < 0.2:
            self.frozen.add(at)
        elif luck < 0.4:
            self.later(self.rng.exponential(1.0), (d.lost, (*at, "actor", "gone")))
        elif at not in self.frozen:
            done = self.slept if command.do == "sleep" else self.woke
            self.later(self.rng.exponential(1.0), (done, at))

    def slept(self, name: str, life: int, now: float) -> None:
        if (name, life) not in self.dead:
            self.holding.discard((name, life))
            self.asleep.add((name, life))
        self.dispatch.slept(name, life, now)

    def woke(self, name: str, life: int, now: float) -> None:
        self.asleep.discard((name, life))
        self.weights[name, life] = self.version
        self.dispatch.woken(name, life, self.version if self.version >= 0 else None, now)

    def learn(self) -> None:
        """The learner's turn, in which sleeping samplers may die, and new weights come."""
        d = self.dispatch
        d.rest(self.now)
        self.play(lambda: d.at_rest)
        assert not self.holding, "two have the GPU"
        self.learning = True
        end = self.now + self.rng.exponential(20.0)
        for at in sorted(self.asleep):
            if self.rng.random() < self.trouble:
                self.frozen.add(at)  # found by its silence, maybe in this turn
            elif self.rng.random() < self.trouble:
                self.later(self.rng.exponential(5.0), (d.lost, (*at, "actor", "gone")))
        self.play(lambda: self.now >= end)
        assert not self.holding
        self.version += 1
        d.renew(self.version, self.now)
        self.play(lambda: self.now >= end + 1)
        self.learning = False
        d.wake(self.now)


@pytest.mark.parametrize(
    ("seed", "samplers", "trouble"), [(1, 3, 0.05), (2, 1, 0.1), (3, 6, 0.3), (4, 2, 0.0)]
)
def test_by_turns_no_two_have_the_gpu_and_each_group_comes_once_whatever_befalls(
    seed: int, samplers: int, trouble: float
) -> None:
    world = Turning(seed, samplers, trouble)
    d = world.dispatch
    for step in range(60):
        asked = [request(f"{step}/{i}", n=1 + i % 4) for i in range(12)]
        d.add([Job(r, submitted=True) for r in asked], world.now)
        world.play(lambda: len(d.complete) == 12)
        found = [d.collected().outcome for _ in range(12)]
        for one in found:
            assert isinstance(one, Group)
            world.running.pop(one.group_id, None)
            true = group(request(one.group_id, n=len(one.rollouts)))
            for got, expected in zip(one.rollouts, true.rollouts, strict=True):
                assert (got.response_ids == expected.response_ids).all()
        world.learn()
    assert d.error is None and not d.submitted
    if trouble:
        assert world.lost_asleep > 0 and sum(d.causes.values()) > world.lost_asleep
    else:
        assert not d.causes


def commands(d: Dispatch) -> list[tuple[str, str]]:
    return [(c.do, c.name) for c in d.take()]


def test_a_sampler_falls_asleep_when_its_last_request_is_answered_and_is_given_no_other() -> None:
    d = Dispatch(["s-0", "s-1"], LIMITS, 0.0)
    up(d)
    d.add([Job(request("a"), submitted=True)], 0.0)
    d.take()
    d.rest(1.0)
    assert commands(d) == [("sleep", "s-1")] and not d.at_rest
    d.slept("s-1", 0, 2.0)
    d.add([Job(request("b"), submitted=True)], 2.0)
    assert commands(d) == [] and not d.at_rest, "s-0 still answers, and nobody takes another"
    d.replied("s-0", 0, next(iter(d.seats["s-0"].running)), group(request("a")), 3.0)
    assert commands(d) == [("sleep", "s-0")]
    d.slept("s-0", 0, 4.0)
    assert d.at_rest
    d.renew(1, 5.0)
    assert commands(d) == [], "weights wait until they wake"
    d.wake(6.0)
    assert commands(d) == [("wake", "s-0"), ("wake", "s-1")] and not d.at_rest
    d.woken("s-1", 0, 1, 7.0)
    assert sends(d) == [("s-1", "b")] and d.renewed_at is None
    d.woken("s-0", 0, 1, 8.0)
    assert d.renewed_at == 8.0


def sends_of(d: Dispatch) -> list[tuple[str, str]]:
    return sends(d)


def test_who_is_lost_in_the_learners_turn_is_started_when_that_is_over() -> None:
    d = Dispatch(["s-0", "s-1"], LIMITS, 0.0)
    up(d)
    d.rest(1.0)
    for name in ("s-0", "s-1"):
        d.slept(name, 0, 2.0)
    d.take()
    d.lost("s-1", 0, "actor", "gone", 3.0)
    assert commands(d) == [("kill", "s-1")] and d.at_rest
    d.tick(3.0 + 10 * LIMITS.start_timeout_seconds)
    assert ("start", "s-1") not in commands(d) and d.error is None
    d.seats["s-0"].pinged = None
    d.wake(300.0)
    assert commands(d) == [("wake", "s-0"), ("start", "s-1")]


def test_one_that_starts_is_waited_for_and_sleeps_before_the_learner_has_the_gpu() -> None:
    d = Dispatch(["s-0", "s-1"], LIMITS, 0.0)
    up(d)
    d.lost("s-1", 0, "actor", "gone", 1.0)
    d.rest(2.0)
    d.slept("s-0", 0, 3.0)
    d.take()
    assert not d.at_rest
    d.started("s-1", 1, VOCABULARY, None, 4.0)
    assert commands(d) == [("sleep", "s-1")] and not d.at_rest
    d.replied("s-1", 1, 99, Died("actor", "gone"), 4.5)  # of no ticket of its own
    d.slept("s-1", 1, 5.0)
    assert d.at_rest


def test_one_that_has_no_place_is_not_waited_for_each_time() -> None:
    d = Dispatch(["s-0", "s-1"], LIMITS, 0.0)
    up(d)
    d.lost("s-1", 0, "actor", "its node is gone", 1.0)
    d.ponged("s-0", 0, 21.5)
    d.tick(21.5)
    d.take()
    d.rest(22.0)
    assert commands(d) == [("sleep", "s-0"), ("kill", "s-1")]
    d.slept("s-0", 0, 23.0)
    assert d.at_rest
    d.wake(24.0)
    assert commands(d) == [("wake", "s-0"), ("start", "s-1")]


@pytest.mark.parametrize("how", ["fall asleep", "wake"])
def test_one_that_does_not_in_time_is_lost(how: str) -> None:
    d = Dispatch(["s-0"], LIMITS, 0.0, renewal=10.0)
    up(d)
    d.rest(1.0)
    if how == "wake":
        d.slept("s-0", 0, 2.0)
        d.wake(2.0)
    d.tick(13.0)
    (lost,) = d.news
    assert f"did not {how} within the deadline of 10 s (transfer.deadline_seconds)" in lost.why
    assert d.at_rest == (how == "fall asleep")


def test_weights_that_were_sent_to_sleepers_are_those_that_they_wake_with() -> None:
    """As by `ipc`, from the learner's GPU: nothing is left to fetch."""
    d = Dispatch(["s-0"], LIMITS, 0.0)
    up(d)
    d.rest(1.0)
    d.slept("s-0", 0, 2.0)
    d.add([Job(request("a"), submitted=True)], 2.0)
    d.holds(4, {"s-0": 0}, 3.0)
    d.take()
    d.wake(4.0)
    assert commands(d) == [("wake", "s-0")]
    d.woken("s-0", 0, None, 5.0)
    assert sends(d) == [("s-0", "a")] and d.seats["s-0"].version == 4
