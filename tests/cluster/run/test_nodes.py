"""A pool over several Ray nodes, one of which is lost and another one comes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from cluster.run.nodes import leaving, own_actors
from cluster.run.runtime import sft_setup
from learner.actor import LearnerGroup
from rollout.pool import SamplerPool
from rollout.sampler import RaySamplerClient
from rollout.settings import SamplerConfig
from tests.support.light_sampler import LightSampler
from tests.support.pretend import request
from tests.support.ray_heads import local_cluster, node_args
from tests.support.recipes import made_recipe
from tests.support.waiting import until

ROOT = Path(__file__).parents[3]
START_SECONDS = 300.0
"""More than a busy machine takes for an actor; the pool's clock is put forward past it."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with one core. The last test has notice given to its nodes."""
    with local_cluster(num_cpus=1) as made:
        yield made


@contextlib.contextmanager
def pool_of_two() -> Iterator[SamplerPool]:
    """Two actors of a core each."""
    pool = SamplerPool(
        lambda name: RaySamplerClient(name, LightSampler.options(num_cpus=1).remote(name)),  # type: ignore[attr-defined]
        2,
        SamplerConfig(
            max_num_seqs=8,
            start_timeout_seconds=START_SECONDS,
            heartbeat_seconds=4 * START_SECONDS,
        ),
        "told",
    )
    try:
        pool.wait_ready(START_SECONDS)
        yield pool
    finally:
        pool.stop()


def connecting(code: str, **variables: str) -> list[str]:
    """What a process says that does this with `connected`."""
    code = f"import ray\nfrom cluster.run.session import connected\n{code}"
    own = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=own | variables,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


AT = "print('at', ray.get_runtime_context().gcs_address)\n"


def test_a_local_run_stays_out_of_a_cluster_that_runs_on_its_machine(cluster: Cluster) -> None:
    said = connecting(f"with connected(None): {AT}")
    assert [line.startswith("at ") for line in said].count(True) == 1
    assert f"at {cluster.address}" not in said


def test_a_job_joins_its_cluster_and_has_or_is_raised_what_is_asked_meanwhile(
    cluster: Cluster,
) -> None:
    code = (
        f"with connected(None, lambda: 7 * 6) as had: print('had', had); {AT}"
        "try:\n"
        "    with connected(None, lambda: {}['rows']): print('not reached')\n"
        "except KeyError as error: print('raised', error, ray.is_initialized())\n"
    )
    said = connecting(code, RAY_ADDRESS=cluster.address)
    assert said == ["had 42", f"at {cluster.address}", "raised 'rows' False"]


def test_a_learner_that_stands_still_is_named_once_it_is_late_and_ends_with_the_run(
    cluster: Cluster,
) -> None:
    setup = sft_setup(made_recipe("learner.timeout_seconds=3.0", "learner.cpus=0.1"))
    learner = LearnerGroup(setup)
    until(lambda: [actor["ActorClassName"] for actor in own_actors()] == ["LearnerRank"])
    rank = psutil.Process(own_actors()[0]["Pid"])
    rank.suspend()
    late = r"no answer from learner rank 0 within 3 s \(learner\.timeout_seconds\)"
    with pytest.raises(TimeoutError, match=late):
        learner.start()
    learner.stop()
    rank.wait(60)


def test_a_pool_goes_on_smaller_when_a_node_is_lost_and_grows_with_a_new_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr("rollout.pool_thread.time", clock)
    other = cluster.add_node(**node_args(num_cpus=1))
    with pool_of_two() as pool:
        pool.submit([request(f"g-{i}") for i in range(12)])
        cluster.remove_node(other, allow_graceful=False)
        found = pool.collect(12, 300)
        assert sorted(g.group_id for g in found) == sorted(f"g-{i}" for i in range(12))
        ahead[0] += START_SECONDS + 1  # one that idles is asked for a sign of life
        until(lambda: pool.counts()["restarts"] == 1)
        ahead[0] += START_SECONDS + 1  # there is no place, however long it waits
        until(lambda: pool.counts()["absent"] == 1)
        assert pool.counts()["count"] == 1 and pool.counts()["restarts"] == 1
        joined = cluster.add_node(**node_args(num_cpus=1))
        until(lambda: pool.counts()["count"] == 2)
        assert pool.counts()["absent"] == 0
        assert len(pool.sample([request(f"h-{i}") for i in range(12)])) == 12
        # A notice that a node is taken away is one to whom it hosts.
        told = "LightSampler"
        assert leaving((told,)) == ""
        drain(joined.node_id)
        until(lambda: leaving((told,)) == told)
        assert leaving(("LearnerRank",)) == ""
        drain(own_node())
        until(lambda: leaving(("LearnerRank",)) == "the driver")


def own_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def drain(node: str) -> None:
    """As a cluster's autoscaler does before a machine is preempted; nothing is ended yet."""
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    kept = int(time.time() * 1000) + 600_000
    assert client.drain_node(node, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "", kept)[
        0
    ]
