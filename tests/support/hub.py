"""A cable between network namespaces that can be slow, lose frames, or be cut. Linux, as root.

A process of its own holds one TAP device a node and hands every frame to all the others: late and
with losses where it is told so, which needs nothing of the kernel but TUN (`netem` is a module that
not every kernel has). It ends, and its devices with it, when its standard input is closed.

Commands are lines of JSON, each answered by a line: `{"do": "plug", "pid": 12, "name": "a"}`,
`{"do": "cut", "name": "a"}`, `{"do": "mend", "name": "a"}`, `{"do": "slow", "seconds": 0.05,
"loss": 0.01}`.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import time
from contextlib import suppress
from typing import Any

DEVICE = "cable0"
FRAME = 65536
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000


class Hub:
    """The nodes that are plugged in, by name, and the frames that are on their way."""

    def __init__(self) -> None:
        self._ports: dict[str, int] = {}
        self._cut: set[str] = set()
        self._late: list[tuple[float, int, str, bytes]] = []
        self._count, self._seconds, self._loss = 0, 0.0, 0.0
        self._dice = random.Random(0)

    def plug(self, name: str, pid: int) -> None:
        """Make the device of a node: in the network namespace of a process."""
        with open(f"/proc/{pid}/ns/net") as there:
            if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(port, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), IFF_TAP | IFF_NO_PI))
        self._ports[name] = port

    def cut(self, name: str) -> None:
        """From now on nothing comes from a node or reaches it, and nobody is told."""
        self._cut.add(name)

    def mend(self, name: str) -> None:
        self._cut.discard(name)

    def slow(self, seconds: float, loss: float) -> None:
        """Every frame takes so long, one way, and this share of them is lost."""
        self._seconds, self._loss = seconds, loss

    def turn(self) -> list[str]:
        """Wait for frames and for commands, hand on what is due, and return the commands."""
        wait = max(0.0, self._late[0][0] - time.monotonic()) if self._late else None
        ready, _, _ = select.select([0, *self._ports.values()], [], [], wait)
        for name, port in list(self._ports.items()):
            if port in ready:
                self._read(name, port)
        while self._late and self._late[0][0] <= time.monotonic():
            self._hand_on(*heapq.heappop(self._late)[2:])
        if 0 not in ready:
            return []
        told = os.read(0, 4096).decode().splitlines()
        if not told:
            raise EOFError
        return told

    def _read(self, name: str, port: int) -> None:
        for _ in range(64):
            try:
                frame = os.read(port, FRAME)
            except BlockingIOError:
                return
            except OSError:  # its node is gone
                os.close(self._ports.pop(name))
                return
            if name in self._cut or self._dice.random() < self._loss:
                continue
            if self._seconds or self._late:
                self._count += 1
                due = time.monotonic() + self._seconds
                heapq.heappush(self._late, (due, self._count, name, frame))
            else:
                self._hand_on(name, frame)

    def _hand_on(self, origin: str, frame: bytes) -> None:
        for name, port in self._ports.items():
            if name != origin and not self._cut & {name, origin}:
                with suppress(OSError):  # down, or its node is gone: lost, as on any cable
                    os.write(port, frame)


def main() -> None:
    """Read commands until standard input ends."""
    hub = Hub()
    while True:
        try:
            lines = hub.turn()
        except EOFError:
            return
        for line in lines:
            command: dict[str, Any] = json.loads(line)
            getattr(hub, command.pop("do"))(**command)
            print("done", flush=True)


if __name__ == "__main__":
    main()
