"""What is handed on finds no room: in Ray's object store, or in the shared memory below it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.record.events import read_events
from tests.support.ray_heads import environment
from tests.support.recipes import ROOT

STORE = "80000000"
SMALL_SHM = ("unshare", "--mount", "--propagation=private", "bash", "-c")
MOUNT = 'mount -t tmpfs -o size=200m tmpfs /dev/shm && exec "$@"'
DRIVER = """
import os, shutil, signal, sys, time
from pathlib import Path
import numpy as np, ray
from cluster.recipe.recipe import RunFailed
from cluster.run.own_ray import end_of_own_node
from cluster.run.session import actor_errors, connected, explain
from ray.exceptions import RayActorError

SIZE = 16 * 2**20

@ray.remote(num_cpus=0)
class Learner:
    def weights(self, count):
        return [ray.put(np.full(SIZE, n, np.uint8)) for n in range(count)]

run, others = Path(sys.argv[1]), Path("/dev/shm/others")
with connected(None):
    learner = Learner.remote()
    with others.open("wb", buffering=0) as file:
        while shutil.disk_usage("/dev/shm").free > 2**19:  # Ray's own node must live
            file.write(bytes(2**16))
    try:
        with actor_errors(run):
            ray.get(learner.weights.remote(1))
    except RunFailed as error:
        print(error, flush=True)
    others.unlink()
    # There is room again, in all for half of this.
    learner = Learner.remote()
    kept = ray.get(learner.weights.remote(10))
    print([int(ray.get(one).sum()) // SIZE for one in kept], flush=True)
    assert end_of_own_node() == ""
    os.kill(ray._private.worker._global_node.all_processes["raylet"][0].process.pid, signal.SIGBUS)
    while not end_of_own_node():
        time.sleep(0.1)
    print(explain(RayActorError()).partition("\\n")[0], flush=True)
"""


def test_no_room_in_the_object_store_costs_time_and_none_in_shared_memory_is_named(
    tmp_path: Path,
) -> None:
    """The second kills the actor that writes; a supervisor would start the run again."""
    if not shutil.which("unshare") or subprocess.run([*SMALL_SHM, MOUNT, "", "true"]).returncode:
        pytest.skip("no mounts here: it takes root, or another container")
    done = subprocess.run(
        [*SMALL_SHM, MOUNT, "", sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=ROOT,
        env=environment(RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES=STORE, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()  # some are Ray's own
    (first,) = [line for line in lines if line.startswith("/dev/shm is full")]
    assert str([*range(10)]) in lines
    (last,) = [line for line in lines if line.startswith("the node of Ray's on this machine was ")]
    assert "was killed by SIGBUS: /dev/shm, or " in last
    assert "--shm-size; an actor's process died: " in last
    assert first.startswith("/dev/shm is full (0 MiB of 0.2 GiB are free), which kills whoever")
    assert "; free some, or start the container with a larger --shm-size; an actor's pro" in first
    assert (tmp_path / "error.txt").read_text().startswith(first)
    (event,) = read_events(tmp_path)
    assert (event.who, event.what) == ("driver", "failed"), "not for good: it is started again"
    assert event.why.startswith(first) and event.why.endswith("(Learner)")
