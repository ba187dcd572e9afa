"""New weights reach the samplers there are, whichever fails, and need no learner a second time."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.run.delivery import Delivery, GpuDelivery
from cluster.run.runtime import Run, sampler_metrics
from cluster.run.train import verify_transfer
from rollout.dispatch import SamplerLost
from rollout.jobs import Died
from rollout.pool import SamplerPool
from rollout.record import Piece, Weights
from rollout.settings import SamplerConfig, TransferConfig
from rollout.transfer import TransferReport, WeightTransferError
from tests.support.pretend import Samplers, Threaded, request
from tests.support.waiting import until

MANIFEST = tuple((Piece(f"layer.{i}", "float32", (2,), 8, ""),) for i in range(3))


class Bucket:
    """What lies in the object store; nothing reads it here."""


class Learner:
    """Remembers which versions it was asked for, and whether what it gave is still held."""

    def __init__(self) -> None:
        self.published: list[int] = []
        self.held: dict[int, weakref.ref[Bucket]] = {}
        self.clients: list[Any] = []
        self.faults: list[WeightTransferError] = []

    def publish_weights(self, version: int) -> Weights:
        self.published.append(version)
        bucket = Bucket()
        self.held[version] = weakref.ref(bucket)
        return Weights(version, MANIFEST, (bucket,) * 3)

    def attach_sender(self, sender: Any) -> None:
        self.clients = sender._client._samplers

    def send_weights(self, version: int) -> TransferReport:
        self.published.append(version)
        if self.faults:
            raise self.faults.pop()
        for client in self.clients:
            client.version = version
        return TransferReport(1.0, 24, 3, 8)


def start(
    samplers: Samplers,
    count: int,
    restarts: int = 5,
    request_seconds: float = 600.0,
    renewal: float = 60.0,
) -> tuple[SamplerPool, Learner, Delivery]:
    settings = SamplerConfig(max_restarts=restarts, request_timeout_seconds=request_seconds)
    pool = samplers.pool(count, settings, renewal=renewal)
    pool.wait_ready(60)
    learner = Learner()
    return pool, learner, Delivery(pool, learner)


@pytest.mark.parametrize("what", ["fails", "dies", "hangs"])
def test_a_sampler_that_fails_a_version_is_started_again_and_fetches_it_by_itself(
    samplers: Samplers, what: str
) -> None:
    pool, learner, delivery = start(samplers, 2, renewal=0.5 if what == "hangs" else 60.0)
    delivery.send(1)
    assert [life.version for life in samplers.lives] == [1, 1]
    setattr(samplers.lives[1], f"{what}_in", ("renew",))
    report = delivery.send(2)
    assert (report.groups, report.bytes, report.largest_group_bytes) == (3, 24, 8)
    assert samplers.lives[0].version == 2
    pool.wait_ready(60)
    assert [life.alive for life in samplers.lives] == [True, False, True]
    cause = "engine" if what == "dies" else "transfer"  # a death is a death, whatever it was doing
    assert pool.counts()[f"restarts/{cause}"] == pool.counts()["restarts"] == 1
    assert samplers.lives[2].versions == [2], "in its start-up"
    assert learner.published == [1, 2], "the learner was asked once a version"
    found = pool.sample([request(f"g-{i}", n=200) for i in range(8)])
    assert {g.rollouts[0].sampler for g in found} == {"sampler-0", "sampler-1"}
    pool.stop()


def test_a_lost_sampler_goes_on_under_the_last_version_whatever_the_learner_does(
    samplers: Samplers,
) -> None:
    pool, learner, delivery = start(samplers, 1)
    delivery.send(1)
    deaths = [Died("actor", "gone")] * 3
    samplers.fate = lambda asked: deaths.pop() if deaths else None
    samplers.lives[0].fate = samplers.fate
    pool.submit([request("g")])  # and nobody asks the learner, or waits for the pool
    assert [g.group_id for g in pool.collect(1, 60)] == ["g"]
    assert [life.versions for life in samplers.lives] == [[1]] * 4
    assert learner.published == [1]
    pool.resize(2)
    pool.wait_ready(60)
    assert samplers.lives[-1].versions == [1], "one more, too"
    pool.stop()


def test_nobody_works_under_an_older_version_than_was_told_and_the_learner_goes_on(
    samplers: Samplers,
) -> None:
    pool, _, delivery = start(samplers, 2)
    delivery.send(1)
    fetched = threading.Event()
    for life in samplers.lives:
        life.waits_in["renew"] = fetched
    assert delivery.begin(2) is None
    pool.submit([request(f"g-{i}") for i in range(4)])
    assert pool.collect(4, 0.3) == [] and [life.version for life in samplers.lives] == [1, 1]
    pool.resize(3)  # one that starts meanwhile has the version at once
    seen: dict[str, int | None] = {}
    for life in samplers.lives:
        life.fate = lambda asked, life=life: seen.update({asked.group_id: life.version})
    (first,) = pool.collect(1, 60)
    assert first.rollouts[0].sampler == "sampler-2"
    fetched.set()
    before = delivery.begin(3)
    assert before is not None and before.groups == 3 and before.seconds > 0
    assert len(pool.sample([request(f"h-{i}", n=200) for i in range(8)])) == 8
    assert {seen[f"h-{i}"] for i in range(8) if f"h-{i}" in seen} == {3}
    assert delivery.settle() is not None and delivery.settle() is None
    assert pool.counts()["restarts"] == 0
    pool.stop()


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("what", ["fails", "hangs"])
def test_a_version_that_was_begun_and_failed_is_made_good(
    samplers: Samplers, what: str, newer: bool
) -> None:
    pool, learner, delivery = start(samplers, 2, renewal=0.5 if what == "hangs" else 60.0)
    delivery.send(1)
    bad = samplers.lives[1]
    setattr(bad, f"{what}_in", ("renew",))
    delivery.begin(2)
    if newer:
        delivery.begin(3)
    wanted = 3 if newer else 2
    pool.submit([request(f"g-{i}", n=200) for i in range(8)])
    assert len(pool.collect(8, 60)) == 8
    until(lambda: not bad.alive and pool.counts()["count"] >= 2, 60)
    assert not bad.alive and pool.counts()["restarts/transfer"] == 1
    assert {life.version for life in samplers.lives if life.alive} == {wanted}
    assert learner.published == [1, *range(2, wanted + 1)]
    pool.stop()


def test_a_version_is_let_go_when_the_next_is_there_and_nobody_fetches_it(
    samplers: Samplers,
) -> None:
    pool, learner, delivery = start(samplers, 1)

    def held() -> list[int]:
        gc.collect()
        return [version for version, bucket in learner.held.items() if bucket() is not None]

    for version in (1, 2):
        delivery.send(version)
        pool.sample([request(f"g-{version}")])
        assert held() == [version], "the last stays"
    samplers.lives[0].waits_in["renew"] = slow = threading.Event()
    delivery.begin(3)
    assert 3 in held()
    slow.set()
    delivery.send(4)
    pool.sample([request("h")])
    assert held() == [4]
    pool.stop()


def test_the_last_restart_ends_it_with_the_transfers_own_words(samplers: Samplers) -> None:
    pool, _, delivery = start(samplers, 2, restarts=0, renewal=0.5)
    samplers.lives[0].hangs_in = ("renew",)
    late = r"'sampler-0' did not have version 1 within the deadline of 0.5 s \(transfer.deadline"
    with pytest.raises(SamplerLost, match=late):
        delivery.send(1)
    pool.stop()


def test_a_sampler_that_leaves_while_it_fetches_is_no_loss(samplers: Samplers) -> None:
    pool, _, delivery = start(samplers, 2)
    delivery.send(1)
    leaving, last_group = samplers.lives[1], threading.Event()
    for life in samplers.lives:
        life.fate = lambda asked: last_group.wait(60) and None
    pool.submit([request("g-0"), request("g-1")])
    leaving.hangs_in = ("renew",)
    sent = threading.Thread(target=delivery.send, args=(2,))
    sent.start()
    assert leaving.hangs.wait(60)
    pool.resize(1)  # it finishes what it has, and then ends in the middle of the fetch
    last_group.set()
    assert len(pool.collect(2, 60)) == 2
    sent.join(60)
    assert leaving.gone.wait(60) and samplers.lives[0].version == 2
    assert pool.size() == pool.counts()["count"] == 1
    assert pool.counts()["restarts"] == 0 and pool.news() == []
    pool.stop()


def test_weights_that_are_sent_go_again_to_those_left_and_leave_nothing_for_others(
    samplers: Samplers,
) -> None:
    """The driver's half of `nccl` and `ipc`; their wire was not run."""
    pool, learner, _ = start(samplers, 2)
    delivery = GpuDelivery(pool, learner, TransferConfig(transport="nccl"), 1)
    delivery.send(1)
    learner.faults = [WeightTransferError("late", "sampler-1")]
    assert delivery.send(2).bytes == 24 and learner.published == [1, 2, 2]
    pool.wait_ready(60)
    assert pool.counts()["restarts/transfer"] == 1
    assert pool.counts()["count"] == 1, "the fresh one waits for the next version"
    delivery.send(3)
    assert pool.counts()["count"] == 2
    learner.faults = [WeightTransferError("the ranks disagree")]
    with pytest.raises(WeightTransferError, match="the ranks disagree"):
        delivery.begin(4)
    pool.holds(4, pool.clients)
    for life in samplers.lives:
        life.fate = lambda asked: Died("engine", "EngineDied: gone")
    with pytest.raises(SamplerLost, match=r"no sampler holds version 4 any more.*EngineDied: gone"):
        pool.sample([request("g-0"), request("g-1")])
    pool.stop()


def verify(pool: SamplerPool, sent: Callable[[int], TransferReport]) -> None:
    """As a run does before its first step."""
    recipe = SimpleNamespace(transfer=SimpleNamespace(checksum="first"))
    parts = SimpleNamespace(first_held={})
    live: Any = SimpleNamespace(recipe=recipe, samplers=pool, send_weights=sent, parts=parts)
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

    def sent(version: int) -> TransferReport:
        report = delivery.send(version)
        if not before:
            lose(samplers.lives[0])
        return report

    if before:
        lose(samplers.lives[0])
    verify(pool, sent)
    cause = "engine" if what == "dies" else "overdue"
    assert pool.counts()["restarts"] == pool.counts()[f"restarts/{cause}"] == 1
    (news,) = [one for one in pool.news() if one.what == "lost"]
    assert str(news).startswith("sampler 'sampler-0' is lost: sampler-0: ")
    pool.wait_ready(60)
    assert [life.alive for life in samplers.lives] == [False, *[True] * count]
    assert len(pool.sample([request(f"g-{i}") for i in range(4)])) == 4
    pool.stop()


def test_weights_that_land_wrong_are_found_also_where_a_sampler_was_lost(
    samplers: Samplers,
) -> None:
    pool, _, delivery = start(samplers, 2)
    samplers.lives[0].dies_in = ("weight_checksums",)

    def sent(version: int) -> TransferReport:
        pool.wait_ready(60)
        report = delivery.send(version)
        samplers.lives[2].weights = "as sent"  # of sampler-0, which told nothing before
        return report

    with pytest.raises(WeightTransferError, match=r"'sampler-0' already has, 1 of its 1 param"):
        verify(pool, sent)
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
    pools = {name: samplers.pool(1, SamplerConfig(), name) for name in names}
    for pool in pools.values():
        pool.wait_ready(60)
    policy, *frozen = pools.values()
    run: Any = SimpleNamespace(samplers=policy, frozen=dict(enumerate(frozen)))
    deaths = [Died("engine", "gone")] * 3
    for life in samplers.lives[1:]:
        life.fate = lambda asked: deaths.pop() if deaths else None
    samplers.fate = samplers.lives[-1].fate
    for pool in frozen:
        assert len(pool.answer([request("g")], 60)) == 1
    found = sampler_metrics(policy, run.frozen)
    assert found["sampler/restarts"] == 0 and found["frozen/restarts/engine"] == 3
    assert found["frozen/asked"] == 2 and found["frozen/resampled"] == 3
    assert {"frozen/idle_seconds/frozen-0-0", "frozen/idle_seconds/frozen-1-0"} < found.keys()
    told = Run.news(run)
    assert [one.what for one in told].count("lost") == 3
    assert all(str(one).startswith("sampler 'frozen-") for one in told)
    assert Run.news(run) == []
    for pool in pools.values():
        pool.stop()


def test_the_error_keeps_the_name_of_its_sampler_on_its_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(WeightTransferError("words", "sampler-3")))
    assert (str(error), error.sampler) == ("words", "sampler-3")
