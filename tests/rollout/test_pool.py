"""The pool's thread and its callers, with samplers that answer from threads of their own."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from rollout.dispatch import Dispatch, SamplerLost
from rollout.jobs import Died, Refused
from rollout.record import Group, Weights
from rollout.settings import SamplerConfig
from tests.support.pretend import Samplers, request, score_request
from tests.support.waiting import until

LIMITS = SamplerConfig(max_num_seqs=16, max_restarts=10**9)


def test_callers_of_all_kinds_side_by_side_get_each_their_own(samplers: Samplers) -> None:
    lock, rng = threading.Lock(), np.random.default_rng(0)

    def fate(asked: Any) -> Any:
        with lock:
            unlucky = rng.random() < 0.02
        return Died("actor", "gone") if unlucky else None

    samplers.fate = fate
    pool = samplers.pool(3, LIMITS)
    pool.wait_ready(60)
    wrong: list[str] = []

    def evaluate(number: int) -> None:
        for turn in range(5):
            asked = [request(f"eval-{number}-{turn}-{i}", f"p-{i}", n=1) for i in range(30)]
            found = [g.group_id for g in pool.sample(asked)]
            if found != [r.group_id for r in asked]:
                wrong.append(f"{number}/{turn}")

    def question() -> None:
        for turn in range(10):
            replies = pool.answer([score_request(f"s-{turn}-{i}", i) for i in range(10)], 60)
            if [len(r) for r in replies] != list(range(10)):  # type: ignore[arg-type]
                wrong.append(f"question {turn}")

    threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(2)]
    threads += [threading.Thread(target=question)]
    for thread in threads:
        thread.start()
    found: Counter[str] = Counter()
    for start in range(0, 1000, 100):
        pool.submit([request(f"g-{i}") for i in range(start, start + 100)])
        found.update(g.group_id for g in pool.collect(80))
    found.update(g.group_id for g in pool.collect(pool.pending()))
    for thread in threads:
        thread.join()
    assert not wrong and pool.pending() == 0
    assert found == Counter(f"g-{i}" for i in range(1000))
    counts = pool.counts()
    assert counts["restarts/actor"] == len(samplers.lives) - 3 > 0
    assert pool.collect(5) == [], "nothing is on its way"
    pool.stop()


def test_whoever_waits_for_the_only_sampler_waits_for_its_weights_too(samplers: Samplers) -> None:
    unlucky = {"g-3": 2, "eval": 1, "s": 1, "poll": 1}

    def fate(asked: Any) -> Any:
        name = asked.group_id if hasattr(asked, "group_id") else asked.request_id
        unlucky[name] = unlucky.get(name, 0) - 1
        if unlucky[name] >= 0:
            return Died("engine", "EngineDied: gone")
        # The life that answers must be one that has the weights.
        return None if samplers.lives[-1].version == 7 else Refused(ValueError(name), "stale")

    samplers.fate = fate
    pool = samplers.pool(1, LIMITS)
    pool.renew(Weights(7, (), ()))
    pool.submit([request(f"g-{i}") for i in range(6)])
    assert sorted(g.group_id for g in pool.collect(6, 60)) == [f"g-{i}" for i in range(6)]
    assert [g.group_id for g in pool.sample([request("eval")])] == ["eval"]
    (reply,) = pool.answer([score_request("s")], 60)
    assert isinstance(reply, np.ndarray)
    # A driver that only looks in from time to time is served as well.
    pool.submit([request("poll")])
    until, found = time.monotonic() + 60, []
    while not found and time.monotonic() < until:
        found = pool.collect(1, 0.0)
        time.sleep(0.01)
    assert [g.group_id for g in found] == ["poll"]
    assert [life.versions for life in samplers.lives] == [[7]] * 6
    assert [one.what for one in pool.news()].count("lost") == 5 and pool.news() == []
    pool.stop()


def test_collect_says_what_there_is_by_its_time_and_raises_a_refusal_alone(
    samplers: Samplers,
) -> None:
    gate = threading.Event()

    def fate(asked: Any) -> Any:
        if asked.group_id == "slow":
            gate.wait(60)
        return Refused(ValueError("too long"), "x") if asked.group_id == "bad" else None

    samplers.fate = fate
    pool = samplers.pool(1, LIMITS)
    pool.wait_ready(60)
    pool.submit([request("slow")])
    assert pool.collect(1, 0.0) == []
    pool.submit([request("a"), request("bad"), request("b")])
    found: list[str] = []
    errors = 0
    while len(found) + errors < 3:
        try:
            found += [g.group_id for g in pool.collect(1, 60)]
        except ValueError:
            errors += 1
    assert sorted(found) == ["a", "b"] and errors == 1 and pool.pending() == 1
    with pytest.raises(ValueError, match="submitted twice"):
        pool.submit([request("slow")])
    pool.abort(["slow"])
    assert pool.pending() == 0 and pool.collect(1) == []
    gate.set()
    for turn in range(300):  # some are answered while they are dropped
        pool.submit([request(f"x-{turn}")])
        time.sleep(0.0005 * (turn % 3))
        pool.abort([f"x-{turn}"])
    assert len(pool.sample([request("y")])) == 1 and pool.pending() == 0
    pool.stop()


def test_a_pool_that_loses_hope_wakes_those_who_wait(samplers: Samplers) -> None:
    gate = threading.Event()
    samplers.fate = lambda asked: gate.wait(60) and Died("engine", "EngineDied: no more")
    pool = samplers.pool(1, SamplerConfig(max_restarts=0))
    pool.wait_ready(60)
    threading.Timer(0.3, gate.set).start()
    pool.submit([request("g")])
    with pytest.raises(SamplerLost, match="max_restarts = 0; the last time: EngineDied: no more"):
        pool.collect(1)
    for call in (
        lambda: pool.sample([request("h")]),
        pool.wait_clients,
        lambda: pool.wait_ready(9),
    ):
        with pytest.raises(SamplerLost):
            call()
    pool.stop()


def test_a_sampler_replaced_by_the_driver_hands_its_work_on(samplers: Samplers) -> None:
    gate = threading.Event()
    samplers.fate = lambda asked: gate.wait(60) and None
    pool = samplers.pool(2, LIMITS)
    pool.wait_ready(60)
    pool.submit([request("g-0"), request("g-1")])
    first = pool.clients
    pool.replace(first[1], "transfer", "did not finish load_weights")
    pool.replace(first[1], "transfer", "said twice")
    gate.set()
    found = {g.group_id: g.rollouts[0].sampler for g in pool.collect(2, 60)}
    assert found.keys() == {"g-0", "g-1"} and found["g-0"] == "sampler-0"
    assert pool.counts()["restarts/transfer"] == 1
    pool.wait_ready(60)
    assert pool.clients[0] is first[0] and pool.clients[1] is not first[1]
    pool.resize(1)
    assert pool.size() == 1 and isinstance(pool.sample([request("h")])[0], Group)
    until(lambda: not samplers.lives[-1].alive, 30)
    pool.stop()


def test_nothing_is_read_of_what_threads_share_without_the_lock(samplers: Samplers) -> None:
    pool = samplers.pool(2, LIMITS)
    pool.wait_ready(60)
    lock = pool._changed

    class Shared(Dispatch):
        def __getattribute__(self, name: str) -> Any:
            assert lock._is_owned(), name  # type: ignore[attr-defined]
            return super().__getattribute__(name)

    with lock:
        pool._dispatch.__class__ = Shared
    gate = threading.Event()
    samplers.lives[0].fate = lambda asked: gate.wait(60) and None
    pool.submit([request("a"), request("b")])
    pool.renew(Weights(1, (), ()))
    assert pool.wait_renewed() <= time.monotonic()
    early = pool.collect(1, 0.0)
    gate.set()
    assert pool.sample([request("c")]) and pool.answer([score_request("s")], 60)
    assert len([*early, *pool.collect(pool.pending(), 60)]) == 2
    pool.begin_transfer()
    pool.holds(2, pool.wait_clients())
    pool.renew(Weights(3, (), ()))
    pool.replace(pool.clients[1], "transfer", "late")
    pool.resize(3)
    with suppress(TimeoutError):
        pool.wait_ready(0)
    pool.wait_ready(60)
    assert pool.size() == pool.counts()["asked"] == 3
    assert [one.what for one in pool.news()].count("lost") == 1
    pool.abort(["a"])
    assert pool.weight_checksums()
    pool.stop()
