"""Scores groups: terms that compute, terms that ask a model, terms that wait for others.

One call of `RewardPool.score` is one pass: workers run every computing term and let the asking
terms ask; samplers answer; workers read the answers. Remote terms run beside it. Whatever a term
does (raises, hangs, ends its process, eats memory, returns nonsense) becomes a typed failure of
that term on that group, and the recipe says what follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from rewards.advantages import Advantages, Estimator
from rewards.compose import Composition, compose_groups, raise_if_fatal
from rewards.episodes import environment_failures
from rewards.processes import Keep, Workers
from rewards.scored import (
    DIAGNOSIS,
    Answerer,
    ModelRequest,
    Reply,
    RewardError,
    ScoredGroup,
    ScoredTerms,
    TermError,
    TermFailure,
)
from rewards.settings import RewardConfig
from rewards.terms import facts_of
from rollout.record import Group, ReplyError
from tasks.core import Problem

Placed = Callable[[Literal["reward worker", "reward model"], int], Mapping[str, Any]]


class RewardPool:
    """Scores groups on worker processes as a recipe says."""

    def __init__(
        self,
        config: RewardConfig,
        estimator: Estimator | Advantages = "grpo",
        answerers: Mapping[str, Answerer] | None = None,
        placed: Placed = lambda role, index: {},
        drops_failed_episodes: bool = False,
    ) -> None:
        """Start the workers and wait until their terms are loaded.

        `answerers`: for asking terms, model -> samplers; "" is the current policy.
        `placed`: where the "reward worker" or "reward model" of a number is to be, as options of
        its actor; a remote term without a model is one worker more than there are.
        `drops_failed_episodes`: nothing is learnt from a group in which an environment failed.

        Raises `RewardError` if a worker cannot start, with the reason (an unknown term, say),
        and ValueError for a composition that makes no sense.
        """
        self._config, self._drops = config, drops_failed_episodes
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
        self._workers = Workers(
            config,
            [self._entries[name] for name in local],
            [placed("reward worker", index) for index in range(config.workers)],
        )
        models = [name for name, term in terms.items() if term.weights]
        self._remote = {
            name: Workers(
                config,
                [self._entries[name]],
                [
                    placed("reward model", models.index(name))
                    if name in models
                    else placed("reward worker", config.workers)
                ],
                name,
                term,
            )
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
        name_of = {entry.entry: name for name, entry in entries.items()}
        return Composition(
            weights={name: entry.weight_at(progress) for name, entry in entries.items()},
            method=self._config.compose,
            estimator=self._estimator,
            on_failure={name: entry.on_failure for name, entry in entries.items()}
            | ({"environment": "drop_group"} if self._drops else {}),
            credit={name: entry.segments for name, entry in entries.items()},
            gates={
                name: (name_of[entry.gate], entry.gate_threshold)
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
        scored = [
            ScoredTerms(failures=environment_failures(group) if self._drops else ())
            for group in groups
        ]

        def keep(index: int, terms: ScoredTerms) -> None:
            raise_if_fatal(terms.failures, groups[index], composition)
            scored[index].add(terms)

        def keep_of_step(_: int, terms: ScoredTerms) -> None:
            for index, part in enumerate(terms.parted([len(g.rollouts) for g in groups])):
                keep(index, part)

        def wait_for(name: str) -> list[tuple[int, ScoredTerms]]:
            """The results of a remote term, to be kept by the caller's thread."""
            results: list[tuple[int, ScoredTerms]] = []
            self._remote[name].run("score", groups, (name,), lambda *each: results.append(each))
            return results

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
        for index, terms in enumerate(scored):
            for name, requests in terms.requests.items():
                of_model.setdefault(self._asking[name], []).append((index, name, requests))

        def ask(model: str) -> tuple[Iterator[Reply | ReplyError], float]:
            """What a model answers, and the seconds it took."""
            flat = [request for _, _, requests in of_model[model] for request in requests]
            start = time.perf_counter()
            answers = self._answerers[model].answer(flat, self._config.answer_seconds)
            return iter(answers), time.perf_counter() - start

        with ThreadPoolExecutor(max(1, len(of_model))) as threads:
            answers_of_models = list(threads.map(ask, of_model))
        for mine, (answers, waited) in zip(of_model.values(), answers_of_models, strict=True):
            for index, name, requests in mine:
                answers_of_term = [next(answers) for _ in requests]
                failed = tuple(
                    TermFailure(
                        name,
                        "deadline" if reply.kind == "deadline" else "model",
                        f"{reply.request_id}: {reply.message}",
                    )
                    for reply in answers_of_term
                    if isinstance(reply, ReplyError)
                )
                keep(index, ScoredTerms(failures=failed[:1], seconds={name: waited}))
                if not failed:
                    replies[index][name] = [
                        r for r in answers_of_term if not isinstance(r, ReplyError)
                    ]
        answered = [index for index, of_terms in enumerate(replies) if of_terms]
        self._workers.run(
            "read",
            [(groups[i], replies[i]) for i in answered],
            tuple(self._asking),
            lambda index, terms: keep(answered[index], terms),
        )


def _other_problem(groups: Sequence[Group], index: int) -> Problem | None:
    """The next problem of the step that is of the same task and shows as many images, others."""
    mine = groups[index].problem
    for offset in range(1, len(groups)):
        other = groups[(index + offset) % len(groups)].problem
        alike = other.task == mine.task and len(other.images) == len(mine.images)
        if alike and other.images != mine.images:
            return other
    return None
