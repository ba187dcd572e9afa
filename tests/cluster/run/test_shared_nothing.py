"""The nodes that tests run clusters on share nothing, and nothing of them outlives its test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.nodes import Cluster, Node, cluster
from tests.support.recipes import ROOT

LISTEN = """
import socket
with socket.create_server(("0.0.0.0", 5000)) as server:
    print("listens", flush=True)
    while True:
        with server.accept()[0] as client:
            client.sendall(client.recv(100))
"""
ASK = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[2])) as server:
    server.sendall(b"hello")
    assert server.recv(100) == b"hello"
print(time.monotonic() - began)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("nodes")) as nodes:
        server = nodes.add("a").start("python3", "-c", LISTEN, log=subprocess.PIPE)
        nodes.add("b")
        assert server.stdout.readline() == b"listens\n"
        yield nodes


def run(on: Node, *command: str) -> str:
    """What a command prints on a node; raises where it fails."""
    process = on.start(*command, log=subprocess.PIPE)
    printed = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0, printed
    return str(printed)


def asked(nodes: Cluster, patience: float = 30.0) -> float:
    """Seconds for a question from b and its answer from a, the connection and all."""
    return float(
        run(nodes.nodes["b"], "python3", "-c", ASK, nodes.nodes["a"].address, f"{patience}")
    )


def test_a_node_sees_nothing_of_another_nor_of_the_machine(two: Cluster) -> None:
    a, b = two.nodes.values()
    for folder in ("/tmp", "/dev/shm", "/root", "/tmp/home"):
        with suppress(AssertionError):  # the disk can only be read
            run(a, "sh", "-c", f"echo a > {folder}/of-a")
    assert run(a, "cat", "/tmp/of-a", "/dev/shm/of-a", "/tmp/home/of-a") == "a\na\na\n"
    assert not Path("/tmp/of-a").exists() and not Path("/root/of-a").exists()
    for file in ("/tmp/of-a", "/dev/shm/of-a", "/tmp/home/of-a", "/root/of-a"):
        assert not b.path(file).exists()
    own = {name: os.readlink(f"/proc/{node.pid}/ns/net") for name, node in two.nodes.items()}
    assert len({*own.values(), os.readlink("/proc/self/ns/net")}) == 3
    assert len(run(b, "ps", "-e", "-o", "pid=").split()) == 2, "its first process, and ps"
    assert str(ROOT) in run(b, "sh", "-c", f"ls -d {ROOT}"), "but the code is there"


def test_the_cable_is_fast_slow_lossy_or_cut_as_it_is_told(two: Cluster) -> None:
    # A question takes four ways: there and back to connect, there and back to ask.
    two.cable("slow", seconds=0.3, loss=0.0)
    assert asked(two) >= 1.2
    two.cable("slow", seconds=0.0, loss=1.0)
    with pytest.raises(AssertionError, match=r"timed out|No route"):
        asked(two, 1.0)
    two.cable("slow", seconds=0.0, loss=0.1)
    asked(two, 60.0)
    two.cable("slow", seconds=0.0, loss=0.0)
    two.cable("cut", "a")
    with pytest.raises(AssertionError, match=r"timed out|No route"):
        asked(two, 1.0)
    two.cable("mend", "a")
    asked(two)


def test_nothing_is_left_whatever_ends_the_test(two: Cluster, tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from tests.support.nodes import cluster
with cluster(Path(sys.argv[1])) as nodes:
    for name in "ab":
        nodes.add(name).start("sh", "-c", "sleep 1000 & sleep 1000")
    time.sleep(1)
    print("up", flush=True)
    time.sleep(1000)
"""
    dying = psutil.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert dying.stdout.readline() == b"up\n"
    below = dying.children(recursive=True)
    assert sum("sleep" in process.name() for process in below) >= 4
    dying.kill()
    dying.wait()
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive
    asked(two)  # others are left alone
