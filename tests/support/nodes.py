"""Nodes of a cluster that share nothing, on one machine. Linux, as root.

A node is a process that is the first of its own PID, mount and network namespaces: /dev/shm, /tmp
and the home are its own and empty, the rest of the disk (the code and the interpreter) is
read-only. One that is given a `bucket` has that folder of the machine's too, in the place of what
holds the copies of runs. Nodes reach each other through a `Hub`, and nothing else through anything.
Whatever ends the test's process closes two pipes, and with those every node, all that runs in one,
and the cable are gone: nothing of them is in a namespace of the machine's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from tests.support.hub import DEVICE
from tests.support.ray_heads import RAY, environment
from tests.support.recipes import ROOT

PORT = 6379
PORTS = (
    "--dashboard-agent-grpc-port=7001",
    "--dashboard-agent-listen-port=7002",
    "--runtime-env-agent-port=7003",
    "--metrics-export-port=7004",
)
"""Told, so that a raylet does not wait for its agents to tell: it ends after 15 seconds of that."""
HOME = "/tmp/home"
BUCKET = "/tmp/bucket"
CLOCK = """
import os, time

def now(true=time.time):
    try:
        return true() + os.stat("/tmp/ahead").st_size
    except OSError:
        return true()

time.time = now
"""
"""What every Python of a node begins with: its wall clock is ahead by as many seconds as a file has
bytes. (The system's own clock is the whole machine's.)"""
UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
INSIDE = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mkdir /dev/shm/tmp
mount -t tmpfs tmpfs /dev/shm/tmp
mkdir -p /dev/shm/tmp/home/.cache/torch_extensions
built=$1 bucket=$2
shift 2
if [ -n "$bucket" ]; then
    mkdir /dev/shm/tmp/bucket
    mount --bind "$bucket" /dev/shm/tmp/bucket
fi
[ -z "$built" ] || mount --bind "$built" /dev/shm/tmp/home/.cache/torch_extensions
for shared in "$@"; do  # what lies below /tmp would be hidden
    case "$shared" in /tmp/*)
        mkdir -p "/dev/shm/tmp/${shared#/tmp/}"
        mount --bind "$shared" "/dev/shm/tmp/${shared#/tmp/}"
        mount -o remount,bind,ro "/dev/shm/tmp/${shared#/tmp/}";;
    esac
done
mount --move /dev/shm/tmp /tmp
rmdir /dev/shm/tmp
mount -n -o remount,bind,ro /
ip link set lo up
echo up
read -r _ || exit 0
"""


class Node:
    """One machine, as far as what runs on it can tell."""

    def __init__(
        self, name: str, address: str, built: Path | None = None, bucket: Path | None = None
    ) -> None:
        """`built`: a folder of the machine's for what torch compiles, which takes minutes."""
        self.name, self.address = name, address
        given = (
            str(built or ""),
            str(bucket or ""),
            str(ROOT),
            str(Path(sys.executable).parents[1]),
        )
        self._holder = subprocess.Popen(
            [*UNSHARE, "bash", "-c", INSIDE, "node", *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "up\n":
            self._holder.kill()
            raise OSError(self._holder.stderr.read().strip() or "no reason given")
        (first,) = psutil.Process(self._holder.pid).children()
        self.pid = first.pid
        self._first = first
        self.path("/tmp/clock").mkdir()
        self.path("/tmp/clock/sitecustomize.py").write_text(CLOCK)

    def start(self, *command: str, log: IO[str] | int | None = None, **more: str) -> psutil.Popen:
        """Begin a command on the node; `more`: variables that it sees."""
        inside = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", f"--wd={ROOT}"]
        own = environment(HOME=HOME, PYTHONPATH=f"/tmp/clock:{ROOT}", **more)
        return psutil.Popen(
            [*inside, *command],
            env={name: value for name, value in own.items() if name != "TMPDIR"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def path(self, inside: str) -> Path:
        """A file of the node's, as the test sees it."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def processes(self, title: str = "") -> list[psutil.Process]:
        """What runs on it, with a word in its title; its first process left out."""
        own, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for process in psutil.process_iter():
            try:
                there = os.readlink(f"/proc/{process.pid}/ns/pid")
                if there == own and process != self._first and title in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.Error, OSError):
                continue  # it ended meanwhile
        return found

    def jump(self, seconds: int) -> None:
        """Its clock is so far ahead from now on (see CLOCK)."""
        self.path("/tmp/ahead").write_bytes(bytes(seconds))

    def kill(self) -> None:
        """The power goes, if it has not."""
        with suppress(psutil.NoSuchProcess):
            self._first.kill()
        self._holder.wait(60)
        for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            assert pipe is not None
            pipe.close()


class Cluster:
    """Nodes, the cable between them, and a Ray over them whose head is on the first."""

    def __init__(self, folder: Path, stack: ExitStack, more: dict[str, str]) -> None:
        """`folder`: for what the nodes' Ray prints; `more`: variables that it sees."""
        self.nodes: dict[str, Node] = {}
        self._more = more
        self._folder, self._stack = folder, stack
        self._hub = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hub"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(self._hub.kill)

    @property
    def address(self) -> str:
        """Of the head."""
        return f"10.77.0.1:{PORT}"

    def add(self, name: str, bucket: Path | None = None) -> Node:
        """A node that is plugged in; nothing runs on it.

        The first, and what has a bucket (see above), has what torch has compiled.
        """
        number = len(self.nodes) + 1
        built = Path.home() / ".cache" / "torch_extensions"
        built.mkdir(parents=True, exist_ok=True)
        learns = bucket is not None or not self.nodes
        node = Node(name, f"10.77.0.{number}", built if learns else None, bucket)
        self._stack.callback(node.kill)
        self.nodes[name] = node
        self.cable("plug", name, pid=node.pid)
        for words in (
            f"addr add {node.address}/24 dev {DEVICE}",
            f"link set {DEVICE} up txqueuelen 10000",
            f"route add default dev {DEVICE}",
        ):
            subprocess.run(
                ["nsenter", f"--target={node.pid}", "--net", "ip", *words.split()], check=True
            )
        return node

    def join(self, node: Node, cpus: float, **labels: str) -> None:
        """Keep Ray up on a node, as a supervisor would; as the head where it is the first.

        Ray gives itself half a minute to start, which a busy machine can take; and a node that was
        cut off for long ends, for the head has given it up.
        """
        first = node is next(iter(self.nodes.values()))
        where = [f"--address={self.address}"]
        if first:
            where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        with (self._folder / f"ray-{node.name}.log").open("a") as log:
            node.start(
                *("bash", "-c", 'until false; do "$@"; sleep 1; done', "ray"),
                *(RAY, "start", "--block", *where, f"--node-ip-address={node.address}"),
                *(f"--num-cpus={cpus:g}", "--include-log-monitor=false", *PORTS),
                f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}",
                log=log,
                **self._more,
            )

    def wait_head(self, seconds: float) -> None:
        """Return once the head takes drivers."""
        log, until = self._folder / f"ray-{next(iter(self.nodes))}.log", time.monotonic() + seconds
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)

    def cable(self, do: str, name: str = "", **values: float) -> None:
        """Tell the hub (see there), which has done it when this returns."""
        told: dict[str, Any] = {"do": do, **values} | ({"name": name} if name else {})
        assert self._hub.stdin is not None and self._hub.stdout is not None
        self._hub.stdin.write(json.dumps(told) + "\n")
        self._hub.stdin.flush()
        assert self._hub.stdout.readline() == "done\n", f"the cable is gone: {told}"


@contextmanager
def cluster(folder: Path, **more: str) -> Iterator[Cluster]:
    """An empty cluster, which ends with the block. Skips where namespaces are refused."""
    for tool in ("unshare", "nsenter", "ip", "bash"):
        if shutil.which(tool) is None:
            pytest.skip(f"no namespaces here: {tool} is not installed")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
        Node("probe", "").kill()
    except OSError as error:
        pytest.skip(f"no namespaces here: {error}")
    with ExitStack() as stack:
        yield Cluster(folder, stack, more)
