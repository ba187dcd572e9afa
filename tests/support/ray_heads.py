"""Ray heads for tests: on loopback, with ports and a token of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RAY = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
TOKEN = secrets.token_hex(32)


def environment(**more: str) -> dict[str, str]:
    """What commands of a test run in, Ray's token among it."""
    quiet = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    # Beside other tests, workers as humble as Ray makes them would hardly ever run.
    quiet |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_worker_niceness": "0"}
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | quiet | more


@contextmanager
def ray_head(log: Path, **more: str) -> Iterator[str]:
    """A head node of two cores; yields its dashboard's address once it takes jobs.

    `more`: variables that its jobs see.
    """
    ports = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
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
        # Jobs are taken once the dashboard has found the node's agent.
        hello = [RAY, "job", "submit", "--address", address, "--", "true"]
        for attempt in range(40):
            done = subprocess.run(
                hello, env=environment(), capture_output=True, text=True, timeout=120
            )
            if done.returncode == 0:
                break
            assert head.poll() is None, log.read_text()
            assert attempt < 39, done.stdout[-2000:] + done.stderr[-2000:]
            time.sleep(1)
        yield address
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(scratch, ignore_errors=True)
