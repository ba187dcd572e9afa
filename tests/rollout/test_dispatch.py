"""The pool's decisions, in any order of deaths, delays and lies, on a clock that the test turns."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rollout.dispatch import OVERFILL, Dispatch, SamplerLost
from rollout.jobs import Command, Died, Job, Refused, fault_of
from rollout.record import Group, ReplyError
from rollout.settings import SamplerConfig
from tests.support.pretend import VOCABULARY, group, request, score_request

LIMITS = SamplerConfig(
    max_num_seqs=16,
    request_timeout_seconds=30,
    start_timeout_seconds=20,
    heartbeat_seconds=8,
    max_restarts=10**9,
)


def lie(true: Group, rng: np.random.Generator) -> Any:
    """One of the things that a broken sampler could say."""
    first = true.rollouts[0]
    one = np.ones(1, np.int32)
    bad = [
        replace(first, response_ids=one * VOCABULARY, logprobs=-one, versions=one, segments=one),
        replace(first, response_ids=-one, logprobs=-one, versions=one, segments=one),
        replace(first, response_ids=one, logprobs=one * np.nan, versions=one, segments=one),
        replace(first, response_ids=one, logprobs=one * 0.5, versions=one, segments=one),
        replace(first, response_ids=one, logprobs=-one, versions=one[:0], segments=one),
        replace(first, group_id="another"),
    ]
    lies: list[Any] = [replace(true, rollouts=(b, *true.rollouts[1:])) for b in bad]
    lies += [
        None,
        replace(true, rollouts=true.rollouts[1:]),
        replace(true, rollouts=(first, *true.rollouts[:-1])),
        replace(true, group_id="another"),
        replace(true, problem=replace(true.problem, id="another")),
    ]
    return lies[rng.integers(len(lies))]


class World:
    """Samplers that answer, die, freeze and lie at random; it checks what they are asked to do."""

    def __init__(self, seed: int, names: int, trouble: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.now, self.trouble = 0.0, trouble
        self.events: list[tuple[float, int, Any]] = []
        self.places = 0
        self.dispatch = Dispatch([f"sampler-{i}" for i in range(names)], LIMITS, 0.0, renewal=10.0)
        self.frozen: set[tuple[str, int]] = set()
        self.dead: set[tuple[str, int]] = set()
        self.weights: dict[tuple[str, int], int] = {}
        self.running: dict[str, tuple[str, int]] = {}
        self.sent: Counter[str] = Counter()
        self.version = -1

    def later(self, seconds: float, what: Any) -> None:
        self.places += 1
        heapq.heappush(self.events, (self.now + seconds, self.places, what))

    def publish(self) -> None:
        """The driver's part: the next version is there, or (no update was made) the same again."""
        self.version += self.version < 0 or self.rng.random() < 0.7
        self.dispatch.renew(self.version, self.now)

    def started(self, name: str, life: int, version: int, now: float) -> None:
        self.weights[name, life] = version
        self.dispatch.started(name, life, VOCABULARY, version if version >= 0 else None, now)

    def renewed(self, name: str, life: int, version: int, now: float) -> None:
        self.weights[name, life] = version
        self.dispatch.renewed(name, life, version, now)

    def renew(self, at: tuple[str, int]) -> None:
        luck = self.rng.random() / self.trouble if self.trouble else 1.0
        if luck < 0.2:
            self.frozen.add(at)
        elif luck < 0.4:
            self.later(1.0, (self.dispatch.lost, (*at, "transfer", "checksum")))
        if at not in self.frozen:
            self.later(self.rng.exponential(1.0), (self.renewed, (*at, self.version)))

    def obey(self) -> None:
        for command in self.dispatch.take():
            self.carry_out(command, (command.name, command.life))

    def carry_out(self, command: Command, at: tuple[str, int]) -> None:
        d = self.dispatch
        if command.do == "start":
            assert command.life == 0 or (command.name, command.life - 1) in self.dead
            fails = self.rng.random() < self.trouble / 4
            lost = (d.lost, (*at, "start", "no luck"))
            up = (self.started, (*at, self.version))
            self.later(self.rng.exponential(3.0), lost if fails else up)
        elif command.do == "renew":
            assert at not in self.dead, "weights for the dead"
            self.renew(at)
        elif command.do in ("kill", "retire"):
            self.dead.add(at)
            self.running = {g: place for g, place in self.running.items() if place != at}
        elif command.do == "ping":
            if at not in self.frozen | self.dead:
                self.later(self.rng.exponential(0.1), (d.ponged, at))
        elif command.do == "send":
            self.work(at, command.ticket, command.request)

    def work(self, at: tuple[str, int], ticket: int, asked: Any) -> None:
        assert at not in self.dead, "work for the dead"
        assert self.version < 0 or self.weights[at] == self.version, "work before the weights"
        assert asked.group_id not in self.running, "one group at two places"
        self.running[asked.group_id] = at
        self.sent[asked.group_id] += 1
        answer = (self.dispatch.replied, (*at, ticket, group(asked, at[0])))
        luck = self.rng.random() / self.trouble if self.trouble else 1.0
        if luck < 0.2:
            self.frozen.add(at)  # neither this nor what comes after is ever answered
        elif luck < 0.4:
            answer = (self.dispatch.replied, (*at, ticket, lie(group(asked), self.rng)))
        elif luck < 0.7:
            died = Died("actor", f"{at[0]}: gone")
            answer = (self.dispatch.replied, (*at, ticket, died))
        elif luck < 0.9:
            self.later(40.0, answer)  # overdue, and answers all the same when it is too late
            return
        if at not in self.frozen:
            self.later(self.rng.exponential(2.0), answer)

    def play(self, until: Any) -> None:
        """Go on, event by event and at least once a second, until `until()`."""
        for _ in range(2_000_000):
            if until():
                return
            self.obey()
            if not self.events or self.events[0][0] > self.now + 1.0:
                self.now += 1.0
            else:
                self.now, _, (method, args) = heapq.heappop(self.events)
                method(*args, self.now)
            self.dispatch.tick(self.now)
            self.obey()
            for seat in self.dispatch.seats.values():
                assert seat.sequences <= OVERFILL * LIMITS.max_num_seqs + 4
                assert seat.sequences == sum(job.sequences for job, _ in seat.running.values())
            if self.rng.random() < 0.01:
                self.publish()
        raise AssertionError("the pool stands still")


@pytest.mark.parametrize(
    ("seed", "samplers", "trouble", "count"),
    [(1, 3, 0.05, 10_000), (2, 1, 0.1, 500), (3, 8, 0.3, 2_000), (4, 2, 0.0, 500)],
)
def test_every_group_is_collected_exactly_once_whatever_befalls_the_samplers(
    seed: int, samplers: int, trouble: float, count: int
) -> None:
    world = World(seed, samplers, trouble)
    d = world.dispatch
    asked = [request(f"g-{i}", f"p-{i % 97}", n=1 + i % 4) for i in range(count)]
    found: list[Group] = []
    at = 0
    sizes = [samplers, samplers + 2, max(1, samplers - 1)]
    while len(found) < count:
        batch = asked[at : at + 40]
        at += len(batch)
        d.add([Job(r, submitted=True) for r in batch], world.now)
        world.play(lambda: len(d.complete) >= min(30, len(d.submitted)))
        while d.complete:
            outcome = d.collected().outcome
            assert isinstance(outcome, Group)
            world.running.pop(outcome.group_id, None)
            found.append(outcome)
        if trouble and world.rng.random() < 0.1:
            d.resize(sizes[world.rng.integers(3)], world.now)
    assert sorted(g.group_id for g in found) == sorted(r.group_id for r in asked)
    for one in found:  # never a lie, and what an undisturbed sampler would have said
        true = group(request(one.group_id, one.problem.id, n=len(one.rollouts)))
        for got, expected in zip(one.rollouts, true.rollouts, strict=True):
            assert (got.response_ids == expected.response_ids).all()
            assert (got.logprobs == expected.logprobs).all()
    assert not d.submitted and not d.complete and d.error is None
    resampled = sum(world.sent.values()) - count
    assert d.counts(world.now)["resampled"] == resampled
    if trouble:
        assert resampled > 0
        if count >= 2_000:
            kinds = ("actor", "garbage", "silent", "overdue", "start", "transfer")
            assert min(d.causes[kind] for kind in kinds) > 0
    else:
        assert not d.causes and not resampled


def up(d: Dispatch, now: float = 0.0) -> None:
    for seat in list(d.seats.values()):
        d.started(seat.name, seat.life, VOCABULARY, None, now)


def sends(d: Dispatch) -> list[tuple[str, str]]:
    return [(c.name, c.request.group_id) for c in d.take() if c.do == "send"]  # type: ignore[union-attr]


def test_engines_are_kept_full_evenly_and_no_further() -> None:
    d = Dispatch(["s-0", "s-1"], LIMITS, 0.0)
    up(d)
    d.add([Job(request(f"g-{i}", n=4), submitted=True) for i in range(40)], 0.0)
    first = sends(d)
    # 1.5 times 16 sequences are six groups of four a sampler, dealt in turns.
    assert Counter(name for name, _ in first) == {"s-0": 6, "s-1": 6}
    assert [g for _, g in first] == [f"g-{i}" for i in range(12)]
    done = request("g-0", n=4)
    ticket = next(iter(d.seats["s-0"].running))
    d.replied("s-0", 0, ticket, group(done), 1.0)
    assert sends(d) == [("s-0", "g-12")]


def test_a_problem_comes_back_to_the_sampler_that_has_its_image_unless_that_costs_balance() -> None:
    d = Dispatch(["s-0", "s-1"], LIMITS, 0.0)
    up(d)
    d.add([Job(request(f"a-{i}", f"p-{i}", n=2)) for i in range(4)], 0.0)
    assert sends(d) == [("s-0", "a-0"), ("s-1", "a-1"), ("s-0", "a-2"), ("s-1", "a-3")]
    d.add([Job(request(f"b-{i}", "p-1", n=2)) for i in range(3)], 0.0)
    # The third would be two requests ahead.
    assert sends(d) == [("s-1", "b-0"), ("s-1", "b-1"), ("s-0", "b-2")]
    d.add([Job(replace(request("c-0", "p-0", n=2), view="none"))], 0.0)
    assert sends(d) == [("s-0", "c-0")]


def test_what_a_caller_waits_for_goes_before_what_was_submitted() -> None:
    d = Dispatch(["s-0"], LIMITS, 0.0)
    d.add([Job(request("g-0", n=24), submitted=True), Job(request("g-1"), submitted=True)], 0.0)
    up(d)
    d.add([Job(request("eval"))], 0.0)
    assert sends(d) == [("s-0", "g-0")]
    d.replied("s-0", 0, next(iter(d.seats["s-0"].running)), group(request("g-0", n=24)), 1.0)
    assert [g for _, g in sends(d)] == ["eval", "g-1"]


def test_a_lost_sampler_waits_for_the_weights_and_then_has_its_work_again_in_order() -> None:
    d = Dispatch(["s-0"], LIMITS, 0.0)
    up(d)
    d.renew(5, 0.0)
    assert d.renewed_at is None
    d.renewed("s-0", 0, 5, 0.0)
    assert d.renewed_at == 0.0
    d.add([Job(request(f"g-{i}"), submitted=True) for i in range(3)], 0.0)
    d.take()
    late = next(iter(d.seats["s-0"].running))
    d.replied("s-0", 0, late, Died("engine", "gone"), 1.0)
    assert [(c.do, c.life) for c in d.take()] == [("kill", 0), ("start", 1)]
    d.replied("s-0", 0, late, group(request("g-0")), 2.0)  # of its former life
    assert not d.complete
    d.renew(6, 2.5)  # while it starts, with version 5
    assert d.take() == [] and d.renewed_at is None
    d.started("s-0", 1, VOCABULARY, 5, 3.0)
    assert [c.do for c in d.take()] == ["renew"]
    d.renewed("s-0", 0, 6, 4.0)  # of its former life
    assert d.take() == [] and d.renewed_at is None
    d.renewed("s-0", 1, 6, 5.0)
    assert d.renewed_at == 5.0
    assert sends(d) == [("s-0", "g-0"), ("s-0", "g-1"), ("s-0", "g-2")]
    counts = d.counts(9.0)
    lost, back = d.news
    assert str(lost) == "sampler 's-0' is lost: gone; 3 requests are asked again"
    assert (back.who, back.what, back.recovered_seconds) == ("s-0", "back", 4.0)
    assert (lost.at, back.at) == (1.0, 5.0)
    assert counts["restarts/engine"] == 1 and counts["resampled/engine"] == 3
    assert counts["idle_seconds/s-0"] == 2  # from 3 to 5
    d.renew(7, 10.0)
    d.renewed("s-0", 1, 7, 11.0)
    assert d.news == [lost, back], "a sampler comes back once"


def test_one_loss_too_many_is_an_error_that_names_sampler_and_cause() -> None:
    limits = LIMITS.model_copy(update={"max_restarts": 2, "restart_window_seconds": 100.0})
    d = Dispatch(["s-0", "s-1"], limits, 0.0)
    for life, now in enumerate((0.0, 60.0, 120.0)):  # the first is out of the window by then
        d.lost("s-1", life, "actor", "gone", now)
    assert d.error is None
    d.lost("s-1", 3, "silent", "no sign of life", 130.0)
    with pytest.raises(SamplerLost, match=r"'s-1' failed 3 times within 100 s.*no sign of life"):
        raise d.error  # type: ignore[misc]
    none = Dispatch(["s-0"], limits.model_copy(update={"max_restarts": 0}), 0.0)
    none.lost("s-0", 0, "engine", "EngineDied: s-0", 1.0)
    assert "EngineDied: s-0" in str(none.error)


def test_a_sampler_without_a_place_is_absent_and_joins_when_there_is_one() -> None:
    d = Dispatch(["s-0", "s-1"], LIMITS, 0.0)
    up(d)
    d.lost("s-1", 0, "actor", "its node is gone", 1.0)
    for now in (21.5, 43.0):
        d.ponged("s-0", 0, now)
        d.tick(now)
    assert d.error is None and d.counts(43.0)["absent"] == 1 and d.counts(43.0)["count"] == 1
    d.started("s-1", d.seats["s-1"].life, VOCABULARY, None, 44.0)
    assert d.counts(44.0)["absent"] == 0 and d.counts(44.0)["count"] == 2
    alone = Dispatch(["s-0"], LIMITS, 0.0)
    alone.tick(20.5)
    with pytest.raises(TimeoutError, match=r"'s-0' was not up after 20 s"):
        raise alone.error  # type: ignore[misc]


def test_samplers_that_leave_finish_their_work_and_new_ones_have_new_names() -> None:
    d = Dispatch(["s-0", "s-1"], LIMITS, 0.0)
    up(d)
    d.add([Job(request(f"g-{i}"), submitted=True) for i in range(2)], 0.0)
    d.take()
    d.resize(1, 0.0)
    d.add([Job(request("g-2"), submitted=True)], 0.0)
    assert sends(d) == [("s-0", "g-2")], "nothing new for one that leaves"
    d.replied("s-1", 0, next(iter(d.seats["s-1"].running)), group(request("g-1")), 1.0)
    assert [c.do for c in d.take()] == ["retire"] and list(d.seats) == ["s-0"]
    d.resize(3, 2.0)
    assert list(d.seats) == ["s-0", "s-2", "s-3"]


def test_answers_are_late_by_their_deadline_and_refusals_are_no_fault_of_the_sampler() -> None:
    d = Dispatch(["s-0"], LIMITS, 0.0)
    up(d)
    jobs = [Job(score_request("a"), 2.0), Job(score_request("b"), 9.0), Job(request("c"))]
    d.add(jobs, 0.0)
    d.take()
    d.tick(1.9)
    assert jobs[0].outcome is None and d.next_due() == 2.0
    d.tick(2.0)
    assert jobs[0].outcome == ReplyError("a", "deadline", "s-0: no answer in time")
    assert [c.do for c in d.take()] == ["drop"]
    refusal = Refused(ValueError("too long"), "s-0: ValueError: too long")
    d.replied("s-0", 0, jobs[2].ticket, refusal, 3.0)
    assert jobs[2].outcome is refusal and not d.causes and d.refused == 1
    d.replied("s-0", 0, jobs[1].ticket, np.zeros(3, np.float32), 4.0)
    assert jobs[1].outcome is not None


def test_a_group_id_is_on_its_way_once_and_may_come_again_when_it_is_over() -> None:
    d = Dispatch(["s-0"], LIMITS, 0.0)
    up(d)
    d.add([Job(request("g"), submitted=True)], 0.0)
    for jobs in ([Job(request("g"), submitted=True)], [Job(request("h"), submitted=True)] * 2):
        with pytest.raises(ValueError, match="submitted twice"):
            d.add(jobs, 0.0)
    assert len(d.submitted) == 1
    ticket = next(iter(d.seats["s-0"].running))
    d.abort(["g", "unknown"], 1.0)
    assert [c.do for c in d.take()] == ["start", "send", "drop"]
    d.replied("s-0", 0, ticket, group(request("g")), 2.0)
    assert not d.complete and not d.submitted
    d.add([Job(request("g"), submitted=True)], 3.0)


def test_every_lie_is_seen_and_no_truth_is_refused() -> None:
    rng = np.random.default_rng(0)
    asked = request("g", n=3)
    for _ in range(300):
        assert fault_of(lie(group(asked), rng), asked, VOCABULARY)
    for place in range(100):
        one = request(f"g-{place}", n=1 + place % 5)
        assert not fault_of(group(one), one, VOCABULARY)
    scored = score_request("s", 3)
    assert not fault_of(-np.ones(3, np.float32), scored, VOCABULARY)
    for bad in (-np.ones(2), np.ones(3), np.full(3, -np.inf), group(asked), None):
        assert fault_of(bad, scored, VOCABULARY)
