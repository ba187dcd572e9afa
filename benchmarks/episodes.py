"""Does an engine wait for its environments? Its idle share while each answer takes a second.

    python -m benchmarks.episodes
    python -m benchmarks.episodes --groups 8 32 --workers 16 64 --seconds 1

One sampler's engine in this process, the shipped policy, groups of 8 episodes of at most three
turns; the environment sleeps, and asks for another turn as long as there is one. Idle is the share
of the wall time, from the first step of the engine to the last, in which it took no step.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, tables
from benchmarks.policies import SHIPPED
from benchmarks.race_work import GROUP, KNOBS, TASK
from rollout.engine import Engine
from rollout.engine_thread import EngineThread
from rollout.environments import EnvironmentPool
from rollout.record import SampleRequest, Sampling
from rollout.settings import EnvironmentConfig, ModelConfig, SamplerConfig
from tasks.core import Problem
from tasks.environments import DONE, Observation
from tasks.load import load_task
from tasks.splits import draw_problem

KEYS = ("seconds", "groups", "workers")
TURNS = 3
TOKENS = 256


class Slow:
    """Takes its time, and says so."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds, self.left = seconds, TURNS - 1

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation | None:
        return None

    def step(self, text: str) -> Observation:
        time.sleep(self.seconds)
        self.left -= 1
        return Observation("Go on.") if self.left else DONE


class Busy:
    """When an engine took steps: (begin, end) in seconds."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        take_step = EngineThread._step

        def timed(thread: EngineThread, llm: Any) -> None:
            began = time.perf_counter()
            take_step(thread, llm)
            self.steps.append((began, time.perf_counter()))

        EngineThread._step = timed  # type: ignore[method-assign]

    def idle(self) -> tuple[float, float]:
        """Share without a step between the first and the last since last asked, and seconds."""
        steps, self.steps = self.steps, []
        seconds = steps[-1][1] - steps[0][0]
        return 1 - sum(end - begin for begin, end in steps) / seconds, seconds


async def sample(engine: Engine, groups: int, workers: int, seconds: float, first: int) -> int:
    """Sample groups, as many at once as there are; the number of tokens."""
    config = EnvironmentConfig(
        name="benchmarks.episodes:Slow",
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
            f"{first + n}",
            draw_problem(task, task.spec(**KNOBS), "train", 0, first + n),
            GROUP,
            Sampling(max_tokens=TOKENS),
            environment=config,
        )
        for n in range(groups)
    ]
    try:
        done = await asyncio.gather(*(engine.converse(r, task, pool) for r in requests))
    finally:
        pool.close()
    failures = [r.failure for group in done for r in group.rollouts if r.failure]
    assert not failures, failures[0]
    return sum(len(r.response_ids) for group in done for r in group.rollouts)


def measured(
    groups: Sequence[int], workers: Sequence[int], seconds: float, threads: int
) -> list[tables.Row]:
    """A row for each number of groups at once and of processes."""
    engine = Engine.start(
        ModelConfig(path=str(SHIPPED), max_model_len=512),
        SamplerConfig(max_tokens=TOKENS, threads=threads, kv_cache_gib=1.0, max_num_seqs=256),
    )
    busy, rows, first = Busy(), [], 0
    for many in groups:
        for processes in workers:
            shared = machine.Shared()
            tokens = asyncio.run(sample(engine, many, processes, seconds, first))
            idle, wall = busy.idle()
            first += many
            rows.append(
                {
                    "seconds": seconds,
                    "groups": many,
                    "workers": processes,
                    "episodes": many * GROUP,
                    "idle share of the engine": f"{idle:.3f}",
                    "seconds in all": f"{wall:.1f}",
                    "tokens a second": f"{tokens / wall:,.0f}",
                    "foreign": f"{shared.foreign():.0%}",
                    "machine": machine.where(),
                    "command": machine.command("benchmarks.episodes"),
                }
            )
            print(rows[-1], flush=True)
    engine.shutdown()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 32, 128], help="at once")
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64], help="processes")
    parser.add_argument("--seconds", type=float, default=1.0, help="of an answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    parser.add_argument("--busy-ok", action="store_true", help="run beside other work all the same")
    given = parser.parse_args()
    machine.refuse_if_busy(given.busy_ok)
    rows = measured(given.groups, given.workers, given.seconds, given.threads)
    tables.keep("episodes", KEYS, rows, given.to)
    os._exit(0)  # vLLM's threads would hold the process


if __name__ == "__main__":
    main()
