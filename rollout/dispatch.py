"""Which sampler works on what, and what becomes of work whose sampler is lost. Pure.

`Dispatch` is told of every event and of the time, and answers with commands. It knows neither
threads nor Ray, so that a test can play any order of deaths and delays. `rollout.pool` carries
its commands out.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rollout.record import Group, ReplyError, SampleRequest, ScoreRequest

Request = SampleRequest | ScoreRequest
Cause = Literal["actor", "engine", "silent", "overdue", "garbage", "transfer", "start"]
"""Why a sampler is lost: its process or its engine died, it does not answer pings, its oldest
request is overdue, it returned what cannot be, it failed a weight transfer, it did not start."""

OVERFILL = 1.5
"""Sequences handed to an engine, as a multiple of those it runs at once. A group comes back when
its longest response ends; what waits inside the engine takes the places of the shorter ones."""
IMAGES_REMEMBERED = 1024
"""Images a sampler is taken to have in its cache, the latest ones."""
ROUNDING = 1e-3
"""How far above 0 a log-prob may come out by arithmetic, in nats."""


class SamplerLost(RuntimeError):
    """A sampler failed once more than `sampler.max_restarts` allows; names it and the cause."""


@dataclass(frozen=True)
class PoolLimits:
    """What a pool's samplers may take, by the fields of [sampler] in a recipe."""

    sequences: int = 256
    """`max_num_seqs`: responses that one engine draws at once."""
    request_seconds: float = 600.0
    start_seconds: float = 300.0
    heartbeat_seconds: float = 120.0
    max_restarts: int = 3
    restart_window_seconds: float = 3600.0


@dataclass(frozen=True)
class Died:
    """In place of a reply: the sampler's process or engine is gone."""

    cause: Cause
    message: str


@dataclass(frozen=True)
class Refused:
    """In place of a reply: the request's own error, which another sampler would raise too."""

    error: BaseException
    message: str


@dataclass(eq=False)
class Job:
    """A request on its way. `outcome` is set once; then it is over.

    until: when an answer comes too late; None waits for as long as it takes.
    submitted: belongs to `SamplerPool.submit`, not to a caller that waits for this one.
    """

    request: Request
    until: float | None = None
    submitted: bool = False
    outcome: Group | np.ndarray | ReplyError | Refused | None = None
    ticket: int = 0

    @property
    def id(self) -> str:
        """The group's id, or the request's."""
        if isinstance(self.request, SampleRequest):
            return self.request.group_id
        return self.request.request_id

    @property
    def sequences(self) -> int:
        """Responses that the engine runs for it at once."""
        return self.request.n if isinstance(self.request, SampleRequest) else 1

    @property
    def tokens(self) -> int:
        """At most so many are drawn or scored: what routing goes by."""
        if isinstance(self.request, SampleRequest):
            return self.request.n * self.request.sampling.max_tokens
        return 1 + len(self.request.response_ids)

    @property
    def image(self) -> int | None:
        """The key of the image that the engine will look at, as the problem stores it."""
        if isinstance(self.request, SampleRequest):
            shown = self.request.view != "none"
            return hash((self.request.view, self.request.problem.image)) if shown else None
        return None if self.request.image is None else hash(("shown", self.request.image))


@dataclass(frozen=True)
class Command:
    """What the pool must do: to sampler `name` in its life number `life`."""

    do: Literal["start", "kill", "retire", "send", "drop", "ping"]
    name: str
    life: int
    ticket: int = 0
    request: Request | None = None


@dataclass(eq=False)
class Seat:
    """One sampler of the pool, through all its lives (processes).

    current: it holds the policy's weights; only then does it take work.
    """

    name: str
    life: int
    started: float
    up: bool = False
    current: bool = False
    absent: bool = False
    retiring: bool = False
    vocabulary: int = 0
    running: dict[int, tuple[Job, float]] = field(default_factory=dict)
    sequences: int = 0
    tokens: int = 0
    heard: float = 0.0
    pinged: float | None = None
    losses: deque[float] = field(default_factory=deque)
    images: OrderedDict[int, None] = field(default_factory=OrderedDict)
    idle: float = 0.0
    idle_since: float | None = None

    @property
    def takes_work(self) -> bool:
        """Whether it is up, with the policy's weights, and stays."""
        return self.up and self.current and not self.retiring


class Dispatch:
    """The state of a pool. Each method is one event; `take` hands out what it asks to be done."""

    def __init__(self, names: Sequence[str], limits: PoolLimits, now: float) -> None:
        """`initial` until all of `names` are up: until then a late start is an error."""
        self._limits = limits
        self._prefix = names[0].rpartition("-")[0] if names else "sampler"
        self._next_seat = 0
        self._tickets = 0
        self._waiting: deque[Job] = deque()
        self._urgent: deque[Job] = deque()
        self._due: list[tuple[float, int, Job]] = []
        self._commands: list[Command] = []
        self.seats: dict[str, Seat] = {}
        self.submitted: dict[str, Job] = {}
        self.complete: deque[Job] = deque()
        self.version: int | None = None
        self.transferring = False
        self.initial = True
        self.error: BaseException | None = None
        self.causes: Counter[Cause] = Counter()
        self.resampled: Counter[Cause] = Counter()
        self.refused = 0
        self.news: list[str] = []
        for name in names:
            self._open(name, now)

    # What the pool asks for

    def take(self) -> list[Command]:
        """The commands since the last call, in order."""
        commands, self._commands = self._commands, []
        return commands

    def add(self, jobs: Iterable[Job], now: float) -> None:
        """Queue jobs; those that someone waits for come before those that were submitted.

        Raises ValueError for a submitted group whose id is still on its way.
        """
        jobs = list(jobs)
        new = Counter(job.id for job in jobs if job.submitted)
        twice = sorted(i for i, times in new.items() if i in self.submitted or times > 1)
        if twice:
            raise ValueError(f"group id {twice[0]!r} was submitted twice; ids must be unique")
        for job in jobs:
            if job.submitted:
                self.submitted[job.id] = job
                self._waiting.append(job)
            else:
                self._urgent.append(job)
            if job.until is not None:
                self._tickets += 1
                heapq.heappush(self._due, (job.until, self._tickets, job))
        self._deal(now)

    def abort(self, group_ids: Iterable[str], now: float) -> None:
        """Forget submitted groups, wherever they are: queued, running or complete."""
        gone = {i: self.submitted.pop(i) for i in group_ids if i in self.submitted}
        if gone:
            self._waiting = deque(job for job in self._waiting if job.id not in gone)
            self.complete = deque(job for job in self.complete if job.id not in gone)
            for job in gone.values():
                self._drop(job, now)
            self._deal(now)

    def give_up(self, jobs: Iterable[Job], now: float) -> None:
        """Forget jobs that nobody waits for any more."""
        unfinished = {job for job in jobs if job.outcome is None}
        self._urgent = deque(job for job in self._urgent if job not in unfinished)
        for job in unfinished:
            self._drop(job, now)
        self._deal(now)

    def collected(self) -> Job:
        """The submitted job that was complete first; it is forgotten here."""
        job = self.complete.popleft()
        del self.submitted[job.id]
        return job

    def resize(self, count: int, now: float) -> None:
        """Make the pool `count` samplers large.

        Those that leave finish what they have and take nothing new.
        """
        staying = [seat for seat in self.seats.values() if not seat.retiring]
        for seat in staying[count:]:
            seat.retiring = True
            if not seat.running:
                self._close(seat, "retire")
        for _ in range(count - len(staying)):
            self._open(f"{self._prefix}-{self._next_seat}", now)

    def holds(self, version: int, lives: dict[str, int], now: float) -> None:
        """Samplers (name -> life) have got a policy version; the others are behind from now on."""
        if version != self.version:
            for seat in self.seats.values():
                seat.current = False
        self.version = version
        for name, life in lives.items():
            if (reached := self._seat(name, life)) is not None:
                reached.current = True
        self._deal(now)

    def behind(self) -> list[str]:
        """Samplers that are up and wait for the policy's weights."""
        return [s.name for s in self.seats.values() if s.up and not s.current and not s.retiring]

    # What happens to samplers

    def started(self, name: str, life: int, vocabulary: int, now: float) -> None:
        """A sampler's engine is up; `vocabulary` is the number of its token ids."""
        seat = self._seat(name, life)
        if seat is not None and not seat.up:
            seat.up, seat.absent, seat.vocabulary = True, False, vocabulary
            seat.heard, seat.pinged, seat.idle_since = now, None, now
            # Before the first transfer a sampler's own checkpoint is the policy.
            seat.current = self.version is None
            self.initial = self.initial and not all(s.up for s in self.seats.values())
            self._deal(now)

    def ponged(self, name: str, life: int, now: float) -> None:
        """A sampler's engine answered a ping."""
        seat = self._seat(name, life)
        if seat is not None:
            seat.heard, seat.pinged = now, None

    def replied(self, name: str, life: int, ticket: int, reply: Any, now: float) -> None:
        """What came back for a ticket: a reply, `Refused` or `Died`. A late one is ignored."""
        seat = self._seat(name, life)
        if seat is None or ticket not in seat.running:
            return
        job = seat.running[ticket][0]
        if isinstance(reply, Died):
            self.lost(name, life, reply.cause, reply.message, now)
            return
        if not isinstance(reply, Refused):
            fault = fault_of(reply, job.request, seat.vocabulary)
            if fault:
                self.lost(name, life, "garbage", f"{job.id}: {fault}", now)
                return
        seat.heard = now
        self._release(seat, ticket, now)
        self.refused += isinstance(reply, Refused)
        self._finish(job, reply)
        if seat.retiring and not seat.running:
            self._close(seat, "retire")
        self._deal(now)

    def lost(self, name: str, life: int, cause: Cause, message: str, now: float) -> None:
        """A sampler is of no use: end it, start it again, and queue again what it had.

        What it had comes first in its queue, in the order it was sent. Where the sampler was
        lost too often, `error` says so, and it is not started again.
        """
        seat = self._seat(name, life)
        if seat is None:
            return
        jobs = [job for job, _ in seat.running.values()]
        for job in reversed(jobs):
            job.ticket = 0
            (self._waiting if job.submitted else self._urgent).appendleft(job)
        self.causes[cause] += 1
        self.resampled[cause] += sum(isinstance(job.request, SampleRequest) for job in jobs)
        first = message.strip().split("\n")[0]
        self.news.append(f"sampler {name!r} is lost: {first}; {len(jobs)} requests are asked again")
        self._rest(seat, now)
        if seat.retiring:
            self._close(seat, "kill")
            self._deal(now)
            return
        self._commands.append(Command("kill", name, life))
        seat.losses.append(now)
        while seat.losses[0] <= now - self._limits.restart_window_seconds:
            seat.losses.popleft()
        if len(seat.losses) > self._limits.max_restarts:
            self.error = self.error or SamplerLost(
                f"sampler {name!r} failed {len(seat.losses)} times within "
                f"{self._limits.restart_window_seconds:g} s, and sampler.max_restarts = "
                f"{self._limits.max_restarts}; the last time: {message}"
            )
            del self.seats[name]
            return
        self._start(seat, now)
        self._deal(now)

    def tick(self, now: float) -> None:
        """What time alone decides: late answers, hanging samplers, pings that are due."""
        while self._due and self._due[0][0] <= now:
            job = heapq.heappop(self._due)[2]
            if job.outcome is None:
                at = self._place(job)
                self.give_up([job], now)
                message = f"{at or 'no sampler was free'}: no answer in time"
                job.outcome = ReplyError(job.id, "deadline", message)
        limits = self._limits
        for seat in list(self.seats.values()):
            if not seat.up:
                if now - seat.started > limits.start_seconds:
                    self._late_start(seat, now)
                continue
            oldest = next(iter(seat.running.values()), None)
            if oldest is not None and now - oldest[1] > limits.request_seconds:
                late = (
                    f"no answer to {oldest[0].id!r} within {limits.request_seconds:g} s "
                    "(sampler.request_timeout_seconds)"
                )
                self.lost(seat.name, seat.life, "overdue", late, now)
            elif self.transferring:
                seat.pinged = None  # a transfer has a deadline of its own
            elif seat.pinged is None:
                if now - seat.heard > limits.heartbeat_seconds / 4:
                    seat.pinged = now
                    self._commands.append(Command("ping", seat.name, seat.life))
            elif now - max(seat.pinged, seat.heard) > limits.heartbeat_seconds:
                silent = (
                    f"no sign of life for {limits.heartbeat_seconds:g} s "
                    "(sampler.heartbeat_seconds)"
                )
                self.lost(seat.name, seat.life, "silent", silent, now)

    def next_due(self) -> float | None:
        """When the first answer is late; None where none can be."""
        return self._due[0][0] if self._due else None

    def counts(self, now: float) -> dict[str, float]:
        """Numbers for the metrics, since the pool began (see docs/metrics.md)."""
        seats = list(self.seats.values())
        found = {
            "asked": float(sum(not seat.retiring for seat in seats)),
            "count": float(sum(seat.takes_work for seat in seats)),
            "absent": float(sum(seat.absent for seat in seats)),
            "restarts": float(sum(self.causes.values())),
            "resampled": float(sum(self.resampled.values())),
            "refused": float(self.refused),
        }
        found |= {f"restarts/{cause}": float(n) for cause, n in self.causes.items()}
        found |= {f"resampled/{cause}": float(n) for cause, n in self.resampled.items() if n}
        for seat in seats:
            since = now - seat.idle_since if seat.idle_since is not None else 0.0
            found[f"idle_seconds/{seat.name}"] = seat.idle + since
        return found

    # Inside

    def _seat(self, name: str, life: int) -> Seat | None:
        """The sampler, unless that life of it is over."""
        seat = self.seats.get(name)
        return seat if seat is not None and seat.life == life else None

    def _open(self, name: str, now: float) -> None:
        self.seats[name] = Seat(name, 0, now)
        self._next_seat += 1
        self._commands.append(Command("start", name, 0))

    def _start(self, seat: Seat, now: float) -> None:
        seat.life, seat.started = seat.life + 1, now
        seat.up = seat.current = False
        seat.images.clear()
        self._commands.append(Command("start", seat.name, seat.life))

    def _close(self, seat: Seat, how: Literal["kill", "retire"]) -> None:
        del self.seats[seat.name]
        self._commands.append(Command(how, seat.name, seat.life))

    def _late_start(self, seat: Seat, now: float) -> None:
        """A sampler does not come up: no place for it, say. Others go on without it."""
        if self.initial or not any(other.up for other in self.seats.values()):
            self.error = self.error or TimeoutError(
                f"sampler {seat.name!r} was not up after {self._limits.start_seconds:g} s "
                "(sampler.start_timeout_seconds); see its log in the Ray session folder"
            )
            return
        seat.absent = True
        self._commands.append(Command("kill", seat.name, seat.life))
        self._start(seat, now)

    def _rest(self, seat: Seat, now: float) -> None:
        """Nothing runs on a sampler any more, and it is not up."""
        if seat.idle_since is not None:
            seat.idle += now - seat.idle_since
        seat.idle_since, seat.pinged = None, None
        seat.running.clear()
        seat.sequences = seat.tokens = 0

    def _release(self, seat: Seat, ticket: int, now: float) -> Job:
        job = seat.running.pop(ticket)[0]
        job.ticket = 0
        seat.sequences -= job.sequences
        seat.tokens -= job.tokens
        if not seat.running:
            seat.idle_since = now
        return job

    def _place(self, job: Job) -> str | None:
        held = (s.name for s in self.seats.values() if job.ticket and job.ticket in s.running)
        return next(held, None)

    def _drop(self, job: Job, now: float) -> None:
        """Take a job from the sampler that runs it, if one does."""
        name = self._place(job)
        if name is None:
            return
        seat = self.seats[name]
        self._commands.append(Command("drop", name, seat.life, job.ticket))
        self._release(seat, job.ticket, now)
        if seat.retiring and not seat.running:
            self._close(seat, "retire")

    def _finish(self, job: Job, outcome: Any) -> None:
        job.outcome = outcome
        if job.submitted:
            self.complete.append(job)

    def _deal(self, now: float) -> None:
        """Hand out what is queued while a sampler has room."""
        room = OVERFILL * self._limits.sequences
        free = [s for s in self.seats.values() if s.takes_work and s.sequences < room]
        while free and (queue := self._urgent or self._waiting):
            job = queue.popleft()
            seat = min(free, key=lambda s: s.tokens)
            image = job.image
            if image is not None:
                # One request more than the least loaded is a fair price for its image.
                near = [
                    s for s in free if image in s.images and s.tokens <= seat.tokens + job.tokens
                ]
                seat = min(near, key=lambda s: s.tokens, default=seat)
                seat.images[image] = None
                seat.images.move_to_end(image)
                if len(seat.images) > IMAGES_REMEMBERED:
                    seat.images.popitem(last=False)
            self._tickets += 1
            job.ticket = self._tickets
            if seat.idle_since is not None:
                seat.idle += now - seat.idle_since
                seat.idle_since = None
            seat.running[job.ticket] = (job, now)
            seat.sequences += job.sequences
            seat.tokens += job.tokens
            if seat.sequences >= room:
                free.remove(seat)
            self._commands.append(Command("send", seat.name, seat.life, job.ticket, job.request))


def fault_of(reply: Any, request: Request, vocabulary: int) -> str:
    """What is wrong with a sampler's reply, in words; "" where it can be what was asked for."""
    if isinstance(request, ScoreRequest):
        if not isinstance(reply, np.ndarray) or reply.shape != request.response_ids.shape:
            return f"expected {len(request.response_ids)} log-probs, got {_shown(reply)}"
        return _bad_logprobs(reply)
    if not isinstance(reply, Group):
        return f"expected a group, got {_shown(reply)}"
    if reply.group_id != request.group_id or reply.problem.id != request.problem.id:
        return f"got the group {reply.group_id!r} of problem {reply.problem.id!r}"
    if len(reply.rollouts) != request.n:
        return f"got {len(reply.rollouts)} of {request.n} responses"
    if len({rollout.rollout_id for rollout in reply.rollouts}) != request.n:
        return "two responses have one id"
    for rollout in reply.rollouts:
        ids = rollout.response_ids
        lengths = {len(ids), len(rollout.logprobs), len(rollout.versions), len(rollout.segments)}
        if rollout.group_id != request.group_id:
            return f"a response is of group {rollout.group_id!r}"
        if len(lengths) != 1 or len(ids) > request.sampling.max_tokens:
            return f"token ids, log-probs, versions and segments of lengths {sorted(lengths)}"
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocabulary):
            return f"token ids from {ids.min()} to {ids.max()} in a vocabulary of {vocabulary}"
        if fault := _bad_logprobs(rollout.logprobs):
            return fault
    return ""


def _bad_logprobs(values: np.ndarray) -> str:
    if not np.isfinite(values).all():
        return "a log-prob is not finite"
    if len(values) and values.max() > ROUNDING:
        return f"a log-prob of {values.max():g}, which is a probability above 1"
    return ""


def _shown(reply: Any) -> str:
    shape = f" of shape {reply.shape}" if isinstance(reply, np.ndarray) else ""
    return type(reply).__name__ + shape
