"""The actors terms run in: processes of their own, with a limit on their memory.

`RewardWorker` runs terms that compute, one chunk of groups a call. `RemoteWorker` runs one term
that waits for others, many groups at once on one event loop.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence

import ray

from rewards.scored import DIAGNOSIS, Reply, ScoredTerms
from rewards.terms import (
    RemoteTerm,
    Term,
    TermSpec,
    is_remote,
    load_terms,
    read_replies,
    score_group,
    score_remote,
)
from rollout.record import Group
from tasks.core import Problem, Task
from tasks.load import load_task

Replies = Mapping[str, Sequence[Reply]]
"""Asking term -> a reply a request."""


class RewardWorker:
    """Terms that compute, the tasks their groups name, and nothing else."""

    def __init__(self, specs: Sequence[TermSpec], memory_gib: float) -> None:
        self.specs = specs
        self.terms: dict[str, Term] = {}
        self.tasks: dict[str, Task] = {}
        limit_memory(memory_gib)

    @ray.method(max_task_retries=-1)
    def ready(self) -> list[str]:
        """Load the terms in this process and name them; the first call after any start.

        Not done in `__init__`: an error there costs the actor and arrives as a wall of text.
        """
        self.terms = load_terms(self.specs)
        return list(self.terms)

    def score(
        self, chunk: Sequence[tuple[Group, Problem | None]], parts: Sequence[str]
    ) -> list[ScoredTerms]:
        """Run the terms (and the diagnosis) named in `parts` on every group; see `score_group`."""
        terms = {name: term for name, term in self.terms.items() if name in parts}
        return [
            score_group(self._task(group), group, terms, DIAGNOSIS in parts, other)
            for group, other in chunk
        ]

    def read(
        self, chunk: Sequence[tuple[Group, Replies]], parts: Sequence[str]
    ) -> list[ScoredTerms]:
        """Let the asking terms named in `parts` read what they were answered."""
        return [
            read_replies(
                self._task(group),
                group,
                self.terms,
                {name: found for name, found in replies.items() if name in parts},
            )
            for group, replies in chunk
        ]

    def _task(self, group: Group) -> Task:
        name = group.problem.task
        if name not in self.tasks:
            self.tasks[name] = load_task(name)
        return self.tasks[name]


class RemoteWorker:
    """One term that waits for others; its calls share an event loop."""

    def __init__(self, spec: TermSpec, memory_gib: float) -> None:
        self.spec = spec
        limit_memory(memory_gib)

    @ray.method(max_task_retries=-1)
    async def ready(self) -> None:
        """Load the term in this process; the first call after any start."""
        ((self.name, term),) = load_terms([self.spec]).items()
        assert is_remote(term)
        self.term: RemoteTerm = term

    async def score(self, group: Group) -> ScoredTerms:
        """The term on one group: values or a typed failure."""
        return await score_remote(self.name, self.term, load_task(group.problem.task), group)

    async def alive(self) -> bool:
        """Answers whenever the event loop turns."""
        return True

    async def counts(self) -> dict[str, float]:
        """What the term counts of its own calls (requests, retries, ...), since it was loaded."""
        counts = getattr(self.term, "counts", None)
        return {name: float(value) for name, value in counts().items()} if counts else {}


def limit_memory(gib: float) -> None:
    """Let this process allocate `gib` more than it holds now; past that it gets a MemoryError.

    The limit is on private writable memory (RLIMIT_DATA): Ray's shared object store is not in it.
    """
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[5]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held + int(gib * 2**30)
    # A machine's own limit may be lower already, and only root could raise it.
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
