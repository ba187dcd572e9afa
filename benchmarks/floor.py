"""What of a step is products of matrices, which no other program would do faster?

    python -m benchmarks.floor                # policies of 2 and of 30 M parameters
    python -m benchmarks.floor --sizes 2M --threads 1

The race's work, without Ray: one engine samples the groups of a step, one learner takes them as one
update, each timed by itself; then each once more under torch's profiler, which counts the time of
operations by kind. What is left of the time is Python between them. The profiler adds to small
operations, so shares are of the profiled time and seconds of the other.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, tables
from benchmarks.race import KV_CACHE_GIB, SIZES, policy
from benchmarks.race_work import PROBLEMS, RATE, TASK
from benchmarks.sampling import Job
from rollout.record import Group

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "_C::onednn_mm", "aten::convolution"),
    "attention": ("scaled_dot_product", "cpu_attention", "reshape_and_cache"),
}
"""What the names of operations of a kind contain; the others are `other operations`."""
KEYS = ("size", "side", "threads")
Work = Callable[[], Any]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["2M", "30M"], choices=SIZES)
    parser.add_argument("--tokens", type=int, default=64, help="a response")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    parser.add_argument("--busy-ok", action="store_true", help="run beside other work all the same")
    args = parser.parse_args()
    machine.refuse_if_busy(args.busy_ok)
    for size in args.sizes:
        with tempfile.TemporaryDirectory(prefix="equipoise-floor-") as scratch:
            model, parameters = policy(size, Path(scratch))
            job = Job(model, args.tokens, args.threads, PROBLEMS, KV_CACHE_GIB[size])
            shared = machine.Shared()
            sampled, groups = apart(sampling, job, args.repeats)
            learnt, _ = apart(learning, job, args.repeats, groups)
            rows = [
                {"size": size, "parameters, M": f"{parameters / 1e6:.1f}", "side": side}
                | {"threads": args.threads}
                | columns
                | {
                    "foreign": f"{shared.foreign():.0%}",
                    "machine": machine.where(),
                    "command": machine.command("benchmarks.floor"),
                }
                for side, columns in (("sampling", sampled), ("learning", learnt))
            ]
            tables.keep("floor", KEYS, rows, args.to)


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns, called in a process of its own: threads are set once in one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def sampling(job: Job, repeats: int) -> tuple[tables.Row, list[Group]]:
    """An engine on the requests of a step: the columns, and the groups of the last time."""
    from rollout.engine import Engine
    from tasks.load import load_task

    engine, task = Engine.start(*job.settings), load_task(TASK)
    groups: list[Group] = []
    turns = iter(range(repeats + 2))

    async def all_groups() -> list[Group]:
        return await asyncio.gather(*(engine.sample(r, task) for r in job.requests(next(turns))))

    def sample() -> None:
        groups[:] = asyncio.run(all_groups())

    columns = measured(sample, repeats)
    engine.shutdown()
    return columns, groups


def learning(job: Job, repeats: int, groups: Sequence[Group]) -> tuple[tables.Row, None]:
    """A learner on one update of sampled groups."""
    from learner.batch import TrainBatch, TrainSequence
    from learner.engine import DeepSpeedLearner
    from learner.loss_settings import LossConfig
    from learner.policy_loss import PolicyLoss
    from learner.settings import CheckpointConfig, LearnerConfig
    from learner.trainer import LearnerSetup, WorldPlace
    from rollout.settings import TransferConfig

    rng = np.random.default_rng(0)
    batch = TrainBatch(
        tuple(
            TrainSequence(
                r.prompt_ids,
                r.response_ids,
                r.images,
                r.segments,
                r.logprobs,
                np.full(len(r.response_ids), rng.normal(), np.float32),
            )
            for group in groups
            for r in group.rollouts
        )
    )
    settings = LearnerConfig(
        zero_stage=0, learning_rate=RATE, threads=job.threads, micro_batch_tokens=16384
    )
    setup = LearnerSetup(job.settings[0], settings, TransferConfig(), CheckpointConfig())
    learner = DeepSpeedLearner(setup, WorldPlace(master="127.0.0.1:29611"))
    columns = measured(lambda: learner.update(batch, PolicyLoss(LossConfig())), repeats)
    learner.close()
    return columns, None


def measured(work: Work, repeats: int) -> tables.Row:
    """Seconds of `work` after a first time, and the share of each kind of operation in it."""
    from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

    work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    everywhere = _ExperimentalConfig(profile_all_threads=True)  # an engine has a thread of its own
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as profiler:
        work()
        whole = time.perf_counter() - begin
    spent = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in profiler.key_averages():
        kind = next((k for k, names in KINDS.items() if any(n in event.key for n in names)), None)
        if kind or event.key.startswith(("aten::", "_C")):
            spent[kind or "other operations"] += event.self_cpu_time_total / 1e6
    shares = {kind: took / whole for kind, took in spent.items()}
    return {
        "seconds": tables.spread(seconds),
        **{kind: f"{share:.0%}" for kind, share in shares.items()},
        "between operations": f"{1 - sum(shares.values()):.0%}",
        "products alone, s": f"{shares['products'] * statistics.median(seconds):.2f}",
    }


if __name__ == "__main__":
    main()
