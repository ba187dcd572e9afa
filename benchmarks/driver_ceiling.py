"""How many rollouts a second can the driver handle, and does a step take the longer of two times?

    python -m benchmarks.driver_ceiling              # 8, 64 and 256 samplers
    python -m benchmarks.driver_ceiling --samplers 8 64 256 1024 --orders    # the ceiling alone
    python -m benchmarks.driver_ceiling --samplers 256 --token-ms 20 --orders problem --tails

Pool, buffer, stream and the driver's arithmetic are those of a run; samplers and learner only
take time. A sampler draws `SLOTS` groups at once, as long as its longest response at
`--token-ms` a token; lengths are those of a run of `equipoise demo` (`recorded_lengths.csv`, a
line a group), with `--tails` spread by a log-normal factor. There is no engine and no Ray.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks import machine, tables
from benchmarks.score_rollouts import made_up
from cluster.recipe.recipe import Recipe
from cluster.run.step_metrics import step_metrics
from cluster.run.stream import GroupStream
from cluster.run.train import train_batches
from rewards.compose import Composition, compose_groups
from rewards.scored import ScoredGroup
from rewards.terms import load_term, score_group
from rollout.pool import SamplerPool
from rollout.record import Group, SampleRequest
from rollout.settings import Order, SamplerConfig
from tasks.core import Problem
from tasks.load import load_task

LENGTHS = Path(__file__).with_name("recorded_lengths.csv")
GROUP = 8
SLOTS = 4
"""Groups that a sampler draws at once."""
WAVES = 2
"""Groups of a step, in times of what all samplers draw at once."""
STEPS = 8
WARM_STEPS = 2


class Simulation:
    """Time for all samplers: one thread that ends what is due."""

    def __init__(self, seconds: Sequence[float], templates: Sequence[Group]) -> None:
        """`seconds` a group, in turn; none: at once."""
        self.version = 0
        self._seconds = itertools.cycle(seconds) if len(seconds) else None
        self._templates = itertools.cycle(templates)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), then))
            self._changed.notify()

    def next_seconds(self) -> float | None:
        return next(self._seconds) if self._seconds else None

    def group(self, request: SampleRequest, version: int) -> Group:
        """A group with the responses of a template."""
        rollouts = tuple(
            replace(
                rollout,
                rollout_id=f"{request.group_id}/{index}",
                group_id=request.group_id,
                versions=np.full(len(rollout.response_ids), version, np.int32),
            )
            for index, rollout in enumerate(next(self._templates).rollouts)
        )
        return Group(request.group_id, request.problem, rollouts)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    seconds = self._due[0][0] - time.monotonic() if self._due else None
                    self._changed.wait(seconds)
                _, _, then = heapq.heappop(self._due)
            then()


class SimulatedSampler:
    """One sampler as the pool talks to it (`rollout.pool.PoolClient`)."""

    def __init__(self, name: str, simulation: Simulation) -> None:
        self.name, self._simulation = name, simulation
        self._free, self._waiting = SLOTS, deque[tuple[SampleRequest, Future[Any]]]()

    def call(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if method != "answer":
            future.set_result((1 << 20, None) if method == "ready" else None)
        else:
            self._simulation.after(0.0, lambda: self._begin(args[0], future))
        return future

    def _begin(self, request: SampleRequest, future: Future[Any]) -> None:
        """On the simulation's thread, as all that changes a sampler."""
        seconds = self._simulation.next_seconds()
        if seconds is None:
            future.set_result(self._simulation.group(request, self._simulation.version))
        elif not self._free:
            self._waiting.append((request, future))
        else:
            self._free -= 1
            version = self._simulation.version
            self._simulation.after(seconds, lambda: self._end(request, future, version))

    def _end(self, request: SampleRequest, future: Future[Any], version: int) -> None:
        self._free += 1
        if self._waiting:
            self._begin(*self._waiting.popleft())
        future.set_result(self._simulation.group(request, version))

    def wait(self, future: Future[Any], seconds: float) -> Any:
        return future.result(seconds)

    def watch(self, future: Future[Any], then: Callable[[Any], None]) -> None:
        future.add_done_callback(lambda reply: then(reply.result()))

    def cancel(self, future: Future[Any]) -> None:
        pass

    def kill(self) -> None:
        pass


class Drawn:
    """Problems that were drawn before: what drawing takes is not asked here."""

    weight = 1.0

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = problems

    def problem(self, split: str, seed: int, index: int) -> Problem:
        return self._problems[index % len(self._problems)]


class Driver:
    """A run without its actors: `step` is what `run_training` does in a step."""

    def __init__(
        self,
        samplers: int,
        staleness: int,
        order: str,
        seconds: Sequence[float],
        templates: Sequence[Group],
        in_flight: str = "keep",
    ) -> None:
        self.recipe = recipe_of(samplers, staleness, order, in_flight)
        self._simulation = Simulation(seconds, templates)
        limits = SamplerConfig(max_num_seqs=SLOTS * GROUP)
        self._pool = SamplerPool(
            lambda name: SimulatedSampler(name, self._simulation), samplers, limits
        )
        self._pool.wait_ready(60)
        source: Any = Drawn([t.problem for t in templates])
        self.stream = GroupStream(self.recipe, lambda: [source], self._pool)
        self._scores = scored(templates)
        self.version = 0
        self.groups: list[Group] = []
        self.seconds: dict[str, float] = {}

    def step(self, learning: float) -> float:
        """Seconds of one step whose scoring and update take `learning` in other processes."""
        begin = time.perf_counter()
        self.groups = groups = self.stream.take(self.version)
        taken_at = time.perf_counter()
        like = itertools.cycle(self._scores)
        rewarded = [replace(score, group=group) for score, group in zip(like, groups, strict=False)]
        step_metrics(rewarded, self.version)
        train_batches(self.recipe.algorithm, rewarded)
        done_at = time.perf_counter()
        time.sleep(max(0.0, learning - (done_at - taken_at)))
        self.version += 1
        self.stream.renew(self._send, self.version)
        self.seconds = {"take": taken_at - begin, "arithmetic": done_at - taken_at}
        return time.perf_counter() - begin

    def _send(self, version: int) -> None:
        self._simulation.version = version
        self._pool.holds(version, self._pool.clients)

    def stop(self) -> None:
        self.stream.end()
        self._pool.stop()


def recipe_of(samplers: int, staleness: int, order: str, in_flight: str) -> Recipe:
    """What the driver reads of a recipe."""
    return Recipe.model_validate(
        {
            "name": "ceiling",
            "model": {"path": "none", "max_model_len": 4096},
            "sampler": {"max_tokens": 2048},
            "tasks": [{"name": "sudoku"}],
            "algorithm": {
                "group_size": GROUP,
                "problems_per_step": samplers * SLOTS * WAVES,
                "steps": 1000,
                "max_staleness": staleness,
                "order": order,
            },
            "transfer": {"in_flight": in_flight},
        }
    )


def scored(groups: Sequence[Group]) -> list[ScoredGroup]:
    """The templates as reward workers return them."""
    term = load_term("outcome")
    terms = [score_group(load_task(g.problem.task), g, {"outcome": term}) for g in groups]
    return compose_groups(groups, terms, Composition({"outcome": 1.0}))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--tails", action="store_true", help="spread the recorded lengths")
    parser.add_argument("--token-ms", type=float, default=5.0)
    parser.add_argument("--orders", nargs="*", default=get_args(Order), choices=get_args(Order))
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    parser.add_argument("--busy-ok", action="store_true", help="run beside other work all the same")
    args = parser.parse_args()
    machine.refuse_if_busy(args.busy_ok)
    rng = np.random.default_rng(0)
    recorded = np.loadtxt(LENGTHS, delimiter=",").max(axis=1)
    longest = recorded * (rng.lognormal(0.0, 0.7, len(recorded)) if args.tails else 1.0)
    seconds = (longest * args.token_ms / 1e3).tolist()
    templates = made_up(64, seed=0)
    print(f"{GROUP} rollouts a group; longest response of a group: {longest.mean():.0f} tokens in "
          f"the mean, {longest.max():.0f} at most; {args.token_ms:g} ms a token")  # fmt: skip
    for samplers in args.samplers:
        per_step = samplers * SLOTS * WAVES * GROUP
        tables.keep("driver", ["samplers"], [ceiling(samplers, per_step, templates)], args.to)
        for order in args.orders:
            overlap(samplers, order, seconds, templates)


def ceiling(samplers: int, per_step: int, templates: Sequence[Group]) -> tables.Row:
    """Samplers that answer at once, a learner that takes no time: what is left is the driver."""
    shared = machine.Shared()
    driver = Driver(samplers, 1, "problem", (), templates)
    steps = [(driver.step(0.0), driver.seconds) for _ in range(STEPS)][WARM_STEPS:]
    driver.stop()
    whole = [seconds for seconds, _ in steps]
    return {
        "samplers": samplers,
        "rollouts a step": f"{per_step:,}",
        "ceiling, rollouts/s": f"{per_step / statistics.median(whole):,.0f}",
        "step, s": tables.spread(whole, 3),
        "pool, buffer, simulation, s": tables.spread([p["take"] for _, p in steps], 3),
        "metrics, batches, s": tables.spread([p["arithmetic"] for _, p in steps], 3),
        "foreign": f"{shared.foreign():.0%}",
        "machine": machine.where(),
        "command": machine.command("benchmarks.driver_ceiling"),
    }


def overlap(
    samplers: int, order: str, seconds: Sequence[float], templates: Sequence[Group]
) -> None:
    """Step time with staleness 1 against the longer of sampling and learning alone.

    Sampling alone is to a step's last group, as without staleness. Where the next step's groups
    fill the tail it is shorter: told as `ahead`, and why a step can be shorter than the longer.
    """
    sampling, ahead = (
        alone(samplers, staleness, order, seconds, templates) for staleness in (0, 1)
    )
    print(f"  order {order}: sampling {sampling:.2f} s to its last group, {ahead:.2f} s ahead")
    for share in (0.5, 1.0, 2.0):
        learning = share * sampling
        driver = Driver(samplers, 1, order, seconds, templates)
        step = statistics.mean([driver.step(learning) for _ in range(STEPS)][WARM_STEPS:])
        counts = driver.stream.metrics()
        driver.stop()
        longer = max(sampling, learning)
        print(
            f"    learning {learning:.2f} s: a step {step:.2f} s = {step / longer:.2f} x the "
            f"longer; without staleness {sampling + learning:.2f} s; "
            f"{counts['buffer/resampled']:.0f} groups too old"
        )


def alone(
    samplers: int,
    staleness: int,
    order: str,
    seconds: Sequence[float],
    templates: Sequence[Group],
) -> float:
    """Seconds of a step whose update takes no time."""
    driver = Driver(samplers, staleness, order, seconds, templates)
    mean_seconds = statistics.mean([driver.step(0.0) for _ in range(STEPS)][WARM_STEPS:])
    driver.stop()
    return mean_seconds


if __name__ == "__main__":
    main()
