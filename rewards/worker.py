"""Terms run in processes of their own: one that crashes, hangs or eats memory harms nobody else.

A pool hands each worker one small chunk of groups at a time. A chunk that dies or passes its
deadline is tried again piece by piece, one group and one term a call, so the blame falls on
exactly one term and everything else still gets its values.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rewards.advantages import Estimator
from rewards.compose import Composition, Method, TermSpec, compose_groups, raise_if_fatal
from rewards.records import DIAGNOSIS, RewardError, ScoredGroup, ScoredTerms, TermFailure
from rewards.terms import RewardTerm, load_terms, score_group
from rollout.record import Group
from tasks.core import Task
from tasks.load import load_task

CHUNK = 8
"""Groups a call: enough to make a call's overhead small, few enough to retry cheaply."""
START_SECONDS = 120.0
"""How long a worker process may take to start, or to start again."""


class RewardWorker:
    """The actor: terms, the tasks its groups name, and nothing else."""

    def __init__(self, specs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        self.specs = specs
        self.terms: list[RewardTerm] = []
        self.tasks: dict[str, Task] = {}

    @ray.method(max_task_retries=-1)
    def ready(self) -> list[str]:
        """Load the terms in this process and name them; the first call after any start.

        Not done in `__init__`: an error there costs the actor and arrives as a wall of text.
        """
        self.terms = load_terms(self.specs)
        return [term.name for term in self.terms]

    def score(self, groups: Sequence[Group], parts: Sequence[str]) -> list[ScoredTerms]:
        """Run the terms (and the diagnosis) named in `parts` on every group."""
        terms = [term for term in self.terms if term.name in parts]
        for name in {group.problem.task for group in groups} - set(self.tasks):
            self.tasks[name] = load_task(name)
        return [
            score_group(self.tasks[group.problem.task], group, terms, DIAGNOSIS in parts)
            for group in groups
        ]


@dataclass(frozen=True)
class _Job:
    groups: tuple[int, ...]
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

    def give(self, job: _Job, groups: Sequence[Group], deadline_seconds: float) -> None:
        self.job = job
        self.call = self.actor.score.remote([groups[i] for i in job.groups], job.parts)
        self.until = time.monotonic() + deadline_seconds


class RewardPool:
    """Scores groups on worker processes under a recipe's composition and failure policy."""

    def __init__(
        self,
        terms: Sequence[TermSpec],
        method: Method = "sum_then_normalize",
        estimator: Estimator = "grpo",
        workers: int = 1,
        deadline_seconds: float = 60.0,
    ) -> None:
        """Start the workers and wait until their terms are loaded; the deadline is a call's.

        Raises `RewardError` if a worker cannot start, with the reason (an unknown term, say),
        and ValueError for a composition that makes no sense.
        """
        self.deadline_seconds = deadline_seconds
        self.restarts = 0
        """Workers that died or were ended since the pool was made."""
        actor = ray.remote(RewardWorker).options(num_cpus=0, max_restarts=-1)
        specs = [(term.name, dict(term.args)) for term in terms]
        self._slots = [_Slot(actor.remote(specs)) for _ in range(workers)]
        starts = [slot.call for slot in self._slots]
        while any(slot.call is not None for slot in self._slots):
            self._wait()
        # A user's class goes by its own `name` from here on, not by "module:Class".
        names: list[str] = ray.get(starts[0])
        self._parts = (*names, DIAGNOSIS)
        self.composition = Composition(
            weights={name: term.weight for name, term in zip(names, terms, strict=True)},
            method=method,
            estimator=estimator,
            on_failure={name: term.on_failure for name, term in zip(names, terms, strict=True)},
        )

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Score groups, in order.

        Raises `RewardError` when a term fails under the policy `abort`, or a worker does not
        start again; the pool is closed then.
        """
        indices = range(len(groups))
        queue = deque(_Job(tuple(indices[i : i + CHUNK]), self._parts) for i in indices[::CHUNK])
        pieces: list[list[ScoredTerms]] = [[] for _ in groups]
        while queue or any(slot.job for slot in self._slots):
            for slot in self._slots:
                if queue and slot.call is None:
                    slot.give(queue.popleft(), groups, self.deadline_seconds)
            for job, result in self._wait():
                if isinstance(result, list):
                    for i, scored in zip(job.groups, result, strict=True):
                        self._end_if_fatal(scored.failures, groups[i])
                        pieces[i].append(scored)
                elif len(job.groups) * len(job.parts) > 1:
                    queue.extend(_Job((i,), (part,)) for i in job.groups for part in job.parts)
                else:
                    self._end_if_fatal((result,), groups[job.groups[0]])
                    pieces[job.groups[0]].append(ScoredTerms({}, (result,), {}, None))
        return compose_groups(groups, [_merge(found) for found in pieces], self.composition)

    def close(self) -> None:
        """End every worker process."""
        for slot in self._slots:
            ray.kill(slot.actor)

    def _end_if_fatal(self, failures: Sequence[TermFailure], group: Group) -> None:
        """Under `abort`, end on the first failure instead of scoring what is left."""
        try:
            raise_if_fatal(failures, group, self.composition)
        except RewardError:
            self.close()
            raise

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
                self.close()
                raise RewardError(f"a reward worker cannot start: {result.message}")
        return results

    def _collect(self, slot: _Slot, ended: bool) -> Any:
        """The result of a call that ended or is overdue; the slot is free or starting then."""
        term = slot.job.parts[0] if slot.job else ""
        if not ended:
            ray.kill(slot.actor, no_restart=False)
            waited = self.deadline_seconds if slot.job else START_SECONDS
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


def _merge(pieces: Sequence[ScoredTerms]) -> ScoredTerms:
    """One record from a group's pieces: the whole, or one piece a term after a retry."""
    diagnoses = [piece.diagnosis for piece in pieces if piece.diagnosis is not None]
    return ScoredTerms(
        values={name: v for piece in pieces for name, v in piece.values.items()},
        failures=tuple(failure for piece in pieces for failure in piece.failures),
        seconds={name: s for piece in pieces for name, s in piece.seconds.items()},
        diagnosis=diagnoses[0] if diagnoses else None,
    )
