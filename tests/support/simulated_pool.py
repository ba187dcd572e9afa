"""A sampler pool on a clock of its own: recorded lengths, deaths and weight updates, no engine.

The interface is that of `rollout.pool.SamplerPool`, as far as the driver uses it. Time passes
only while the driver waits, so a thousand steps take a second and every run is the same.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rollout.record import Group, Rollout, SampleRequest
from tasks.core import Parsed

RESTART = 2.0
NOTHING = Parsed(perception=None, reasoning="", answer=None, spans={}, defects=())

_What = Literal["ends", "dies", "restarts"]


@dataclass
class _Sampler:
    """One group at a time; `began` the seconds and version at which its attempt began."""

    version: int = 0
    request: SampleRequest | None = None
    attempt: int = 0
    spans: list[tuple[float, int]] = field(default_factory=list)
    up: bool = True


class SimulatedPool:
    """`count` samplers with one group each at a time, of `seconds[i]` for the i-th start.

    A sampler dies in the middle of a group with probability `death`; the group goes back to the
    front of the queue, and the sampler is up again `RESTART` seconds later, with the version that
    was sent last.
    """

    def __init__(
        self, count: int, seconds: Sequence[float], death: float = 0.0, seed: int = 0
    ) -> None:
        self.now = 0.0
        self.busy = 0.0
        self.started: list[str] = []
        self.deaths = 0
        self._rng = np.random.default_rng(seed)
        self._seconds = itertools.cycle(seconds)
        self._death = death
        self._samplers = [_Sampler() for _ in range(count)]
        self._queue: deque[SampleRequest] = deque()
        self._done: deque[Group] = deque()
        self._events: list[tuple[float, int, int, int, _What]] = []
        self._order = itertools.count()

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        waiting = {r.group_id for r in self._queue} | {
            s.request.group_id for s in self._samplers if s.request
        }
        for request in requests:
            assert request.group_id not in waiting, "an id is in the pool at most once"
            waiting.add(request.group_id)
        self._queue.extend(requests)
        self._admit()

    def collect(self, count: int, timeout: float | None = None) -> list[Group]:
        until = float("inf") if timeout is None else self.now + timeout
        while len(self._done) < min(count, self.pending()):
            if not self._events or self._events[0][0] > until:
                assert timeout is not None, "nothing runs, and the driver waits"
                self.sleep_until(until)
                break
            self.sleep_until(self._events[0][0])
        return [self._done.popleft() for _ in range(min(count, len(self._done)))]

    def abort(self, group_ids: Iterable[str]) -> None:
        gone = set(group_ids)
        self._queue = deque(r for r in self._queue if r.group_id not in gone)
        self._done = deque(g for g in self._done if g.group_id not in gone)
        for sampler in self._samplers:
            if sampler.request and sampler.request.group_id in gone:
                sampler.request, sampler.attempt = None, sampler.attempt + 1
        self._admit()

    def pending(self) -> int:
        running = sum(s.request is not None for s in self._samplers)
        return len(self._queue) + running + len(self._done)

    def send(self, version: int) -> None:
        """What a weight transfer does to the samplers: running groups go on under new weights."""
        for sampler in self._samplers:
            sampler.version = version
            if sampler.request:
                sampler.spans.append((self.now, version))
        self._admit()

    def sleep_until(self, moment: float) -> None:
        """Let time pass, as it does while the learner learns."""
        while self._events and self._events[0][0] <= moment:
            self.now, _, place, attempt, what = heapq.heappop(self._events)
            sampler = self._samplers[place]
            if what == "restarts":
                sampler.up = True
                self._admit()
                continue
            if sampler.request is None or sampler.attempt != attempt:
                continue
            request, sampler.request = sampler.request, None
            if what == "dies":
                self.deaths += 1
                sampler.up = False
                self._later(RESTART, place, attempt, "restarts")
                self._queue.appendleft(request)
            else:
                self._done.append(self._group(request, sampler))
            self._admit()
        self.now = max(self.now, moment)

    def _admit(self) -> None:
        for place, sampler in enumerate(self._samplers):
            if not self._queue or sampler.request or not sampler.up:
                continue
            sampler.request = self._queue.popleft()
            sampler.attempt += 1
            sampler.spans = [(self.now, sampler.version)]
            self.started.append(sampler.request.group_id)
            seconds = next(self._seconds)
            dies = bool(self._rng.random() < self._death)
            seconds *= self._rng.random() if dies else 1.0
            self.busy += seconds
            self._later(seconds, place, sampler.attempt, "dies" if dies else "ends")

    def _later(self, seconds: float, place: int, attempt: int, what: _What) -> None:
        event = (self.now + seconds, next(self._order), place, attempt, what)
        heapq.heappush(self._events, event)

    def _group(self, request: SampleRequest, sampler: _Sampler) -> Group:
        """One token a version that the group was sampled under."""
        versions = np.array([version for _, version in sampler.spans], np.int32)
        none = np.zeros(len(versions), np.int32)
        rollouts = tuple(
            Rollout(
                rollout_id=f"{request.group_id}/{i}",
                group_id=request.group_id,
                kind=request.kind,
                view=request.view,
                prompt_ids=none,
                response_ids=none,
                images=(),
                logprobs=none.astype(np.float32),
                versions=versions,
                segments=none.astype(np.int8),
                prefix="",
                text="",
                parsed=NOTHING,
                finish_reason="stop",
                seconds=self.now - sampler.spans[0][0],
                sampler="simulated",
            )
            for i in range(request.n)
        )
        return Group(request.group_id, request.problem, rollouts)
