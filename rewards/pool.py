"""Scores groups: terms that compute, terms that ask a model, terms that wait for others.

One call of `RewardPool.score` is one pass: workers run every computing term and let the asking
terms ask; samplers answer; workers read the answers. Remote terms run beside it. Whatever a term
does (raises, hangs, ends its process, eats memory, returns nonsense) becomes a typed failure of
that term on that group, and the recipe says what follows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rewards.advantages import Advantages, Estimator
from rewards.compose import Composition, compose_groups, raise_if_fatal
from rewards.scored import (
    DIAGNOSIS,
    Answerer,
    FailureKind,
    ModelRequest,
    Reply,
    RewardError,
    ScoredGroup,
    ScoredTerms,
    TermError,
    TermFailure,
)
from rewards.settings import RewardConfig, RewardTermConfig
from rewards.terms import facts_of
from rewards.worker import RemoteWorker, RewardWorker
from rollout.record import Group, ReplyError
from tasks.core import Problem

CHUNK = 8
"""Groups a call: enough to make a call's overhead small, few enough to retry cheaply."""
START_SECONDS = 120.0
"""How long a worker process may take to start, or to start again."""
LOOP_SECONDS = 3.0
"""How long a remote term's event loop may stand still once one of its groups is overdue."""

Keep = Callable[[int, ScoredTerms], None]
"""Takes what was found for the group at an index."""


class RewardPool:
    """Scores groups on worker processes as a recipe says."""

    def __init__(
        self,
        config: RewardConfig,
        estimator: Estimator | Advantages = "grpo",
        answerers: Mapping[str, Answerer] | None = None,
    ) -> None:
        """Start the workers and wait until their terms are loaded.

        `answerers`: for asking terms, model -> samplers; "" is the current policy.

        Raises `RewardError` if a worker cannot start, with the reason (an unknown term, say),
        and ValueError for a composition that makes no sense.
        """
        self._config = config
        self._estimator: Estimator | Advantages = estimator
        self._answerers = dict(answerers or {})
        entries = config.effective_terms()
        try:
            terms = facts_of(entries)
        except TermError as error:
            raise RewardError(f"a reward worker cannot start: {error}") from error
        self._entries = dict(zip(terms, entries, strict=True))
        self._asking = {n: t.model for n, t in terms.items() if t.model is not None}
        unknown = sorted(set(self._asking.values()) - set(self._answerers))
        if unknown:
            raise RewardError(f"reward terms ask {unknown}, and no sampler runs such a model")
        self.composition_at(0.0)
        local = [name for name, term in terms.items() if not term.remote]
        self._of_step = tuple(n for n in local if self._entries[n].scope == "step")
        self._parts = (*(n for n in local if n not in self._of_step), DIAGNOSIS)
        self._workers = _Workers(config, [self._entries[name] for name in local])
        self._remote = {
            name: _Workers(config, [self._entries[name]], remote=name)
            for name, term in terms.items()
            if term.remote
        }
        for workers in (self._workers, *self._remote.values()):
            workers.wait_ready()

    @property
    def restarts(self) -> int:
        """Workers that died or were ended since the pool was made."""
        return sum(workers.restarts for workers in (self._workers, *self._remote.values()))

    def composition_at(self, progress: float) -> Composition:
        """How terms count at a share of the run in [0, 1]."""
        entries = self._entries
        named = {entry.entry: name for name, entry in entries.items()}
        return Composition(
            weights={name: entry.weight_at(progress) for name, entry in entries.items()},
            method=self._config.compose,
            estimator=self._estimator,
            on_failure={name: entry.on_failure for name, entry in entries.items()},
            credit={name: entry.segments for name, entry in entries.items()},
            gates={
                name: (named[entry.gate], entry.gate_threshold)
                for name, entry in entries.items()
                if entry.gate is not None
            },
        )

    def score(self, groups: Sequence[Group], progress: float = 0.0) -> list[ScoredGroup]:
        """Score groups, in order, with the weights of `progress` (a share of the run).

        Raises `RewardError` when a term fails whose failure ends the run, or a worker does not
        start again; the pool is closed then.
        """
        composition = self.composition_at(progress)
        scored = [ScoredTerms() for _ in groups]

        def keep(index: int, found: ScoredTerms) -> None:
            raise_if_fatal(found.failures, groups[index], composition)
            scored[index].add(found)

        def keep_of_step(_: int, found: ScoredTerms) -> None:
            for index, part in enumerate(found.parted([len(g.rollouts) for g in groups])):
                keep(index, part)

        def wait_for(name: str) -> list[tuple[int, ScoredTerms]]:
            """What a remote term finds, to be kept by the caller's thread."""
            found: list[tuple[int, ScoredTerms]] = []
            self._remote[name].run("score", groups, (name,), lambda *each: found.append(each))
            return found

        with ThreadPoolExecutor(1 + len(self._remote)) as threads:
            remote = [threads.submit(wait_for, name) for name in self._remote]
            try:
                others = [_other_problem(groups, i) for i in range(len(groups))]
                pairs = list(zip(groups, others, strict=True))
                self._workers.run("score", pairs, self._parts, keep)
                if self._of_step and groups:
                    self._workers.run("score_steps", [groups], self._of_step, keep_of_step)
                self._ask_and_read(groups, scored, keep)
                for finding in remote:
                    for each in finding.result():
                        keep(*each)
            except BaseException:
                self.close()  # also ends the calls that the threads wait for
                raise
        return compose_groups(groups, scored, composition)

    def counts(self) -> dict[str, float]:
        """What remote terms count, as `<term>/calls/<name>`, since the process of each started."""
        return {
            f"{term}/calls/{name}": value
            for term, workers in self._remote.items()
            for name, value in workers.counts().items()
        }

    def close(self) -> None:
        """End every worker process."""
        for workers in (self._workers, *self._remote.values()):
            workers.close()

    def _ask_and_read(
        self, groups: Sequence[Group], scored: Sequence[ScoredTerms], keep: Keep
    ) -> None:
        replies: list[dict[str, Sequence[Reply]]] = [{} for _ in groups]
        of_model: dict[str, list[tuple[int, str, Sequence[ModelRequest]]]] = {}
        for index, found in enumerate(scored):
            for name, requests in found.requests.items():
                of_model.setdefault(self._asking[name], []).append((index, name, requests))

        def ask(model: str) -> tuple[Iterator[Reply | ReplyError], float]:
            """What a model answers, and the seconds it took."""
            flat = [request for _, _, requests in of_model[model] for request in requests]
            start = time.perf_counter()
            answers = self._answerers[model].answer(flat, self._config.answer_seconds)
            return iter(answers), time.perf_counter() - start

        with ThreadPoolExecutor(max(1, len(of_model))) as threads:
            told = list(threads.map(ask, of_model))
        for mine, (answers, waited) in zip(of_model.values(), told, strict=True):
            for index, name, requests in mine:
                given = [next(answers) for _ in requests]
                failed = tuple(
                    TermFailure(
                        name,
                        "deadline" if reply.kind == "deadline" else "model",
                        f"{reply.request_id}: {reply.message}",
                    )
                    for reply in given
                    if isinstance(reply, ReplyError)
                )
                keep(index, ScoredTerms(failures=failed[:1], seconds={name: waited}))
                if not failed:
                    replies[index][name] = [r for r in given if not isinstance(r, ReplyError)]
        answered = [index for index, found in enumerate(replies) if found]
        self._workers.run(
            "read",
            [(groups[i], replies[i]) for i in answered],
            tuple(self._asking),
            lambda place, found: keep(answered[place], found),
        )


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

    def has_room(self, places: int, alone: bool) -> bool:
        if any(job is None or job.alone for job, _ in self.calls.values()):
            return False
        return len(self.calls) < (1 if alone else places)


class _Workers:
    """Processes that run the same terms, and the calls they have in flight.

    Terms that compute have `config.workers` processes, each with one chunk of groups at a time; a
    remote term has a process of its own, with up to `config.remote_in_flight` groups at once.
    What a process takes down with it, or holds past its deadline, is tried again piece by piece:
    one group and one term a call, alone in its process, so that the blame falls on exactly one term
    and everything else gets its values.
    """

    def __init__(
        self, config: RewardConfig, entries: Sequence[RewardTermConfig], remote: str = ""
    ) -> None:
        self.restarts = 0
        self._remote, self._closed = remote, False
        self._who = f"reward term {remote!r}" if remote else "a reward worker"
        self._places = config.remote_in_flight if remote else 1
        self._seconds = config.remote_seconds if remote else config.deadline_seconds
        actor = ray.remote(RemoteWorker if remote else RewardWorker).options(
            num_cpus=0, max_restarts=-1, max_concurrency=self._places + 2 if remote else 1
        )
        count = 1 if remote else config.workers
        self._workers = [_Worker(actor.remote(entries, config.memory_gib)) for _ in range(count)]
        for worker in self._workers:
            worker.start()

    def wait_ready(self) -> None:
        """Return once the terms are loaded; raises RewardError with the reason if they cannot."""
        while any(worker.calls for worker in self._workers):
            list(self._ended())

    def run(self, method: str, inputs: Sequence[Any], parts: tuple[str, ...], keep: Keep) -> None:
        """Call `method(chunk, parts)` over all inputs; `keep` gets what was found for each.

        Raises RewardError for a worker that does not start again, or was closed.
        """
        every, size = range(len(inputs)), 1 if self._remote else CHUNK
        jobs = deque(_Job(tuple(every[i : i + size]), parts) for i in every[::size])
        suspects: deque[_Job] = deque()
        while jobs or suspects or any(job for w in self._workers for job, _ in w.calls.values()):
            for worker in self._workers:
                queue = suspects or jobs
                while queue and worker.has_room(self._places, alone=bool(suspects)):
                    job = queue.popleft()
                    call = getattr(worker.actor, method).remote(
                        [inputs[i] for i in job.inputs], job.parts
                    )
                    worker.calls[call] = (job, time.monotonic() + self._seconds)
                    queue = suspects or jobs
            for job, result in self._ended():
                if isinstance(result, list):
                    for index, found in zip(job.inputs, result, strict=True):
                        keep(index, found)
                elif result is not None and len(job.inputs) * len(job.parts) == 1:
                    keep(job.inputs[0], ScoredTerms(failures=(result,)))
                else:
                    suspects.extend(job.pieces())

    def counts(self) -> dict[str, float]:
        """A remote term's own counts (see `RemoteWorker`); none where it does not answer now."""
        try:
            actor = self._workers[0].actor
            found: dict[str, float] = ray.get(actor.counts.remote(), timeout=LOOP_SECONDS)
        except (GetTimeoutError, RayActorError):
            return {}  # a term that hangs or died is met, and counted, by the next `score`
        return found

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
        self, worker: _Worker, ended: Collection[Any]
    ) -> Iterator[tuple[_Job, list[ScoredTerms] | TermFailure | None]]:
        lost: list[_Job | None] = []
        why: tuple[FailureKind, str] = ("worker_died", "")
        for call in [call for call in worker.calls if call in ended]:
            job, _ = worker.calls.pop(call)
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


def _other_problem(groups: Sequence[Group], index: int) -> Problem | None:
    """The next problem of the step that is of the same task and shows as many images, others."""
    mine = groups[index].problem
    for offset in range(1, len(groups)):
        other = groups[(index + offset) % len(groups)].problem
        alike = other.task == mine.task and len(other.images) == len(mine.images)
        if alike and other.images != mine.images:
            return other
    return None
