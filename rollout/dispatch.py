"""Which sampler works on what, and what becomes of work whose sampler is lost. Pure.

`Dispatch` is told of every event and of the time, and answers with commands. It knows neither
threads nor Ray, so that a test can play any order of deaths and delays. `rollout.pool_thread`
carries its commands out.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

from rollout.jobs import Cause, Command, Died, Job, News, Refused, Seat, fault_of, not_up
from rollout.record import ReplyError, SampleRequest
from rollout.seats import Seats
from rollout.settings import SamplerConfig

OVERFILL = 1.5
"""Sequences handed to an engine, as a multiple of those it runs at once. A group comes back when
its longest response ends; what waits inside the engine takes the places of the shorter ones."""
IMAGES_REMEMBERED = 1024
"""Images a sampler is taken to have in its cache, the latest ones."""


class SamplerLost(RuntimeError):
    """A sampler failed once more than `sampler.max_restarts` allows; names it and the cause."""


class Dispatch(Seats):
    """The state of a pool. Each method is one event; `take` hands out what it asks to be done."""

    def __init__(
        self, names: Sequence[str], settings: SamplerConfig, now: float, renewal: float = 120.0
    ) -> None:
        """`renewal`: seconds in which a sampler must have fetched a version of the weights.

        `initial` until all of `names` are up: until then a late start is an error.
        """
        super().__init__(names, now)
        self._settings, self._renewal = settings, renewal
        self._tickets = 0
        self._waiting: deque[Job] = deque()
        self._urgent: deque[Job] = deque()
        self._due: list[tuple[float, int, Job]] = []
        self.submitted: dict[str, Job] = {}
        self.complete: deque[Job] = deque()
        self.version: int | None = None
        self.renewed_at: float | None = None
        self.fetchable = self.transferring = False
        self.initial = True
        self.error: BaseException | None = None
        self.causes: Counter[Cause] = Counter()
        self.resampled: Counter[Cause] = Counter()
        self.refused = 0
        self.news: list[News] = []

    # What the pool asks for

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
        """Make the pool `count` samplers large; those that leave finish what they have first."""
        staying = [seat for seat in self.seats.values() if not seat.retiring]
        for seat in staying[count:]:
            seat.retiring = True
            if not seat.running:
                self._close(seat, "retire")
        for _ in range(count - len(staying)):
            self._open(f"{self._prefix}-{self._next_seat}", now)
        self._deal(now)

    def renew(self, version: int, now: float) -> None:
        """A version of the weights can be fetched: all samplers do, and until then get no work.

        `renewed_at` says when all that are up had it.
        """
        self.version, self.fetchable, self.renewed_at = version, True, None
        for seat in self.seats.values():
            seat.version = None
            if seat.up and seat.busy is None and not self.resting:
                self._fetch(seat, now)

    def holds(self, version: int, lives: dict[str, int], now: float) -> None:
        """Samplers (name -> life) were sent a version, which no other can fetch."""
        self.version, self.fetchable, self.renewed_at = version, False, now
        for name, life in lives.items():
            if (reached := self._seat(name, life)) is not None:
                reached.version = version
                self._recovered(reached, now)
        self._deal(now)

    # What happens to samplers

    def started(
        self, name: str, life: int, vocabulary: int, version: int | None, now: float
    ) -> None:
        """A sampler's engine is up, with a version of the weights and so many token ids."""
        seat = self._seat(name, life)
        if seat is not None and not seat.up:
            seat.up, seat.absent, seat.vocabulary = True, False, vocabulary
            seat.heard, seat.pinged, seat.idle_since = now, None, now
            self.initial = self.initial and not all(s.up for s in self.seats.values())
            self._has(seat, version, now)

    def renewed(self, name: str, life: int, version: int, now: float) -> None:
        """A sampler has fetched a version of the weights."""
        if (seat := self._seat(name, life)) is not None:
            self._has(seat, version, now)

    def woken(self, name: str, life: int, version: int | None, now: float) -> None:
        """A sampler is awake, with a version that was fetched, or (None) that it slept with."""
        if (seat := self._seat(name, life)) is not None:
            seat.rest = "awake"
            self._has(seat, seat.version if version is None else version, now)

    def ponged(self, name: str, life: int, now: float) -> None:
        """A sampler's engine answered a ping."""
        if (seat := self._seat(name, life)) is not None:
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
        refused = isinstance(reply, Refused)
        if not refused and (fault := fault_of(reply, job.request, seat.vocabulary)):
            self.lost(name, life, "garbage", f"{job.id}: {fault}", now)
            return
        seat.heard = now
        self._release(seat, ticket, now)
        self.refused += refused
        job.outcome = reply
        if job.submitted:
            self.complete.append(job)
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
        self.news.append(News(now, name, "lost", first, f"{len(jobs)} requests"))
        seat.lost_at = now if seat.lost_at is None else seat.lost_at
        if seat.idle_since is not None:
            seat.idle += now - seat.idle_since
        seat.idle_since, seat.pinged = None, None
        seat.running.clear()
        seat.sequences = seat.tokens = 0
        if seat.retiring:
            self._close(seat, "kill")
            self._deal(now)
            return
        self._commands.append(Command("kill", name, life))
        seat.losses.append(now)
        while seat.losses[0] <= now - self._settings.restart_window_seconds:
            seat.losses.popleft()
        if len(seat.losses) > self._settings.max_restarts:
            self.error = self.error or SamplerLost(
                f"sampler {name!r} failed {len(seat.losses)} times within "
                f"{self._settings.restart_window_seconds:g} s, and sampler.max_restarts = "
                f"{self._settings.max_restarts}; the last time: {message}"
            )
            del self.seats[name]
            return
        self._start(seat, now)
        if not (self.fetchable or self.transferring or self.version is None) and not any(
            other.version == self.version for other in self.seats.values()
        ):
            self.error = self.error or SamplerLost(
                f"no sampler holds version {self.version} any more, and it was sent to them by a "
                f"transport that leaves no copy; go on with --resume. The last: {message}"
            )
        self._deal(now)

    def tick(self, now: float) -> None:
        """What time alone decides: late answers, hanging samplers, pings that are due."""
        while self._due and self._due[0][0] <= now:
            job = heapq.heappop(self._due)[2]
            if job.outcome is None:
                seat = self._seat_for(job)
                self.give_up([job], now)
                message = f"{seat.name if seat else 'no sampler was free'}: no answer in time"
                job.outcome = ReplyError(job.id, "deadline", message)
        settings = self._settings
        for seat in list(self.seats.values()):
            if not seat.up:
                late = now - seat.started > settings.start_timeout_seconds
                if late and seat.rest != "down":
                    self._late_start(seat, now)
                continue
            oldest = next(iter(seat.running.values()), None)
            why: tuple[Cause, str] | None = None
            if oldest is not None and now - oldest[1] > settings.request_timeout_seconds:
                limit = f"{settings.request_timeout_seconds:g} s (sampler.request_timeout_seconds)"
                why = "overdue", f"no answer to {oldest[0].id!r} within {limit}"
            elif seat.busy is not None and now - seat.busy > self._renewal:
                limit = f"the deadline of {self._renewal:g} s (transfer.deadline_seconds)"
                what = {"falling": "fall asleep", "waking": "wake"}.get(seat.rest)
                did_not = what or f"have version {self.version}"
                why = (
                    "transfer",
                    f"weight transfer: sampler {seat.name!r} did not {did_not} within {limit}",
                )
            elif self.transferring or seat.busy is not None:
                seat.pinged = None  # a transfer has a deadline of its own
            elif seat.pinged is None:
                if now - seat.heard > settings.heartbeat_seconds / 4:
                    seat.pinged = now
                    self._commands.append(Command("ping", seat.name, seat.life))
            elif now - max(seat.pinged, seat.heard) > settings.heartbeat_seconds:
                limit = f"{settings.heartbeat_seconds:g} s (sampler.heartbeat_seconds)"
                why = "silent", f"no sign of life for {limit}"
            if why is not None:
                self.lost(seat.name, seat.life, *why, now)

    def next_due(self) -> float | None:
        """When the first answer is late; None where none can be."""
        return self._due[0][0] if self._due else None

    def counts(self, now: float) -> dict[str, float]:
        """Numbers for the metrics, since the pool began (see docs/metrics.md)."""
        seats = list(self.seats.values())
        counts = {
            "asked": float(sum(not seat.retiring for seat in seats)),
            # One that fetches the last version, or sleeps, takes work in a moment.
            "count": float(sum(self._takes_work(s) or self._will_soon(s) for s in seats)),
            "absent": float(sum(seat.absent for seat in seats)),
            "restarts": float(sum(self.causes.values())),
            "resampled": float(sum(self.resampled.values())),
            "refused": float(self.refused),
        }
        counts |= {f"restarts/{cause}": float(n) for cause, n in self.causes.items()}
        counts |= {f"resampled/{cause}": float(n) for cause, n in self.resampled.items() if n}
        for seat in seats:
            since = now - seat.idle_since if seat.idle_since is not None else 0.0
            counts[f"idle_seconds/{seat.name}"] = seat.idle + since
        return counts

    # Inside

    def _seat_for(self, job: Job) -> Seat | None:
        """The sampler that runs a job, if one does."""
        seats = self.seats.values()
        return next((s for s in seats if job.ticket and job.ticket in s.running), None)

    def _takes_work(self, seat: Seat) -> bool:
        """Whether it is up and awake, with the policy's weights (before the first, its own), and
        stays."""
        awake = seat.up and seat.rest == "awake" and not self.resting
        return awake and seat.version == self.version and not seat.retiring

    def _will_soon(self, seat: Seat) -> bool:
        return (seat.busy is not None or seat.rest == "asleep") and not seat.retiring

    def _has(self, seat: Seat, version: int | None, now: float) -> None:
        """A sampler holds a version; where that is not the last one, it fetches that now."""
        seat.version, seat.heard, seat.busy = version, now, None
        if self.resting:
            self._lay_down(seat, now)
        elif version != self.version and self.fetchable:
            self._fetch(seat, now)
        else:
            self._recovered(seat, now)
        self._deal(now)

    def _recovered(self, seat: Seat, now: float) -> None:
        """A sampler takes work: where it had been lost, that is news."""
        if seat.lost_at is not None:
            self.news.append(News(now, seat.name, "back", recovered_seconds=now - seat.lost_at))
            seat.lost_at = None

    def _late_start(self, seat: Seat, now: float) -> None:
        """A sampler does not come up: no place for it, say. Others go on without it."""
        if self.initial or not any(other.up for other in self.seats.values()):
            self.error = self.error or not_up(seat.name, self._settings.start_timeout_seconds)
            return
        seat.absent = True
        self._commands.append(Command("kill", seat.name, seat.life))
        self._start(seat, now)

    def _release(self, seat: Seat, ticket: int, now: float) -> None:
        job = seat.running.pop(ticket)[0]
        job.ticket = 0
        seat.sequences -= job.sequences
        seat.tokens -= job.tokens
        if not seat.running:
            seat.idle_since = now
            if self.resting:
                self._lay_down(seat, now)

    def _drop(self, job: Job, now: float) -> None:
        """Take a job from the sampler that runs it, if one does."""
        if (seat := self._seat_for(job)) is None:
            return
        self._commands.append(Command("drop", seat.name, seat.life, job.ticket))
        self._release(seat, job.ticket, now)
        if seat.retiring and not seat.running:
            self._close(seat, "retire")

    def _deal(self, now: float) -> None:
        """Hand out what is queued while a sampler has room; see whether all have their weights."""
        up = [seat for seat in self.seats.values() if seat.up]
        if self.renewed_at is None and up and all(s.version == self.version for s in up):
            self.renewed_at = now
        room = OVERFILL * self._settings.max_num_seqs
        free = [s for s in up if self._takes_work(s) and s.sequences < room]
        while free and (queue := self._urgent or self._waiting):
            job = queue.popleft()
            seat = min(free, key=lambda s: s.tokens)
            images = job.images
            if images is not None:
                # One request more than the least loaded is a fair price for its images.
                near = [
                    s for s in free if images in s.images and s.tokens <= seat.tokens + job.tokens
                ]
                seat = min(near, key=lambda s: s.tokens, default=seat)
                seat.images[images] = None
                seat.images.move_to_end(images)
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
