"""The actors terms run in: processes of their own, with a limit on their memory.

`RewardWorker` runs terms that compute, one chunk of groups a call. `RemoteWorker` runs one term
that waits for others, many groups at once on one event loop.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import ray

from rewards.scored import DIAGNOSIS, Reply, ScoredTerms
from rewards.settings import RewardTermConfig
from rewards.terms import (
    Term,
    is_remote,
    load_terms,
    read_replies,
    score_group,
    score_remote,
    score_step,
)
from rollout.record import Group
from tasks.core import Problem
from tasks.liveness import listen
from tasks.load import load_task
from tasks.memory import limit_memory

Replies = Mapping[str, Sequence[Reply]]
"""Asking term -> a reply a request."""

task_named = functools.cache(load_task)


class RewardWorker:
    """Terms that compute, the tasks their groups name, and nothing else."""

    def __init__(
        self,
        entries: Sequence[RewardTermConfig],
        memory_gib: float,
        role: str = "reward-worker-0",
    ) -> None:
        listen(role)
        self.entries, self._role = entries, role
        limit_memory(memory_gib)

    def __repr__(self) -> str:
        return self._role  # Ray's dashboard and logs show it

    @functools.cached_property
    def terms(self) -> dict[str, Term]:
        """Loaded when first asked for: a process that Ray has started again was told nothing."""
        return load_terms(self.entries)

    @ray.method(max_task_retries=-1)
    def ready(self) -> None:
        """Load the terms in this process; the first call after any start.

        Not done in `__init__`: an error there costs the actor and arrives as a wall of text.
        """
        _ = self.terms

    def score(
        self, chunk: Sequence[tuple[Group, Problem | None]], parts: Sequence[str]
    ) -> list[ScoredTerms]:
        """Run the terms (and the diagnosis) named in `parts` on every group; see `score_group`."""
        terms = {name: term for name, term in self.terms.items() if name in parts}
        return [
            score_group(task_named(group.problem.task), group, terms, DIAGNOSIS in parts, other)
            for group, other in chunk
        ]

    def score_steps(
        self, steps: Sequence[Sequence[Group]], parts: Sequence[str]
    ) -> list[ScoredTerms]:
        """Run the functions named in `parts` on all groups of each step; see `score_step`."""
        terms = {name: term for name, term in self.terms.items() if name in parts}
        return [score_step(groups, terms) for groups in steps]

    def read(
        self, chunk: Sequence[tuple[Group, Replies]], parts: Sequence[str]
    ) -> list[ScoredTerms]:
        """Let the asking terms named in `parts` read what they were answered."""
        return [
            read_replies(
                task_named(group.problem.task),
                group,
                self.terms,
                {name: of_term for name, of_term in replies.items() if name in parts},
            )
            for group, replies in chunk
        ]


class RemoteWorker:
    """One term that waits for others; its calls share an event loop."""

    def __init__(
        self, entries: Sequence[RewardTermConfig], memory_gib: float, role: str = "reward"
    ) -> None:
        """`memory_gib` 0: no limit."""
        listen(role)
        self.entries, self._role = entries, role
        if memory_gib:
            limit_memory(memory_gib)

    def __repr__(self) -> str:
        return self._role  # Ray's dashboard and logs show it

    @ray.method(max_task_retries=-1)
    async def ready(self) -> None:
        """Load the term in this process; the first call after any start."""
        _ = self.term

    @functools.cached_property
    def _named(self) -> tuple[str, Term]:
        """As `RewardWorker.terms`."""
        ((name, term),) = load_terms(self.entries).items()
        return name, term

    @property
    def name(self) -> str:
        return self._named[0]

    @property
    def term(self) -> Term:
        return self._named[1]

    async def score(self, chunk: Sequence[Group], parts: Sequence[str]) -> list[ScoredTerms]:
        """The term on each group: values or a typed failure."""
        assert is_remote(self.term)
        return [
            await score_remote(self.name, self.term, task_named(group.problem.task), group)
            for group in chunk
        ]

    async def alive(self) -> None:
        """Answers whenever the event loop turns."""

    async def counts(self) -> dict[str, float]:
        """What the term counts of its own calls (requests, retries, ...), since it was loaded."""
        counts = getattr(self.term, "counts", None)
        return {name: float(value) for name, value in counts().items()} if counts else {}
