"""The processes that terms run in, and the calls they have in flight: who is to blame for what."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rewards.scored import FailureKind, RewardError, ScoredTerms, TermFailure
from rewards.settings import RewardConfig, RewardTermConfig
from rewards.terms import TermFacts
from rewards.worker import RemoteWorker, RewardWorker
from tasks.liveness import beat

CHUNK = 8
"""Groups a call: enough to make a call's overhead small, few enough to retry cheaply."""
START_SECONDS = 120.0
"""How long a worker process may take to start, or to start again."""
LOOP_SECONDS = 3.0
"""How long a remote term's event loop may stand still once one of its groups is overdue."""

Keep = Callable[[int, ScoredTerms], None]
"""Takes the result for the group at an index."""


@dataclass(frozen=True)
class _Job:
    """Some terms on some inputs; `alone`: it is to be certain whom to blame."""

    inputs: tuple[int, ...]
    parts: tuple[str, ...]
    alone: bool = False

    def pieces(self) -> list[_Job]:
        return [_Job((i,), (part,), alone=True) for i in self.inputs for part in self.parts]


@dataclass
class _Worker:
    """A process and its calls in flight, each with its job and when it is due.

    While it starts, that is `ready` alone, whose job is None.
    """

    actor: Any
    calls: dict[Any, tuple[_Job | None, float]] = field(default_factory=dict)

    def start(self) -> None:
        self.calls = {self.actor.ready.remote(): (None, time.monotonic() + START_SECONDS)}

    def has_room(self, slots: int, alone: bool) -> bool:
        if any(job is None or job.alone for job, _ in self.calls.values()):
            return False
        return len(self.calls) < (1 if alone else slots)


class Workers:
    """Processes that run the same terms, and the calls they have in flight.

    Terms that compute have `config.workers` processes, each with one chunk of groups at a time; a
    remote term has a process of its own, with up to `config.remote_in_flight` groups at once.
    What a process takes down with it, or holds past its deadline, is tried again piece by piece:
    one group and one term a call, alone in its process, so that the blame falls on exactly one term
    and everything else gets its values.
    """

    def __init__(
        self,
        config: RewardConfig,
        entries: Sequence[RewardTermConfig],
        places: Sequence[Mapping[str, Any]],
        remote: str = "",
        facts: TermFacts | None = None,
    ) -> None:
        """A process each of `places`, which are options of actors.

        `remote`: the name of a remote term, whose `facts` say what its process takes.
        """
        self.restarts = 0
        self._remote, self._closed = remote, False
        self._who = f"reward term {remote!r}" if remote else "a reward worker"
        self._slots = config.remote_in_flight if remote else 1
        self._seconds = config.remote_seconds if remote else config.deadline_seconds
        actor = ray.remote(RemoteWorker if remote else RewardWorker)
        options = {
            "num_cpus": facts.cpus if facts else 0,
            "num_gpus": facts.gpus if facts else 0,
            "max_restarts": -1,
            "max_concurrency": self._slots + 2 if remote else 1,
        }
        memory = 0.0 if facts and facts.weights else config.memory_gib
        roles = [f"reward-{remote}" if remote else f"reward-worker-{n}" for n in range(len(places))]
        self._workers = [
            _Worker(actor.options(**options, **place).remote(entries, memory, role))
            for place, role in zip(places, roles, strict=True)
        ]
        for worker in self._workers:
            worker.start()

    def wait_ready(self) -> None:
        """Return once the terms are loaded; raises RewardError with the reason if they cannot."""
        while any(worker.calls for worker in self._workers):
            list(self._ended())

    def run(self, method: str, inputs: Sequence[Any], parts: tuple[str, ...], keep: Keep) -> None:
        """Call `method(chunk, parts)` over all inputs; `keep` gets the result of each.

        Raises RewardError for a worker that does not start again, or was closed.
        """
        every, size = range(len(inputs)), 1 if self._remote else CHUNK
        jobs = deque(_Job(tuple(every[i : i + size]), parts) for i in every[::size])
        suspects: deque[_Job] = deque()
        while jobs or suspects or any(job for w in self._workers for job, _ in w.calls.values()):
            for worker in self._workers:
                queue = suspects or jobs
                while queue and worker.has_room(self._slots, alone=bool(suspects)):
                    job = queue.popleft()
                    call = getattr(worker.actor, method).remote(
                        [inputs[i] for i in job.inputs], job.parts
                    )
                    worker.calls[call] = (job, time.monotonic() + self._seconds)
                    queue = suspects or jobs
            for job, result in self._ended():
                if isinstance(result, list):
                    for index, output in zip(job.inputs, result, strict=True):
                        keep(index, output)
                elif result is not None and len(job.inputs) * len(job.parts) == 1:
                    keep(job.inputs[0], ScoredTerms(failures=(result,)))
                else:
                    suspects.extend(job.pieces())

    def counts(self) -> dict[str, float]:
        """A remote term's own counts (see `RemoteWorker`); none where it does not answer now."""
        try:
            actor = self._workers[0].actor
            counts: dict[str, float] = ray.get(actor.counts.remote(), timeout=LOOP_SECONDS)
        except (GetTimeoutError, RayActorError):
            return {}  # a term that hangs or died is met, and counted, by the next `score`
        return counts

    def close(self) -> None:
        self._closed = True
        for worker in self._workers:
            ray.kill(worker.actor)

    def _ended(self) -> Iterator[tuple[_Job, list[ScoredTerms] | TermFailure | None]]:
        """Wait until a call ends or is due; then the jobs that ended and what became of each.

        None: lost, and whether by its own fault is not known. Raises RewardError for a worker that
        does not start.
        """
        busy = [worker for worker in self._workers if worker.calls]
        calls = [call for worker in busy for call in worker.calls]
        due = min(until for worker in busy for _, until in worker.calls.values())
        ray.wait(calls, timeout=max(0.0, due - time.monotonic()))
        ended = set(ray.wait(calls, num_returns=len(calls), timeout=0)[0])
        for worker in busy:
            yield from self._of_worker(worker, ended)

    def _of_worker(
        self, worker: _Worker, ended_calls: Collection[Any]
    ) -> Iterator[tuple[_Job, list[ScoredTerms] | TermFailure | None]]:
        lost: list[_Job | None] = []
        why: tuple[FailureKind, str] = ("worker_died", "")
        for call in [call for call in worker.calls if call in ended_calls]:
            job, _ = worker.calls.pop(call)
            beat()
            try:
                result = ray.get(call)
            except RayTaskError as error:
                # Not a term's own exception (those are values here): the term file cannot be
                # loaded, or something in the group cannot be unpickled.
                self._require_started(job, str(error.cause))
                result = _failure(job, "exception", str(error.cause), str(error))
            except RayError as error:
                lost.append(job)
                why = ("worker_died", str(error))
                continue
            if job is not None:
                yield job, result
        now = time.monotonic()
        overdue = [call for call, (_, until) in worker.calls.items() if now >= until]
        starting = any(job is None for job, _ in worker.calls.values())
        waited = f"no result within {START_SECONDS if starting else self._seconds:g} s"
        if overdue and not lost and self._remote and not starting and _loop_turns(worker):
            for call in overdue:
                job, _ = worker.calls.pop(call)
                ray.cancel(call)
                if job is not None:
                    yield job, _failure(job, "deadline", waited)
        elif overdue:
            ray.kill(worker.actor, no_restart=False)
            lost += [worker.calls.pop(call)[0] for call in overdue]
            why = ("deadline", waited)
        if self._closed:
            raise RewardError(f"{self._who} was stopped")
        if lost:
            lost += [job for job, _ in worker.calls.values()]
            self.restarts += 1
            worker.start()
        for job in lost:
            self._require_started(job, why[1])
            if job is not None:
                yield job, _failure(job, *why) if len(lost) == 1 else None

    def _require_started(self, job: _Job | None, why: str) -> None:
        if job is None:
            raise RewardError(f"{self._who} cannot start: {why}")


def _failure(job: _Job | None, kind: FailureKind, message: str, traceback: str = "") -> TermFailure:
    return TermFailure(job.parts[0] if job else "", kind, message, traceback)


def _loop_turns(worker: _Worker) -> bool:
    """Whether a remote term still answers: one that waits does, one that blocks does not."""
    try:
        ray.get(worker.actor.alive.remote(), timeout=LOOP_SECONDS)
    except RayError:
        return False
    return True
