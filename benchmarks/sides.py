"""Sides of a comparison: each in a process of its own, which works only when it is asked."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DEADLINE = 1800.0


@dataclass
class Racer:
    """A side as the one that compares sees it."""

    name: str
    process: Any
    connection: Any
    log: Path
    started: float = field(default_factory=time.perf_counter)

    def ask(self, message: Any) -> Any:
        """Send, and wait for the answer."""
        self.connection.send(message)
        return self.answer()

    def answer(self) -> Any:
        """Exits with the end of its log where it has died or is silent for too long."""
        try:
            if self.connection.poll(DEADLINE):
                return self.connection.recv()
        except (EOFError, ConnectionError):
            pass
        last_words = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"side {self.name} does not answer; its last words:\n{last_words}")


@contextmanager
def side(name: str, function: str, work: Any, folder: Path) -> Iterator[Racer]:
    """Call `function` ("module:function") with a connection and its work; ended in any case.

    `work` is a dataclass with a `folder`: one of the side's own, in `folder`. None is sent to it
    in the end.
    """
    own_folder = folder / name.replace(" ", "-")
    own_folder.mkdir()
    context = multiprocessing.get_context("spawn")
    here, far_end = context.Pipe()
    own_work = replace(work, folder=str(own_folder))
    process = context.Process(
        target=_run, args=(function, far_end, own_work, str(own_folder / "log"))
    )
    process.start()
    far_end.close()
    racer = Racer(name, process, here, own_folder / "log")
    try:
        yield racer
        here.send(None)
        process.join(60)
    finally:
        if process.is_alive():
            process.terminate()
            process.join(30)


def _run(function: str, connection: Any, work: Any, log: str) -> None:
    """What the process does; what it prints goes into its log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(connection, work)
