"""A training run whose processes are killed and stopped while it trains: it goes on.

One run proves it all, since engines are slow to start: a sampler's process and another's engine
killed in the middle of their groups (both samplers are gone then), a reward worker killed, and a
sampler stopped. What is left behind must be as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil

from cluster.record.mismatch import MISMATCH_LIMIT
from cluster.record.stored import read_metrics, read_rollouts
from tests.support.live_driver import Driver

GROUPS, SIZE = 4, 4
HANGING = ("sampler/restarts/silent", "sampler/restarts/transfer")


def test_a_run_goes_on_whatever_dies_or_hangs(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    driver = Driver(
        tmp_path,
        tiny_models["qwen3_vl"],
        "algorithm.steps=100000",
        "sampler.count=2",
        "sampler.max_tokens=100",
        "sampler.cpus=0.5",
        "learner.cpus=0.5",
        "sampler.max_restarts=10",
        "sampler.start_timeout_seconds=900.0",
        # Longer than an engine's first tokens take where other work has the cores.
        "sampler.heartbeat_seconds=60.0",
        "eval.problems=4",
        'eval.passes=["greedy"]',
    )
    engines: list[psutil.Process] = []
    try:
        driver.wait("the first step", lambda: driver.steps() >= 1, 900)
        first, second = driver.samplers()
        engines = [driver.below("EngineCore", sampler)[0] for sampler in (first, second)]
        # A step is written: the next one samples. Groups of a stopped engine are half done for as
        # long as it takes to kill something.
        driver.wait_steps(1)
        for engine in engines:
            engine.suspend()
        time.sleep(5)
        stands = driver.steps()
        first.kill()
        engines[1].kill()
        driver.wait("engines started again", lambda: driver.steps() >= stands + 2, 900)
        (worker,) = driver.below("ray::RewardWorker")
        worker.suspend()
        time.sleep(5)  # until groups wait for it
        worker.kill()
        driver.wait_steps(2)
        driver.wait("both samplers at work", lambda: driver.metric("sampler/count") == 2, 900)
        hanging = driver.samplers()[0]
        driver.wait_steps(1)
        hanging.suspend()
        # Met by its silence, or by the deadline of a transfer where it had no time to sample.
        driver.wait("a hanging one", lambda: sum(map(driver.metric, HANGING)) >= 1, 900)
        driver.wait("both again", lambda: driver.metric("sampler/count") == 2, 900)
        driver.wait_steps(2)
        driver.stop()
    finally:
        driver.process.kill()
        for engine in engines:
            with contextlib.suppress(psutil.Error):
                engine.kill()
    assert driver.metric("sampler/restarts/actor") >= 1
    assert driver.metric("sampler/restarts/engine") >= 1
    assert driver.metric("sampler/resampled") >= GROUPS, "all groups of one step, at least"
    assert driver.metric("reward/worker_restarts") >= 1
    seen: set[str] = set()
    for step in range(1, driver.steps() + 1):
        rows = read_rollouts(driver.run, step).to_pylist()
        ids = {row["rollout_id"] for row in rows}
        groups = {row["group_id"] for row in rows}
        assert len(rows) == len(ids) == GROUPS * SIZE and len(groups) == GROUPS
        assert not groups & seen
        seen |= groups
        # On-policy, whoever sampled it: one started again had the weights of its time.
        assert {v for row in rows for v in row["versions"]} == {step - 1}
    gaps = [r for r in read_metrics(driver.run).to_pylist() if r["name"] == "learner/logprob_gap"]
    assert len(gaps) == driver.steps() and max(r["value"] for r in gaps) < MISMATCH_LIMIT["float32"]
