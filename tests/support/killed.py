"""Ending a process with SIGKILL before any one of the changes that it makes to a file system."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open")


def killed_before(change: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process of its own that dies before its n-th change, from 0; else False."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left = iter(range(change))

    def hook(event: str, _: tuple[object, ...]) -> None:
        if event in CHANGES and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its name there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
