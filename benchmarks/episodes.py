"""Does an engine wait for its environments? Its idle share while each answer takes a second.

    python -m benchmarks.episodes
    python -m benchmarks.episodes --size 30M --groups 8 32 --workers 16 64 --seconds 1

One sampler's engine in this process, untrained policies of three sizes whose turns go on to their
cap, groups of 8 episodes of three turns; the environment sleeps, and asks for another turn as long
as there is one. A group that ends is followed by the next, so that as many as `--groups` says are
in flight. Idle is the share of the wall time in which the engine took no step, from the first group
that ended to the last that began.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, tables
from benchmarks.policies import SIZES, write_unending
from benchmarks.race_work import GROUP, KNOBS, TASK
from benchmarks.slow_environment import TURNS
from rollout.engine import Engine
from rollout.engine_thread import EngineThread
from rollout.environments import EnvironmentPool
from rollout.record import SampleRequest, Sampling
from rollout.settings import EnvironmentConfig, ModelConfig, SamplerConfig
from tasks.load import load_task
from tasks.splits import draw_problem

KEYS = ("size", "seconds", "groups", "workers")
TOKENS = 32
"""Of a turn, in the mean; an episode that has more than four times its share is cut."""
FOLLOWERS = 3
"""Groups that follow each other in one place of the flight."""


TAKE_STEP = EngineThread._step


class Busy:
    """When an engine took steps from now on: (begin, end) in seconds."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

        def timed(thread: EngineThread, llm: Any) -> None:
            began = time.perf_counter()
            TAKE_STEP(thread, llm)
            self.steps.append((began, time.perf_counter()))

        EngineThread._step = timed  # type: ignore[method-assign]

    def idle(self, begin: float, end: float) -> float:
        """The share of the time between two moments that no step covers."""
        inside = (min(end, done) - max(begin, began) for began, done in self.steps)
        return 1 - sum(max(0.0, seconds) for seconds in inside) / (end - begin)


class Flight:
    """Groups in flight: when the first of all ended, and the last began."""

    def __init__(self) -> None:
        self.first_end, self.last_begin, self.tokens = float("inf"), 0.0, 0

    async def follow(self, engine: Engine, requests: Sequence[SampleRequest], *rest: Any) -> None:
        """One group after the other."""
        for request in requests:
            self.last_begin = max(self.last_begin, time.perf_counter())
            done = await engine.converse(request, *rest)
            self.first_end = min(self.first_end, time.perf_counter())
            failures = [r.failure for r in done.rollouts if r.failure]
            assert not failures, failures[0]
            self.tokens += sum(len(r.response_ids) for r in done.rollouts)


async def sample(engine: Engine, groups: int, workers: int, seconds: float) -> Flight:
    """Sample `FOLLOWERS` times as many groups as are in flight at once."""
    config = EnvironmentConfig(
        name="benchmarks.slow_environment:Slow",
        args={"seconds": seconds},
        turns=TURNS,
        workers=workers,
        step_seconds=60,
        seconds=600,
    )
    task: Any = load_task(TASK)
    pool = EnvironmentPool(config)
    requests = [
        SampleRequest(
            f"{groups}-{workers}-{n}",
            draw_problem(task, task.spec(**KNOBS), "train", 0, n),
            GROUP,
            Sampling(max_tokens=4 * TURNS * TOKENS),
            environment=config,
        )
        for n in range(groups * FOLLOWERS)
    ]
    flight = Flight()
    lines = [requests[n::groups] for n in range(groups)]
    try:
        await asyncio.gather(*(flight.follow(engine, line, task, pool) for line in lines))
    finally:
        pool.close()
    return flight


def measured(
    size: str, groups: Sequence[int], workers: Sequence[int], seconds: float, threads: int
) -> list[tables.Row]:
    """A row for each number of groups in flight and of processes."""
    with tempfile.TemporaryDirectory() as scratch:
        parameters = write_unending(size, Path(scratch), mean_turn=TOKENS)
        engine = Engine.start(
            ModelConfig(path=scratch, max_model_len=1024),
            SamplerConfig(
                max_tokens=4 * TURNS * TOKENS, threads=threads, kv_cache_gib=2.0, max_num_seqs=512
            ),
        )
        rows = [
            _row(engine, size, parameters, many, processes, seconds)
            for many in groups
            for processes in workers
        ]
        engine.shutdown()
    return rows


def _row(
    engine: Engine, size: str, parameters: int, groups: int, workers: int, seconds: float
) -> tables.Row:
    shared, busy = machine.Shared(), Busy()
    flight = asyncio.run(sample(engine, groups, workers, seconds))
    begin, end = flight.first_end, flight.last_begin
    row = {
        "size": size,
        "parameters": f"{parameters:,}",
        "seconds": seconds,
        "groups": groups,
        "workers": workers,
        "episodes": groups * GROUP,
        "idle share of the engine": f"{busy.idle(begin, end):.3f}",
        "of seconds": f"{end - begin:.1f}",
        "tokens in all": f"{flight.tokens:,}",
        "foreign": f"{shared.foreign():.0%}",
        "machine": machine.where(),
        "command": machine.command("benchmarks.episodes"),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="30M")
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 16], help="in flight")
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64], help="processes")
    parser.add_argument("--seconds", type=float, default=1.0, help="of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    parser.add_argument("--busy-ok", action="store_true", help="run beside other work all the same")
    given = parser.parse_args()
    machine.refuse_if_busy(given.busy_ok)
    rows = measured(given.size, given.groups, given.workers, given.seconds, given.threads)
    tables.keep("episodes", KEYS, rows, given.to)
    os._exit(0)  # vLLM's threads would hold the process


if __name__ == "__main__":
    main()
