"""The groups of a run on their way: from its problems to the step that learns from them.

What may be started, what is too old and what was used is the buffer's to know
(`rollout/buffer.py`), who samples it the pool's. Without staleness a step's groups are started
when the step begins and all of them are waited for: the synchronous loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from cluster.recipe.problems import ProblemSource, step_problems
from cluster.recipe.recipe import Recipe
from cluster.run.passes import training_sampling
from rollout.buffer import BufferState, GroupBuffer, GroupBufferError
from rollout.record import Group, SampleRequest
from tasks.core import Problem

DRAWN_STEPS = 8
"""Steps whose problems are kept; an older one's are drawn again."""
Sent = TypeVar("Sent")


class Samplers(Protocol):
    """What the stream needs of a `SamplerPool`."""

    def submit(self, requests: Sequence[SampleRequest]) -> None: ...

    def collect(self, count: int, timeout: float | None = None) -> list[Group]: ...

    def abort(self, group_ids: Iterable[str]) -> None: ...

    def pending(self) -> int: ...


class GroupStream:
    """The groups that a run learns from, step by step, within its staleness bound."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Callable[[], Sequence[ProblemSource]],
        samplers: Samplers,
        steps_done: int = 0,
        state: BufferState | None = None,
    ) -> None:
        """`sources`: those that the next step draws from (`Curriculum.sources`).

        `steps_done` and `state`: of the checkpoint of a run that goes on.
        """
        self._recipe, self._sources, self._samplers = recipe, sources, samplers
        self._buffer = GroupBuffer(recipe.algorithm, recipe.algorithm.steps, steps_done, state)
        self._drawer = ThreadPoolExecutor(1, "problems")
        self._drawn: dict[int, Future[list[SampleRequest]]] = {}
        self._in_flight = 0

    def take(self, version: int) -> list[Group]:
        """The groups of the next step, in the order of their problems.

        Starts what may be started by now and waits until the step is complete. `version` is the
        policy version of learner and samplers. Raises what the pool raises.
        """
        self._buffer.expire(version)
        while True:
            self._start()
            if not (missing := self._buffer.missing()):
                return self._buffer.take(version)
            if not self._keep(self._samplers.collect(missing)):
                raise GroupBufferError(f"{missing} groups are missing, and no sampler has them")
            self._keep(self._complete())
            self._buffer.expire(version)

    def renew(self, send: Callable[[int], Sent], version: int) -> Sent:
        """Send new weights to the samplers while groups are in flight, as the recipe says.

        `keep`: they go on under the new weights. `abort`: they are started again under them.
        `wait`: the transfer waits until they are complete.
        """
        self._keep(self._complete())
        self._in_flight = len(self._buffer.in_flight())
        choice = self._recipe.transfer.in_flight
        if choice == "wait":
            self._keep(self._samplers.collect(len(self._buffer.in_flight())))
        if choice == "abort" and (unfinished := self._buffer.in_flight()):
            self._samplers.abort(unfinished)
            self._buffer.put_back(unfinished)
        sent = send(version)
        self._buffer.step_over()
        return sent

    def end(self) -> None:
        """Drop what is still being sampled: no step will use it."""
        self._samplers.abort(self._buffer.in_flight())
        self._drawer.shutdown()

    def state(self) -> BufferState:
        """For the checkpoint."""
        return self._buffer.state()

    def metrics(self) -> dict[str, float]:
        """Under `buffer/`; see docs/metrics.md."""
        counts = self._buffer.counts() | {
            "in_flight": float(self._in_flight),
            "waiting": float(self._buffer.waiting()),
        }
        return {f"buffer/{name}": value for name, value in counts.items()}

    def _start(self) -> None:
        requests = []
        for position in self._buffer.admit():
            step, index = divmod(position, self._recipe.algorithm.problems_per_step)
            request = self._step_requests(step)[index]
            self._buffer.started(position, request.group_id)
            requests.append(request)
        if requests:
            self._samplers.submit(requests)

    def _complete(self) -> list[Group]:
        """What is complete now, without waiting."""
        return self._samplers.collect(self._samplers.pending(), timeout=0.0)

    def _keep(self, groups: list[Group]) -> list[Group]:
        for group in groups:
            self._buffer.add(group)
        return groups

    def _step_requests(self, step: int) -> list[SampleRequest]:
        """Those of step `step` (from 0); the next step's are drawn while this one is at work.

        But for a curriculum, which weighs them by what this step will show.
        """
        foreseen = self._recipe.algorithm.curriculum.strategy == "uniform"
        for step_drawn in (step, step + 1) if foreseen else (step,):
            if step_drawn not in self._drawn:
                self._drawn[step_drawn] = self._drawer.submit(self._draw_requests, step_drawn)
        while len(self._drawn) > DRAWN_STEPS:
            del self._drawn[min(self._drawn.keys() - {step})]
        return self._drawn[step].result()

    def _draw_requests(self, step: int) -> list[SampleRequest]:
        recipe = self._recipe
        count = recipe.algorithm.problems_per_step
        return free_requests(
            recipe, step + 1, step_problems(self._sources(), recipe.seed, step, count)
        )


def free_requests(
    recipe: Recipe, step: int, problems: Sequence[Problem], first: int = 0
) -> list[SampleRequest]:
    """One group request a problem, ids unique within the run; `step` (from 1) drew them.

    `first`: the position of the first of them in the step.
    """
    size, sampling = recipe.algorithm.group_size, training_sampling(recipe)
    return [
        SampleRequest(
            f"step-{step}/{index}/{problem.id}",
            problem,
            size,
            sampling,
            environment=recipe.environment,
        )
        for index, problem in enumerate(problems, first)
    ]
