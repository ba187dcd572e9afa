"""A Ray that a command starts for itself: reached from this machine only, and by its token only."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants
from ray._raylet import Config  # type: ignore[attr-defined]

from cluster.recipe.machine import killed_by


def end_of_own_node() -> str:
    """How the node of a Ray that this process started has ended; "" where it has not."""
    node = ray._private.worker._global_node
    started = node.all_processes.get(ray_constants.PROCESS_TYPE_RAYLET, []) if node else []
    codes = [info.process.poll() for info in started]
    if not codes or codes[0] is None:
        return ""
    how = killed_by(-codes[0]) if codes[0] < 0 else f"ended with {codes[0]}"
    return f"the node of Ray's on this machine was {how}"


@contextmanager
def closed_to_others() -> Iterator[None]:
    """A Ray that is started within listens on loopback and asks for a token.

    It is one that was made for it, in the environment of its processes, which their user alone can
    read, and nowhere else: left to itself, Ray writes one for all clusters of a user to a file that
    others may read. A token that the environment names already stays. This process keeps it: what
    it has once read, Ray goes by to its end.
    """
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not named or os.environ.get("RAY_AUTH_MODE") != "token":
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        Config.initialize("")  # Ray has read its environment when it was imported
    # What Ray does on Windows and macOS; an address of loopback that it is given it replaces.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
