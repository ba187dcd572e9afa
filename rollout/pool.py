"""The samplers of one model as the driver sees them: work goes in, groups come out, none is lost.

What becomes of it is decided by `rollout.dispatch` and carried out by `rollout.pool_thread`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import numpy as np

from rollout.dispatch import SamplerLost
from rollout.jobs import Cause, Died, Job, News, PoolClient, Refused, all_over, not_up, watched
from rollout.pool_thread import PoolThread
from rollout.record import Group, ReplyError, SampleRequest, ScoreRequest, Weights


class SamplerPool(PoolThread):
    """All samplers of one model.

    `submit` and `collect` are for work that goes on beside the driver; `sample` is a barrier;
    `answer` has a deadline. All may be called from any thread, and side by side.
    """

    # Work

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """Queue groups for `collect`. Raises ValueError for an id that is still on its way."""
        self._tell(lambda now: self._dispatch.add([Job(r, submitted=True) for r in requests], now))

    def collect(self, count: int, timeout: float | None = None) -> list[Group]:
        """Wait for `count` submitted groups, in the order they were complete.

        Fewer, maybe none, after `timeout` seconds or where no more are on their way. Raises the
        error of a request that was refused, and SamplerLost where the pool is past hope.
        """
        dispatch = self._dispatch
        with self.turn() if count else nullcontext():
            self._wait(
                lambda: len(dispatch.complete) >= min(count, len(dispatch.submitted)),
                None if timeout is None else time.monotonic() + timeout,
            )
        with self._changed:
            groups: list[Group] = []
            while dispatch.complete and len(groups) < count:
                # A refused one is raised by the call that finds it first: no group goes with it.
                if groups and isinstance(dispatch.complete[0].outcome, Refused):
                    break
                groups.append(dispatch.collected().group())
            return groups

    def abort(self, group_ids: Iterable[str]) -> None:
        """Drop submitted groups, whether queued, running or complete; unknown ids are ignored."""
        ids = list(group_ids)
        self._tell(lambda now: self._dispatch.abort(ids, now))

    def pending(self) -> int:
        """Submitted groups that were neither collected nor aborted."""
        with self._changed:
            return len(self._dispatch.submitted)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Group]:
        """One group a request, in order. Raises as `collect` does."""
        jobs = [Job(request) for request in requests]
        self._tell(lambda now: self._dispatch.add(jobs, now))
        try:
            with self.turn():
                self._wait(all_over(jobs))
            return [job.group() for job in jobs]
        except BaseException:
            self._tell(lambda now: self._dispatch.give_up(jobs, now))
            raise

    def answer(
        self, requests: Sequence[SampleRequest | ScoreRequest], seconds: float
    ) -> list[Group | np.ndarray | ReplyError]:
        """One reply a request, in order, after at most `seconds`; what has none is a ReplyError.

        A request whose sampler is lost is asked again while there is time.
        """
        until = time.monotonic() + seconds
        jobs, lost = [Job(request, until) for request in requests], ""
        self._tell(lambda now: self._dispatch.add(jobs, now))
        try:
            with self.turn():
                self._wait(all_over(jobs))
        except SamplerLost as error:
            self._tell(lambda now: self._dispatch.give_up(jobs, now))
            lost = str(error)
        return [job.answer(lost) for job in jobs]

    # Samplers

    def wait_ready(self, seconds: float) -> None:
        """Block until every engine is up; an engine's own start-up error is raised."""

        def late() -> list[str]:
            return [seat.name for seat in self._dispatch.seats.values() if not seat.up]

        self._wait(lambda: bool(self._dispatch.seats) and not late(), time.monotonic() + seconds)
        with self._changed:
            if missing := late():
                raise not_up(missing[0], seconds)

    def renew(self, weights: Weights) -> None:
        """Have all samplers fetch a version of the weights, as those do that start from now on.

        Each takes work again when it has it. One that fails, or is late, is started again.
        """

        def published(now: float) -> None:
            self._weights = weights
            self._dispatch.renew(weights.version, now)

        self._tell(published)

    def rest(self) -> None:
        """Return once no sampler holds memory of a GPU: each sleeps, or has no process.

        Until `wake` none is given work, weights or a new process. Raises as `wait_renewed`.
        """
        self._tell(self._dispatch.rest)
        self._wait(lambda: self._dispatch.at_rest)

    def wake(self) -> None:
        """It is the samplers' turn; each takes work when it holds the last weights."""
        self._tell(self._dispatch.wake)

    def wait_renewed(self) -> float:
        """Return once all samplers that are up hold the last version: when they did, monotonic.

        Raises SamplerLost where one was lost too often.
        """
        with self.turn():
            self._wait(lambda: self._dispatch.renewed_at is not None)
        with self._changed:
            return self._dispatch.renewed_at or 0.0

    @property
    def clients(self) -> list[PoolClient]:
        """The samplers that are up."""
        with self._changed:
            return [self._clients[s.name][1] for s in self._dispatch.seats.values() if s.up]

    def wait_clients(self) -> list[PoolClient]:
        """The samplers that are up, as soon as one is. Raises SamplerLost where none will be."""
        if not self.clients:
            with self.turn():
                self._wait(lambda: bool(self.clients))
        return self.clients

    def begin_transfer(self) -> None:
        """The learner sends weights itself: no sampler is pinged until `holds` or `replace`."""
        self._tell(lambda now: setattr(self._dispatch, "transferring", True))

    def holds(self, version: int, clients: Sequence[PoolClient]) -> None:
        """It is over: these clients hold a version, which no other can fetch."""

        def reached(now: float) -> None:
            self._dispatch.transferring = False
            lives = {name: life for name, (life, c) in self._clients.items() if c in clients}
            self._dispatch.holds(version, lives, now)

        self._tell(reached)

    def replace(self, client: PoolClient, cause: Cause, message: str) -> None:
        """End a sampler that is of no use and start it again; nothing where it is ended already.

        Raises SamplerLost where it was replaced too often.
        """

        def lose(now: float) -> None:
            self._dispatch.transferring = False
            life, known = self._clients.get(client.name, (-1, None))
            if known is client:
                self._dispatch.lost(client.name, life, cause, message, now)

        self._tell(lose)
        self._wait(lambda: self._dispatch.error is None)

    def resize(self, count: int) -> None:
        """Make the pool `count` samplers large; those that leave finish what they have."""
        self._tell(lambda now: self._dispatch.resize(count, now))

    def size(self) -> int:
        """Samplers of the pool, whether up or not; those that leave are not counted."""
        with self._changed:
            return sum(not seat.retiring for seat in self._dispatch.seats.values())

    def counts(self) -> dict[str, float]:
        """What befell the samplers since the pool began; names are in docs/metrics.md."""
        with self._changed:
            return self._dispatch.counts(time.monotonic())

    def news(self) -> list[News]:
        """Which samplers were lost since the last call, why, and which came back."""
        with self._changed:
            news, self._dispatch.news = self._dispatch.news, []
        return news

    def weight_checksums(self) -> dict[str, dict[str, str]]:
        """Sampler -> digest of every parameter as its engine holds it; of one sampler at least.

        One that dies or does not answer is started again, and is left out. Raises SamplerLost
        where one was lost too often, and a sampler's own error where it refuses.
        """
        with self.turn():
            return self._checksums(self._settings.request_timeout_seconds)

    def _checksums(self, seconds: float) -> dict[str, dict[str, str]]:
        while True:
            calls = [(c, watched(c, "weight_checksums")) for c in self.wait_clients()]
            until = time.monotonic() + seconds
            checksums: dict[str, dict[str, str]] = {}
            for client, future in calls:
                try:
                    reply = future.result(max(0.0, until - time.monotonic()))
                except TimeoutError:
                    limit = f"{seconds:g} s (sampler.request_timeout_seconds)"
                    reply = Died("overdue", f"{client.name}: no weight checksums within {limit}")
                if isinstance(reply, Refused):
                    raise reply.error
                if isinstance(reply, Died):
                    self.replace(client, reply.cause, reply.message)
                else:
                    checksums[client.name] = reply
            if checksums:
                return checksums
