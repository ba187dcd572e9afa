"""Weights reach the samplers there are, whichever fails, and never under a wrong name."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.run.runtime import Run, sampler_metrics
from cluster.run.supervision import Delivery
from cluster.run.train import verify_transfer
from rollout.dispatch import Died, PoolLimits, SamplerLost
from rollout.pool import PoolClient, SamplerPool
from rollout.transfer import HostSender, TransferReport, WeightSender, WeightTransferError
from tests.support.pretend import Samplers, Threaded, request


class Learner:
    """Counts what a learner would gather."""

    def __init__(self) -> None:
        self.updates = 0
        self.gathered = 0
        self.senders = 0

    def attach_sender(self, sender: WeightSender) -> None:
        assert isinstance(sender, HostSender)
        self.sender = sender
        self.senders += 1

    def send_weights(self, version: int) -> TransferReport:
        report = self.sender.send(self, version, 0)
        assert report is not None
        return report

    def begin_weights(self, version: int) -> None:
        self.sender.begin(self, version, 0)

    def finish_weights(self) -> TransferReport:
        report = self.sender.finish()
        assert report is not None
        return report

    def metadata(self) -> list[Any]:
        return []

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise NotImplementedError

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        for place in range(3):
            yield [f"layer.{place}"], [torch.ones(2)]
        self.gathered += 1


def start(
    samplers: Samplers, count: int, restarts: int = 5, request_seconds: float = 600.0
) -> tuple[SamplerPool, Learner, Delivery]:
    limits = PoolLimits(max_restarts=restarts, request_seconds=request_seconds)
    pool = samplers.pool(count, limits)
    pool.wait_ready(60)
    learner = Learner()

    def sender_to(clients: list[PoolClient]) -> WeightSender:
        return HostSender(clients, 5.0)

    return pool, learner, Delivery(pool, learner, sender_to, reaches_some=True)


@pytest.mark.parametrize(
    ("what", "step"),
    [
        ("fails", "begin_weight_update"),
        ("fails", "load_weights"),
        ("fails", "finish_weight_update"),
        ("hangs", "load_weights"),
    ],
)
def test_a_transfer_is_made_again_without_the_sampler_that_failed_it(
    samplers: Samplers, what: str, step: str
) -> None:
    pool, learner, delivery = start(samplers, 2)
    delivery.send(1)
    assert [s.version for s in samplers.lives] == [1, 1] and learner.senders == 1
    setattr(samplers.lives[1], f"{what}_in", (step,))
    report = delivery.send(2)
    assert report.groups == 3
    # Also a transfer that failed gathers to its end, as the other ranks of a learner do.
    assert learner.gathered == 3
    assert pool.counts()["restarts/transfer"] == 1
    assert samplers.lives[0].version == 2
    pool.wait_ready(60)
    assert [s.alive for s in samplers.lives] == [True, False, True]
    # The fresh one takes work only with the weights, which it gets while the driver waits: no
    # group is done before it has them.
    fresh = samplers.lives[-1]
    for life in samplers.lives:
        life.fate = lambda asked: fresh.reached.wait(60) and None
    found = pool.sample([request(f"g-{i}", n=200) for i in range(8)])
    assert fresh.version == 2
    assert {g.rollouts[0].sampler for g in found} == {"sampler-0", "sampler-1"}
    pool.stop()


def test_weights_that_are_newer_than_the_last_transfer_never_go_by_its_name(
    samplers: Samplers,
) -> None:
    deaths = [Died("actor", "gone")]
    samplers.fate = lambda asked: deaths.pop() if deaths else None
    pool, learner, delivery = start(samplers, 1)
    delivery.send(1)
    learner.updates += 1  # an update was begun; its weights are sent as version 2
    pool.submit([request("g")])
    assert pool.collect(1, 2.5) == [] and pool.behind() == ["sampler-0"]
    delivery.send(2)
    assert [g.group_id for g in pool.collect(1, 60)] == ["g"]
    assert [s.version for s in samplers.lives] == [1, 2]
    pool.stop()


def test_the_learner_goes_on_while_samplers_read_and_who_waits_for_them_ends_it(
    samplers: Samplers,
) -> None:
    pool, learner, delivery = start(samplers, 2)
    delivery.send(1)
    reading = threading.Event()
    for life in samplers.lives:
        life.waits_in["load_weights"] = reading
    assert delivery.begin(2) is None
    learner.updates += 1  # beside it
    assert [life.version for life in samplers.lives] == [1, 1]
    reading.set()
    before = delivery.begin(3)
    assert before is not None and before.groups == 3
    finish, finished = learner.finish_weights, threading.Event()

    def told() -> TransferReport:
        report = finish()
        finished.set()
        return report

    learner.finish_weights = told  # type: ignore[method-assign]
    for life in samplers.lives:
        life.fate = lambda asked: finished.wait(60) and None
    assert len(pool.sample([request(f"g-{i}") for i in range(4)])) == 4
    assert [life.version for life in samplers.lives] == [3, 3]
    assert finished.is_set() and pool.counts()["restarts"] == 0
    told_of_it = delivery.begin(4)
    assert told_of_it is not None and told_of_it.bytes == before.bytes
    delivery.settle()
    pool.stop()


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize(
    ("what", "step"),
    [("fails", "begin_weight_update"), ("fails", "load_weights"), ("hangs", "load_weights"),
     ("fails", "finish_weight_update")],
)  # fmt: skip
def test_a_transfer_that_was_begun_and_failed_is_made_good(
    samplers: Samplers, what: str, step: str, newer: bool
) -> None:
    pool, learner, delivery = start(samplers, 2)
    delivery.send(1)
    bad = samplers.lives[1]
    setattr(bad, f"{what}_in", (step,))
    delivery.begin(2)
    if newer:
        learner.updates += 1
        delivery.begin(3)
    wanted = 3 if newer else 2
    pool.submit([request(f"g-{i}") for i in range(4)])
    assert len(pool.collect(4, 60)) == 4
    assert samplers.lives[0].version == wanted
    pool.wait_ready(60)
    # The fresh one may come up after the transfer was made again: no group before it has its own.
    fresh = samplers.lives[-1]
    for life in samplers.lives:
        life.fate = lambda asked: fresh.reached.wait(60) and None
    pool.sample([request(f"h-{i}", n=200) for i in range(8)])
    assert not bad.alive and pool.counts()["restarts/transfer"] == 1
    assert {life.version for life in samplers.lives if life.alive} == {wanted}
    pool.stop()


def test_where_a_begun_transfer_broke_all_its_samplers_are_behind(samplers: Samplers) -> None:
    pool, learner, delivery = start(samplers, 2)
    delivery.send(1)
    leaving = samplers.lives[1]
    leaving.hangs_in = ("load_weights",)
    delivery.begin(2)
    learner.updates += 1
    assert leaving.hangs.wait(60)
    pool.resize(1)  # idle, it ends at once: no sampler is lost that would come back and be behind
    delivery.settle()
    # A transfer that waits for groups in flight would wait for ever for those of the other one.
    assert pool.behind() == ["sampler-0"] and samplers.lives[0].version == 1
    delivery.begin(3)
    delivery.settle()
    assert pool.behind() == [] and samplers.lives[0].version == 3
    assert pool.counts()["restarts"] == 0
    pool.stop()


def test_the_last_restart_ends_it_with_the_transfers_own_words(samplers: Samplers) -> None:
    pool, _, delivery = start(samplers, 2, restarts=0)
    samplers.lives[0].hangs_in = ("load_weights",)
    with pytest.raises(SamplerLost, match=r"'sampler-0' did not finish load_weights within .* 5 s"):
        delivery.send(1)
    pool.stop()


def test_a_sampler_that_leaves_while_weights_are_sent_is_no_loss(samplers: Samplers) -> None:
    pool, _, delivery = start(samplers, 2)
    delivery.send(1)
    leaving, last_group = samplers.lives[1], threading.Event()
    for life in samplers.lives:
        life.fate = lambda asked: last_group.wait(60) and None
    pool.submit([request("g-0"), request("g-1")])
    leaving.hangs_in = ("load_weights",)
    sent = threading.Thread(target=delivery.send, args=(2,))
    sent.start()
    assert leaving.hangs.wait(60)
    pool.resize(1)  # it finishes what it has, and then ends in the middle of the transfer
    last_group.set()
    assert len(pool.collect(2, 60)) == 2
    sent.join(60)
    assert leaving.gone.is_set() and samplers.lives[0].version == 2
    assert pool.size() == pool.counts()["count"] == 1
    assert pool.counts()["restarts"] == 0 and pool.news() == []
    pool.stop()


def verify(pool: SamplerPool, send: Callable[[int], TransferReport]) -> None:
    """As a run does before its first step."""
    recipe = SimpleNamespace(transfer=SimpleNamespace(checksum="first"))
    live: Any = SimpleNamespace(recipe=recipe, samplers=pool, send_weights=send)
    verify_transfer(live, 0)


@pytest.mark.parametrize("what", ["dies", "hangs"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_sampler_lost_over_its_checksums_is_replaced_and_the_run_goes_on(
    samplers: Samplers, what: str, before: bool, count: int
) -> None:
    pool, _, delivery = start(samplers, count, request_seconds=60.0 if what == "dies" else 0.5)

    def lose(life: Threaded) -> None:
        setattr(life, f"{what}_in", ("weight_checksums",))

    def send(version: int) -> TransferReport:
        report = delivery.send(version)
        if not before:
            lose(samplers.lives[0])
        return report

    if before:
        lose(samplers.lives[0])
    verify(pool, send)
    cause = "engine" if what == "dies" else "overdue"
    assert pool.counts()["restarts"] == pool.counts()[f"restarts/{cause}"] == 1
    (news,) = pool.news()
    assert news.startswith("sampler 'sampler-0' is lost: sampler-0: ")
    pool.wait_ready(60)
    assert [life.alive for life in samplers.lives] == [False, *[True] * count]
    assert len(pool.sample([request(f"g-{i}") for i in range(4)])) == 4
    pool.stop()


def test_weights_that_land_wrong_are_found_also_where_a_sampler_was_lost(
    samplers: Samplers,
) -> None:
    pool, _, delivery = start(samplers, 2)
    samplers.lives[0].dies_in = ("weight_checksums",)

    def send(version: int) -> TransferReport:
        pool.wait_ready(60)
        report = delivery.send(version)
        samplers.lives[2].weights = "as sent"  # of sampler-0, which told nothing before
        return report

    with pytest.raises(WeightTransferError, match=r"'sampler-0' already has, 1 of its 1 param"):
        verify(pool, send)
    pool.stop()


def test_a_sampler_lost_over_its_checksums_again_and_again_ends_the_run(
    samplers: Samplers,
) -> None:
    pool, _, delivery = start(samplers, 1, restarts=0)
    samplers.lives[0].dies_in = ("weight_checksums",)
    with pytest.raises(SamplerLost, match=r"'sampler-0' failed 1 times .*engine's process died"):
        verify(pool, delivery.send)
    pool.stop()


def test_losses_of_frozen_models_are_counted_and_told(samplers: Samplers) -> None:
    names = ("sampler", "frozen-0", "frozen-1")
    pools = {name: samplers.pool(1, PoolLimits(), name) for name in names}
    for pool in pools.values():
        pool.wait_ready(60)
    policy, *frozen = pools.values()
    scoring: Any = SimpleNamespace(frozen=dict(enumerate(frozen)))
    run: Any = SimpleNamespace(samplers=policy, scoring=scoring)
    deaths = [Died("engine", "gone")] * 3
    for life in samplers.lives[1:]:
        life.fate = lambda asked: deaths.pop() if deaths else None
    samplers.fate = samplers.lives[-1].fate
    for pool in frozen:
        assert len(pool.answer([request("g")], 60)) == 1
    found = sampler_metrics(policy, scoring.frozen)
    assert found["sampler/restarts"] == 0 and found["frozen/restarts/engine"] == 3
    assert found["frozen/asked"] == 2 and found["frozen/resampled"] == 3
    assert {"frozen/idle_seconds/frozen-0-0", "frozen/idle_seconds/frozen-1-0"} < found.keys()
    told = Run.news(run)
    assert len(told) == 3 and all(line.startswith("sampler 'frozen-") for line in told)
    assert Run.news(run) == []
    for pool in pools.values():
        pool.stop()


def test_the_error_keeps_the_name_of_its_sampler_on_its_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(WeightTransferError("words", "sampler-3")))
    assert (str(error), error.sampler) == ("words", "sampler-3")
