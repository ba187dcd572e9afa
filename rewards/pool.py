"""Scores groups: terms that compute, terms that ask a model, terms that wait for others.

One call of `RewardPool.score` is one pass: workers run every computing term and let the asking
terms ask; samplers answer; workers read the answers. Remote terms run beside it. Whatever a term
does (raises, hangs, ends its process, eats memory, returns nonsense) becomes a typed failure of
that term on that group, and the recipe's policy decides.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rewards.advantages import Estimator
from rewards.compose import Composition, Method, RewardRule, compose_groups, raise_if_fatal
from rewards.scored import (
    DIAGNOSIS,
    FailureKind,
    ModelRequest,
    Reply,
    RewardError,
    ScoredGroup,
    ScoredTerms,
    TermError,
    TermFailure,
)
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


class Answerer(Protocol):
    """Samplers, as rewards see them (`rollout.sampler.SamplerPool`)."""

    def answer(
        self, requests: Sequence[ModelRequest], seconds: float
    ) -> Sequence[Reply | ReplyError]:
        """One reply a request, in order; what fails or is not there in time is a ReplyError."""


@dataclass(frozen=True)
class Limits:
    """What a term may take. Seconds of wall time, GiB a worker, groups in flight."""

    deadline_seconds: float = 60.0
    """One call of computing terms: a chunk of groups, or one group and term on a retry."""
    answer_seconds: float = 600.0
    """All requests of a step to one model."""
    remote_seconds: float = 300.0
    """One group at a remote term."""
    remote_in_flight: int = 8
    memory_gib: float = 4.0


class RewardPool:
    """Scores groups on worker processes under a recipe's composition and failure policies."""

    def __init__(
        self,
        rules: Sequence[RewardRule],
        method: Method = "sum_then_normalize",
        estimator: Estimator = "grpo",
        workers: int = 1,
        limits: Limits | None = None,
        answerers: Mapping[str, Answerer] | None = None,
    ) -> None:
        """Start the workers and wait until their terms are loaded.

        `answerers`: for asking terms, model -> samplers; "" is the current policy.

        Raises `RewardError` if a worker cannot start, with the reason (an unknown term, say),
        and ValueError for a composition that makes no sense.
        """
        self._limits = limits or Limits()
        self._answerers = dict(answerers or {})
        try:
            terms = facts_of(rules)
        except TermError as error:
            raise RewardError(f"a reward worker cannot start: {error}") from error
        self._rules = dict(zip(terms, rules, strict=True))
        self._asking = {n: t.model for n, t in terms.items() if t.model is not None}
        unknown = sorted(set(self._asking.values()) - set(self._answerers))
        if unknown:
            raise RewardError(f"reward terms ask {unknown}, and no sampler runs such a model")
        self._remote = [
            _RemoteTerm(name, self._rules[name], self._limits)
            for name, term in terms.items()
            if term.remote
        ]
        local = [name for name, term in terms.items() if not term.remote]
        self._parts = (*local, DIAGNOSIS)
        self._method: Method = method
        self._estimator: Estimator = estimator
        self.composition_at(0.0)
        self._workers = _Workers([self._rules[n] for n in local], workers, self._limits)
        for remote in self._remote:
            remote.wait_ready()

    @property
    def restarts(self) -> int:
        """Workers that died or were ended since the pool was made."""
        return self._workers.restarts + sum(remote.restarts for remote in self._remote)

    def composition_at(self, progress: float) -> Composition:
        """How terms count at a share of the run in [0, 1]."""
        named = {rule.label or rule.name: name for name, rule in self._rules.items()}
        return Composition(
            weights={name: rule.weight_at(progress) for name, rule in self._rules.items()},
            method=self._method,
            estimator=self._estimator,
            on_failure={name: rule.on_failure for name, rule in self._rules.items()},
            credit={name: rule.segments for name, rule in self._rules.items()},
            gates={
                name: (named[rule.gate], rule.gate_threshold)
                for name, rule in self._rules.items()
                if rule.gate is not None
            },
        )

    def score(self, groups: Sequence[Group], progress: float = 0.0) -> list[ScoredGroup]:
        """Score groups, in order, with the weights of `progress` (a share of the run).

        Raises `RewardError` when a term fails under the policy `abort`, or a worker does not
        start again; the pool is closed then.
        """
        composition = self.composition_at(progress)
        pieces: list[list[ScoredTerms]] = [[] for _ in groups]

        def keep(index: int, piece: ScoredTerms) -> None:
            raise_if_fatal(piece.failures, groups[index], composition)
            pieces[index].append(piece)

        with ThreadPoolExecutor(1 + len(self._remote)) as threads:
            remote = [threads.submit(term.score, groups) for term in self._remote]
            try:
                others = [_other_problem(groups, i) for i in range(len(groups))]
                pairs = list(zip(groups, others, strict=True))
                self._workers.run("score", pairs, self._parts, keep)
                self._ask_and_read(groups, pieces, keep)
                for found in remote:
                    for index, piece in enumerate(found.result()):
                        keep(index, piece)
            except BaseException:
                self.close()  # also ends the calls that the threads wait for
                raise
        return compose_groups(groups, [_merge(found) for found in pieces], composition)

    def counts(self) -> dict[str, float]:
        """What remote terms count, as `<term>/calls/<name>`, since the process of each started."""
        return {
            f"{remote.name}/calls/{name}": value
            for remote in self._remote
            for name, value in remote.counts().items()
        }

    def close(self) -> None:
        """End every worker process."""
        self._workers.close()
        for remote in self._remote:
            remote.close()

    def _ask_and_read(
        self,
        groups: Sequence[Group],
        pieces: Sequence[Sequence[ScoredTerms]],
        keep: Callable[[int, ScoredTerms], None],
    ) -> None:
        asked = [
            (index, name, requests)
            for index, found in enumerate(pieces)
            for piece in found
            for name, requests in piece.requests.items()
        ]
        replies: list[dict[str, Sequence[Reply]]] = [{} for _ in groups]
        of_model: dict[str, list[tuple[int, str, Sequence[ModelRequest]]]] = {}
        for each in asked:
            of_model.setdefault(self._asking[each[1]], []).append(each)

        def ask(model: str) -> tuple[Sequence[Reply | ReplyError], float]:
            """What a model answers, and the seconds it took."""
            flat = [request for _, _, requests in of_model[model] for request in requests]
            start = time.perf_counter()
            answers = self._answerers[model].answer(flat, self._limits.answer_seconds)
            return answers, time.perf_counter() - start

        with ThreadPoolExecutor(max(1, len(of_model))) as threads:
            told = list(threads.map(ask, of_model))
        for mine, (given_all, waited) in zip(of_model.values(), told, strict=True):
            answers = iter(given_all)
            for index, name, requests in mine:
                given = [next(answers) for _ in requests]
                keep(index, ScoredTerms({}, (), {name: waited}, None))
                broken = next((reply for reply in given if isinstance(reply, ReplyError)), None)
                if broken is None:
                    replies[index][name] = [r for r in given if not isinstance(r, ReplyError)]
                    continue
                kind: FailureKind = "deadline" if broken.kind == "deadline" else "model"
                failure = TermFailure(name, kind, f"{broken.request_id}: {broken.message}")
                keep(index, ScoredTerms({}, (failure,), {}, None))
        answered = [index for index, found in enumerate(replies) if found]
        self._workers.run(
            "read",
            [(groups[i], replies[i]) for i in answered],
            tuple(self._asking),
            lambda place, piece: keep(answered[place], piece),
        )


@dataclass(frozen=True)
class _Job:
    inputs: tuple[int, ...]
    parts: tuple[str, ...]


class _Slot:
    """One worker and its only call in flight; `job` is None while the process starts."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.start()

    def start(self) -> None:
        self.job: _Job | None = None
        self.call: Any = self.actor.ready.remote()
        self.until = time.monotonic() + START_SECONDS

    def give(self, method: str, job: _Job, inputs: Sequence[Any], seconds: float) -> None:
        self.job = job
        chunk = [inputs[i] for i in job.inputs]
        self.call = getattr(self.actor, method).remote(chunk, job.parts)
        self.until = time.monotonic() + seconds


class _Workers:
    """The processes of the computing terms; each has one small chunk of groups at a time.

    A chunk that dies or passes its deadline is tried again piece by piece, one group and one
    term a call, so the blame falls on exactly one term and everything else gets its values.
    """

    def __init__(self, specs: Sequence[RewardRule], count: int, limits: Limits) -> None:
        self.restarts = 0
        self._limits = limits
        actor = ray.remote(RewardWorker).options(num_cpus=0, max_restarts=-1)
        plain = [_Spec.of(spec) for spec in specs]
        self._slots = [_Slot(actor.remote(plain, limits.memory_gib)) for _ in range(count)]
        while any(slot.call is not None for slot in self._slots):
            self._wait()

    def run(
        self,
        method: str,
        inputs: Sequence[Any],
        parts: tuple[str, ...],
        keep: Callable[[int, ScoredTerms], None],
    ) -> None:
        """Call `method(chunk, parts)` over all inputs; `keep` gets each input's pieces."""
        every = range(len(inputs))
        queue = deque(_Job(tuple(every[i : i + CHUNK]), parts) for i in every[::CHUNK])
        while queue or any(slot.job for slot in self._slots):
            for slot in self._slots:
                if queue and slot.call is None:
                    slot.give(method, queue.popleft(), inputs, self._limits.deadline_seconds)
            for job, result in self._wait():
                if isinstance(result, list):
                    for index, piece in zip(job.inputs, result, strict=True):
                        keep(index, piece)
                elif len(job.inputs) * len(job.parts) > 1:
                    queue.extend(_Job((i,), (part,)) for i in job.inputs for part in job.parts)
                else:
                    keep(job.inputs[0], ScoredTerms({}, (result,), {}, None))

    def close(self) -> None:
        for slot in self._slots:
            ray.kill(slot.actor)

    def _wait(self) -> list[tuple[_Job, list[ScoredTerms] | TermFailure]]:
        """Wait until a call ends or is due; the jobs that ended, with values or the failure.

        Raises `RewardError` for a worker that does not start.
        """
        busy = [slot for slot in self._slots if slot.call is not None]
        first_due = min(slot.until for slot in busy)
        calls = [slot.call for slot in busy]
        ray.wait(calls, timeout=max(0.0, first_due - time.monotonic()))
        ended, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        results = []
        for slot in busy:
            if slot.call not in ended and time.monotonic() < slot.until:
                continue
            job, result = slot.job, self._collect(slot, slot.call in ended)
            if job is not None:
                results.append((job, result))
            elif isinstance(result, TermFailure):
                raise RewardError(f"a reward worker cannot start: {result.message}")
        return results

    def _collect(self, slot: _Slot, ended: bool) -> Any:
        """The result of a call that ended or is overdue; the slot is free or starting then."""
        term = slot.job.parts[0] if slot.job else ""
        if not ended:
            ray.kill(slot.actor, no_restart=False)
            waited = self._limits.deadline_seconds if slot.job else START_SECONDS
            self._restart(slot)
            return TermFailure(term, "deadline", f"no result within {waited:g} s")
        try:
            result = ray.get(slot.call)
        except RayTaskError as error:
            # Not a term's own exception (those are values here): the term file cannot be
            # loaded, or something in the group cannot be unpickled.
            result = TermFailure(term, "exception", str(error.cause), str(error))
        except RayError as error:
            result = TermFailure(term, "worker_died", str(error))
            self._restart(slot)
            return result
        slot.call, slot.job = None, None
        return result

    def _restart(self, slot: _Slot) -> None:
        self.restarts += 1
        slot.start()


class _RemoteTerm:
    """One remote term's actor and the groups it has in flight, at most `remote_in_flight`."""

    def __init__(self, name: str, rule: RewardRule, limits: Limits) -> None:
        self.name = name
        self.restarts = 0
        self._limits = limits
        self._closed = False
        options = {
            "num_cpus": 0,
            "max_restarts": -1,
            "max_concurrency": limits.remote_in_flight + 2,
        }
        self._actor = (
            ray.remote(RemoteWorker).options(**options).remote(_Spec.of(rule), limits.memory_gib)
        )
        self._ready = self._actor.ready.remote()

    def wait_ready(self) -> None:
        """Block until the term is loaded; raises RewardError with the reason if it cannot be."""
        try:
            ray.get(self._ready, timeout=START_SECONDS)
        except RayTaskError as error:
            raise RewardError(f"reward term {self.name!r} cannot start: {error.cause}") from error
        except RayError as error:
            raise RewardError(f"reward term {self.name!r} cannot start: {error}") from error

    def score(self, groups: Sequence[Group]) -> list[ScoredTerms]:
        """The term on every group, in order.

        Where the process dies or its event loop stands still, each group that was in flight is
        given again, alone: then the blame is certain.
        """
        results: dict[int, ScoredTerms] = {}
        queue, suspects = deque(range(len(groups))), deque[int]()
        flying: dict[Any, tuple[int, float]] = {}
        while queue or suspects or flying:
            limit = 1 if suspects else self._limits.remote_in_flight
            while (suspects or queue) and len(flying) < limit:
                index = (suspects or queue).popleft()
                until = time.monotonic() + self._limits.remote_seconds
                flying[self._actor.score.remote(groups[index])] = (index, until)
            first_due = min(until for _, until in flying.values())
            ray.wait(list(flying), timeout=max(0.0, first_due - time.monotonic()))
            ended, _ = ray.wait(list(flying), num_returns=len(flying), timeout=0)
            lost: dict[int, TermFailure] = {}
            for call in ended:
                index, _ = flying.pop(call)
                try:
                    results[index] = ray.get(call)
                except RayTaskError as error:
                    failure = self._failure("exception", str(error.cause), str(error))
                    results[index] = ScoredTerms({}, (failure,), {}, None)
                except RayError as error:
                    lost[index] = self._failure("worker_died", str(error))
            waited = f"no result within {self._limits.remote_seconds:g} s"
            overdue = [call for call, (_, until) in flying.items() if time.monotonic() >= until]
            if overdue and not lost and self._loop_turns():
                for call in overdue:
                    index, _ = flying.pop(call)
                    ray.cancel(call)
                    failure = self._failure("deadline", waited)
                    results[index] = ScoredTerms({}, (failure,), {}, None)
            elif overdue:
                ray.kill(self._actor, no_restart=False)
                lost = {
                    index: self._failure("deadline", waited) for index, _ in flying.values()
                } | lost
                flying.clear()
            if self._closed:
                raise RewardError(f"reward term {self.name!r} was stopped")
            if lost:
                lost |= {index: self._failure("worker_died", "") for index, _ in flying.values()}
                flying.clear()
                if len(lost) == 1:
                    ((index, failure),) = lost.items()
                    results[index] = ScoredTerms({}, (failure,), {}, None)
                else:
                    suspects.extend(lost)
                self.restarts += 1
                self._ready = self._actor.ready.remote()
                self.wait_ready()
        return [results[index] for index in range(len(groups))]

    def _loop_turns(self) -> bool:
        """Whether the actor still answers: a term that waits does, one that blocks does not."""
        try:
            ray.get(self._actor.alive.remote(), timeout=LOOP_SECONDS)
        except RayError:
            return False
        return True

    def counts(self) -> dict[str, float]:
        """The term's own counts (see `RemoteWorker.counts`); none where it does not answer now."""
        try:
            found: dict[str, float] = ray.get(self._actor.counts.remote(), timeout=LOOP_SECONDS)
        except (GetTimeoutError, RayActorError):
            return {}  # a term that hangs or died is met, and counted, by the next `score`
        return found

    def close(self) -> None:
        self._closed = True
        ray.kill(self._actor)

    def _failure(self, kind: FailureKind, message: str, traceback: str = "") -> TermFailure:
        return TermFailure(self.name, kind, message, traceback)


@dataclass(frozen=True)
class _Spec:
    """What a worker needs of a rule: nothing of the recipe's classes has to be unpickled."""

    name: str
    args: Mapping[str, Any]
    label: str | None

    @classmethod
    def of(cls, rule: RewardRule) -> _Spec:
        return cls(rule.name, dict(rule.args), rule.label)


def _other_problem(groups: Sequence[Group], index: int) -> Problem | None:
    """The next problem of the step that is of the same task and shows another image."""
    mine = groups[index].problem
    for offset in range(1, len(groups)):
        other = groups[(index + offset) % len(groups)].problem
        if other.task == mine.task and other.image != mine.image:
            return other
    return None


def _merge(pieces: Sequence[ScoredTerms]) -> ScoredTerms:
    """One record from a group's pieces: the whole, what was answered, one a term after a retry."""
    diagnoses = [piece.diagnosis for piece in pieces if piece.diagnosis is not None]
    seconds: dict[str, float] = {}
    for piece in pieces:
        for name, value in piece.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value  # an asking term has two halves
    return ScoredTerms(
        values={name: v for piece in pieces for name, v in piece.values.items()},
        failures=tuple(failure for piece in pieces for failure in piece.failures),
        seconds=seconds,
        diagnosis=diagnoses[0] if diagnoses else None,
    )
