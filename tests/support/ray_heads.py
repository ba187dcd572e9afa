"""Ray heads for tests: on loopback, with ports and a token of their own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

ROOT = str(Path(__file__).resolve().parents[2])
RAY = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
TOKEN = secrets.token_hex(32)


def environment(**more: str) -> dict[str, str]:
    """What commands of a test run in, Ray's token among it."""
    quiet = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    # Beside other tests, workers as humble as Ray makes them would hardly ever run.
    quiet |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_worker_niceness": "0"}
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | quiet | more


@contextmanager
def _handed_on() -> Iterator[None]:
    """Nodes begun within hand their environment on, the path to the tests in it, so that the
    workers that they start at once are those that actors get."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(PYTHONPATH=ROOT).items():
            patch.setenv(name, value)
        yield


@contextmanager
def local_ray(cpus: int, gpus: int | None = None) -> Iterator[None]:
    """A Ray of this process's own."""
    import ray

    with _handed_on():
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
        )
    yield
    ray.shutdown()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, on loopback."""
    with ExitStack() as open_ones:
        probes = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def node_args(**args: Any) -> dict[str, Any]:
    """What a node of a `local_cluster` is started with, the ports of its agents among it: a raylet
    that waits to be told of them ends after 15 seconds, which a busy machine may take."""
    names = ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    return dict(zip(names, free_ports(3), strict=True)) | args


@contextmanager
def local_cluster(*nodes: dict[str, Any], **head: Any) -> Iterator[Cluster]:
    """A Ray of several nodes on this machine, which this process is connected to; it leaves
    nothing behind for another Ray. `nodes` and `head`: what each is started with."""
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    with _handed_on():
        cluster = Cluster(initialize_head=True, head_node_args=node_args(**head))
        for node in nodes:
            cluster.add_node(**node_args(**node))
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    ray.shutdown()
    cluster.shutdown()


def takes_jobs(address: str) -> bool:
    """Whether a head runs a job: once its dashboard has found the node's agent."""
    hello = urllib.request.Request(
        f"{address}/api/jobs/",
        json.dumps({"entrypoint": "true"}).encode(),
        {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError):
        return bool(direct.open(hello, timeout=60).status == 200)
    return False


@contextmanager
def ray_head(log: Path, **more: str) -> Iterator[str]:
    """A head node of two cores; yields its dashboard's address once it takes jobs.

    `more`: variables that its jobs see.
    """
    ports = free_ports(3)
    # Ray puts sockets under its temporary folder, whose path must stay short.
    scratch = Path(f"/tmp/eq-{os.getpid()}")
    with log.open("w") as out:
        head = subprocess.Popen(
            [
                RAY,
                "start",
                "--head",
                "--block",
                "--num-cpus=2",
                "--node-ip-address=127.0.0.1",
                f"--port={ports[0]}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={ports[1]}",
                # The default is one fixed port, which another Ray on this machine may hold.
                f"--dashboard-agent-listen-port={ports[2]}",
                f"--temp-dir={scratch}",
            ],
            env=environment(**more),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{ports[1]}"
        deadline = time.monotonic() + 200
        while not takes_jobs(address):
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield address
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(scratch, ignore_errors=True)
