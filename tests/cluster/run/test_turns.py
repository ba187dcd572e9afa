"""Turns on shared GPUs, on simulated engines and ranks: real pool, real deliveries, no vLLM.

A `Card` is told who takes and leaves which part of its memory, and refuses what cannot be together.
"""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest

from cluster.run.delivery import Delivery, GpuDelivery
from cluster.run.turns import Phase, Turns
from rollout.jobs import Died
from rollout.record import Group, Piece, SampleRequest, Weights
from rollout.settings import SamplerConfig, TransferConfig
from rollout.transfer import TransferReport, WeightTransferError
from tests.support.pretend import VOCABULARY, Samplers, Threaded, group, request

MANIFEST = ((Piece("layer", "float32", (2,), 8, ""),),)
SETTINGS = SamplerConfig(max_restarts=10**6, heartbeat_seconds=3.0)
Mode = Literal["disaggregated", "host", "ipc"]


class Card:
    """One GPU that all share: parts that are held, as (who, part)."""

    def __init__(self) -> None:
        self._held: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self.wrong: list[str] = []
        self.together: set[frozenset[str]] = set()

    def take(self, who: str, *parts: str) -> None:
        with self._lock:
            self._held |= {(who, part) for part in parts}
            kinds = frozenset(
                f"{'learner' if holder == 'learner' else 'engine'} {part}"
                for holder, part in self._held
            )
            self.together.add(kinds)
            engines = {kind for kind in kinds if kind.startswith("engine")}
            if ("learner states" in kinds and engines) or (
                "engine kv_cache" in kinds and len(kinds) > len(engines)
            ):
                self.wrong.append(f"{who} takes {parts}, and there are {sorted(kinds)}")

    def leave(self, who: str, *parts: str) -> None:
        with self._lock:
            self._held -= {(who, part) for part in parts}


class Engine(Threaded):
    """A sampler whose groups are drawn from version and id; some of its lives end early."""

    card: Card
    rng: np.random.Generator
    trouble = 0.0
    asleep = False

    def kill(self) -> None:
        super().kill()
        self.card.leave(str(id(self)), "weights", "kv_cache")

    def _run(self, method: str, *args: Any) -> Any:
        who = str(id(self))
        if method in ("ping", "sleep", "wake", "answer", "begin_weight_update"):
            time.sleep(float(self.rng.exponential(0.002)))
            if self.rng.random() < self.trouble:
                return Died("actor", f"{self.name}: gone")
        if not self.alive:
            return Died("actor", f"{self.name}: gone")
        if method == "ready":
            self.card.take(who, "weights", "kv_cache")
        elif method == "sleep":
            assert not self.asleep
            self.card.leave(who, "weights", "kv_cache")
            self.asleep = True
        elif method == "begin_weight_update":
            self.card.take(who, "weights")
        elif method == "wake":
            assert self.asleep
            self.card.take(who, "weights")
            if args[0] is not None:
                self.version = args[0].version
            self.card.take(who, "kv_cache")
            self.asleep = False
            return args[0].version if args[0] else None
        elif method == "answer":
            assert not self.asleep, "a sleeping engine was asked"
            return self._drawn(args[0])
        return super()._run(method, *args)

    def _drawn(self, asked: SampleRequest) -> Group:
        """Of its version: other weights draw other tokens."""
        plain, shift = group(asked, self.name), self.version or 0
        moved = [
            replace(r, response_ids=(r.response_ids + shift) % VOCABULARY) for r in plain.rollouts
        ]
        return replace(plain, rollouts=tuple(moved))


class Engines(Samplers):
    """What a pool starts; each life on the card, with a random stream of its own."""

    def __init__(self, card: Card, seed: int, trouble: float, spared: str) -> None:
        """`spared`: the sampler that nothing befalls."""
        super().__init__()
        self.card, self.trouble, self.spared = card, trouble, spared
        self._rng = np.random.default_rng(seed)

    def __call__(self, name: str) -> Threaded:
        life = Engine(name, self.threads, self.fate)
        life.card, life.trouble = self.card, 0.0 if name == self.spared else self.trouble
        life.rng = np.random.default_rng(self._rng.integers(2**32))
        self.lives.append(life)
        return life


class Learner:
    """`LearnerGroup`, as far as a run needs it; its weights are a digest of all it has learnt."""

    def __init__(self, card: Card, seed: int) -> None:
        self.turn: Any = nullcontext
        self.sending: Any = nullcontext
        self.weights = "start"
        self._card, self._rng = card, np.random.default_rng(seed)
        self._clients: list[Any] = []

    def offload(self, weights: bool = True) -> None:
        time.sleep(float(self._rng.exponential(0.005)))
        self._card.leave("learner", "states", *(["weights"] if weights else []))

    def reload(self) -> None:
        self._card.take("learner", "weights", "states")

    def update(self, groups: list[Group]) -> None:
        with self.turn():
            time.sleep(float(self._rng.exponential(0.02)))
            read = [(g.group_id, g.rollouts[0].response_ids.tolist()) for g in groups]
            self.weights = hashlib.sha256(f"{self.weights} {read}".encode()).hexdigest()

    def save(self) -> str:
        with self.turn():
            return self.weights

    def publish_weights(self, version: int) -> Weights:
        with self.turn():
            return Weights(version, MANIFEST, (self.weights,))

    def attach_sender(self, sender: Any) -> None:
        self._clients = sender._client._samplers

    def send_weights(self, version: int) -> TransferReport:
        with self.sending():
            for client in self._clients:
                if isinstance(client.call("begin_weight_update").result(), Died):
                    raise WeightTransferError("gone", client.name)
                client.version = version
            return TransferReport(1.0, 8, 1, 8)


def trained(mode: Mode, seed: int, trouble: float, samplers: int = 2) -> tuple[list[Any], Card]:
    """What a run of a few steps learnt, kept and drew; and the card that it was on."""
    card = Card()
    # By `ipc` a run ends with the last sampler that holds a version.
    engines = Engines(card, seed, trouble, "sampler-0" if mode == "ipc" else "")
    pool = engines.pool(samplers, SETTINGS, renewal=5.0)
    learner: Any = Learner(card, seed)
    try:
        pool.wait_ready(60)
        turns = None if mode == "disaggregated" else Turns(pool, learner)
        if turns:
            pool.turn = partial(turns.enter, "sampling")
            learner.turn = partial(turns.enter, "learning")
            learner.sending = partial(turns.enter, "sending")
        delivery = (
            GpuDelivery(pool, learner, TransferConfig(transport="ipc"), 1)
            if mode == "ipc"
            else Delivery(pool, learner)
        )
        delivery.send(0)
        found: list[Any] = []
        for step in range(1, 9):
            pool.submit([request(f"{step}/{i}") for i in range(6)])
            groups = sorted(pool.collect(6), key=lambda g: g.group_id)
            extra = pool.sample([request(f"{step}/extra")])
            assert pool.collect(pool.pending(), timeout=0.0) == []
            learner.update([*groups, *extra])
            found += [(g.group_id, g.rollouts[0].response_ids.tolist()) for g in groups]
            delivery.send(step)
            if step % 3 == 0:
                found.append(learner.save())
        found.append(learner.weights)
        if turns and not trouble:
            # Before the first step; a step; a checkpoint after a transfer: there and back again.
            each = 2 if mode == "host" else 3
            assert turns.counts()["turns/count"] >= 9 * each
        return found, card
    finally:
        engines.close()


@pytest.mark.parametrize("mode", ["host", "ipc"])
@pytest.mark.parametrize(("seed", "trouble"), [(0, 0.0), (1, 0.02), (2, 0.05), (3, 0.05)])
def test_by_turns_a_run_learns_what_it_learns_apart_and_no_two_hold_the_card(
    mode: Mode, seed: int, trouble: float
) -> None:
    apart, _ = trained("disaggregated", seed, 0.0)
    by_turns, card = trained(mode, seed, trouble, 3)
    assert by_turns == apart
    assert card.wrong == []
    half = frozenset({"learner weights", "engine weights"})
    assert (half in card.together) == (mode == "ipc"), "weights meet weights, by `ipc` alone"


def test_the_card_tells_two_that_have_it_at_once() -> None:
    _, card = trained("disaggregated", 0, 0.0)
    assert card.wrong == [], "apart nobody tells it what the learner has"
    learner = Learner(card, 0)
    card.take("an engine", "weights")
    learner.reload()
    learner.offload(weights=False)
    assert len(card.wrong) == 1 and "learner states" in card.wrong[0]
    card.take("an engine", "kv_cache")
    assert len(card.wrong) == 2


class Noted:
    """Samplers and learner that note what they are asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def note(weights: bool = True) -> None:
            self.asked.append(name if weights else f"{name} all but weights")

        return note


def test_a_hand_over_is_made_by_whoever_enters_and_only_where_another_had_the_gpus() -> None:
    both = Noted()
    turns = Turns(both, both)
    order: list[tuple[Phase, list[str]]] = [
        ("sampling", []),
        ("learning", ["rest", "reload"]),
        ("learning", []),
        ("sampling", ["offload", "wake"]),
        ("sending", ["rest", "reload", "offload all but weights"]),
        ("learning", ["offload", "wake", "rest", "reload"]),
        ("sending", ["offload all but weights"]),
        ("sampling", ["offload", "wake"]),
    ]
    for phase, expected in order:
        both.asked.clear()
        with turns.enter(phase), turns.enter(phase):
            assert both.asked == expected, phase
    assert turns.counts()["turns/count"] == 8


def test_phases_of_many_threads_never_overlap_and_all_are_entered() -> None:
    both = Noted()
    turns = Turns(both, both)
    inside: set[Phase] = set()
    counts = {"sampling": 0, "learning": 0, "sending": 0}
    lock, overlaps = threading.Lock(), []

    def enter(seed: int) -> None:
        rng = np.random.default_rng(seed)
        phases: list[Phase] = ["sampling", "learning", "sending"]
        for _ in range(20):
            phase = phases[rng.integers(3)]
            with turns.enter(phase):
                with lock:
                    inside.add(phase)
                    counts[phase] += 1
                    overlaps.extend([set(inside)] if len(inside) > 1 else [])
                time.sleep(float(rng.exponential(1e-4)))
                with lock:
                    counts[phase] -= 1
                    if not counts[phase]:
                        inside.discard(phase)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(enter, range(6)))
    assert not overlaps


def test_a_hand_over_that_fails_is_told_and_tried_again_by_the_next() -> None:
    both = Noted()
    failing: Any = Noted()
    tries = [ValueError("a rank is gone")]

    def reload() -> None:
        if tries:
            raise tries.pop()

    failing.reload = reload
    turns = Turns(both, failing)
    with pytest.raises(ValueError, match="a rank is gone"), turns.enter("learning"):
        raise AssertionError("entered all the same")
    with turns.enter("learning"):
        assert both.asked == ["rest", "rest"]
