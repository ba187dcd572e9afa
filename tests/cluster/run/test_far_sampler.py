"""A sampler on a node that shares no memory with the learner, which may be stopped meanwhile.

Two Ray nodes; the second is in a mount namespace of its own with its own /dev/shm. The learner is
a rank's real publishing over the tiny model, the store Ray's own, the samplers real actors with
real engines. Run with `-s` it prints what the transfers cost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from cluster.run.delivery import Delivery
from learner.policy import load_policy
from learner.weights import GatheredWeights, stored
from rollout.pool import SamplerPool
from rollout.record import Group, SampleRequest, Sampling, Weights
from rollout.sampler import RaySamplerClient, Sampler
from rollout.settings import ModelConfig, SamplerConfig
from tests.support.live_engine import gaps, mixed_sizes
from tests.support.ray_heads import RAY
from tests.support.waiting import until

ROOT = Path(__file__).parents[3]
FAR = "mount -t tmpfs tmpfs /dev/shm && exec {command}"


@ray.remote(num_cpus=0, resources={"near": 0.1})
class Source:
    """Rank 0 of a learner, as far as weights go; version `v` is the checkpoint's times 1 + v/50."""

    def __init__(self, model: str) -> None:
        self._policy = load_policy(model)[0]

    def publish(self, version: int) -> Iterator[Any]:
        with torch.no_grad():
            for parameter in self._policy.model.parameters():
                parameter.mul_((1 + version / 50) / (1 + (version - 1) / 50))
        model = self._policy.model
        source = GatheredWeights(model, lambda _: nullcontext(), torch.float32, 2**18)
        yield from stored(source.iter_groups())

    def pid(self) -> int:
        return os.getpid()

    def memcpy_seconds(self) -> float:
        held = {n: torch.zeros_like(p) for n, p in self._policy.model.named_parameters()}
        start = time.perf_counter()
        for name, parameter in self._policy.model.named_parameters():
            held[name].copy_(parameter.detach())
        return time.perf_counter() - start


class Learner:
    """The driver's end of it (`learner.actor.LearnerGroup`)."""

    def __init__(self, source: Any) -> None:
        self.source, self.asked = source, 0

    def publish_weights(self, version: int) -> Weights:
        self.asked += 1
        *buckets, manifest = self.source.publish.remote(version)
        return Weights(version, ray.get(manifest, timeout=120), tuple(buckets))

    def attach_sender(self, sender: Any) -> None:
        raise NotImplementedError

    send_weights: Any = attach_sender


@pytest.fixture
def cluster() -> Iterator[str]:
    """A head, and a node whose /dev/shm is its own; yields the address of the head."""
    if ray.is_initialized():
        ray.shutdown()
    unshare = shutil.which("unshare")
    alone = [unshare or "unshare", "--mount", *(["-r"] if os.getuid() else [])]
    probe = [*alone, "sh", "-c", FAR.format(command="true")]
    if unshare is None or (tried := subprocess.run(probe, capture_output=True)).returncode:
        pytest.skip(f"no mount namespace here: {tried.stderr.decode()[:200] if unshare else ''}")
    head = started(
        lambda: Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"near": 1}}
        )
    )
    with socket.socket() as probed:
        probed.bind(("127.0.0.1", 0))
        port = probed.getsockname()[1]
    start = f"{RAY} start --address={head.address} --num-cpus=2 --block"
    start += f" --dashboard-agent-listen-port={port} --resources='{{\"far\": 2}}'"
    variables = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    nodes: list[psutil.Popen] = []

    def join() -> None:
        nodes.append(
            psutil.Popen(
                [*alone, "sh", "-c", FAR.format(command=start)],
                env=os.environ | variables | {"RAY_USAGE_STATS_ENABLED": "0"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
        end = time.monotonic() + 120
        while "far" not in ray.cluster_resources():
            assert nodes[-1].poll() is None and time.monotonic() < end, "the node did not join"
            time.sleep(0.2)

    try:
        ray.init(
            address=head.address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": variables},
        )
        started(join)
        yield head.address
    finally:
        ray.shutdown()
        # At once: left to end by themselves, nodes wait for each other and for their workers.
        below = [p for node in nodes if node.is_running() for p in node.children(recursive=True)]
        for process in [*nodes, *below]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs([*nodes, *below], timeout=20)
        head.remove_node(head.head_node, allow_graceful=False)
        head.shutdown()


T = TypeVar("T")


def started(start: Callable[[], T]) -> T:
    """Ray gives a node 30 seconds to come up, which a busy machine can take."""
    for _ in range(4):
        with contextlib.suppress(Exception):
            return start()
    return start()


@ray.remote(num_cpus=0, resources={"far": 0.1})
def shared_memory() -> tuple[int, list[str]]:
    """The far node's /dev/shm: the device it is, and what lies in it."""
    return os.stat("/dev/shm").st_dev, os.listdir("/dev/shm")


def draws(pool: SamplerPool, name: str, count: int = 4) -> list[Group]:
    return pool.sample(
        [
            SampleRequest(f"{name}-{i}", problem, 2, Sampling(max_tokens=24))
            for i, problem in enumerate(mixed_sizes(count))
        ]
    )


def test_a_sampler_that_shares_no_memory_trains_along_and_needs_no_learner_to_come_back(
    cluster: str, tiny_models: dict[str, Path]
) -> None:
    device, _ = ray.get(shared_memory.remote())
    assert device != os.stat("/dev/shm").st_dev, "the far node has a /dev/shm of its own"
    folder = str(tiny_models["qwen3_vl"])
    source = Source.remote(folder)  # type: ignore[attr-defined]
    model = ModelConfig(path=folder, max_model_len=512)
    settings = SamplerConfig(cpus=0.5, max_num_seqs=16, start_timeout_seconds=600.0)

    def start(name: str) -> RaySamplerClient:
        far = Sampler.options(num_cpus=0.5, resources={"far": 0.5})  # type: ignore[attr-defined]
        return RaySamplerClient(name, far.remote(model, settings, name))

    pool = SamplerPool(start, 1, settings, renewal=120.0)
    try:
        learner = Learner(source)
        delivery = Delivery(pool, learner)
        pool.wait_ready(600)
        learner_process = psutil.Process(ray.get(source.pid.remote()))
        for version in (1, 2):
            report = delivery.send(version)
            check(draws(pool, f"v{version}"), folder, version)
            copy = ray.get(source.memcpy_seconds.remote())
            print(
                f"version {version}: {report.bytes / 2**20:.1f} MiB in {report.groups} buckets, "
                f"{report.seconds:.3f} s from node to node into the engine, "
                f"memcpy {copy:.4f} s, ratio {report.seconds / copy:.0f}"
            )
        # Now the learner's process stands still, and stays so.
        os.kill(learner_process.pid, signal.SIGSTOP)
        try:
            (client,) = pool.clients
            begun = time.monotonic()
            client.kill()
            pool.resize(2)
            draws(pool, "lost", 1)
            until(lambda: pool.counts()["restarts"] == 1 and pool.counts()["count"] == 2)
            print(f"one killed and one more: both up after {time.monotonic() - begun:.1f} s")
            assert learner_process.status() == psutil.STATUS_STOPPED and learner.asked == 2
            groups = draws(pool, "after", 8)
            check(groups, folder, 2)
            assert {g.rollouts[0].sampler for g in groups} == {"sampler-0", "sampler-1"}
        finally:
            os.kill(learner_process.pid, signal.SIGCONT)
    finally:
        pool.stop()


def check(groups: list[Group], folder: str, version: int) -> None:
    """All tokens were drawn under the weights that the learner has as this version."""
    policy, processor = load_policy(folder)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1 + version / 50)
    assert {int(v) for g in groups for r in g.rollouts for v in r.versions} == {version}
    rollouts = [r for g in groups for r in g.rollouts]
    inputs = [(r.prompt_ids, r.response_ids, r.images) for r in rollouts]
    logprobs: list[np.ndarray] = [r.logprobs for r in rollouts]
    assert np.concatenate(gaps(policy, processor, inputs, logprobs)).max() < 1e-3
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.div_(1 + version / 50)
    others = np.concatenate(gaps(policy, processor, inputs, logprobs)).max()
    assert others > 3e-3, "other weights are told apart"


if __name__ == "__main__":
    sys.exit(pytest.main(["-s", __file__]))
