"""Environments beside a sampler: in processes of their own, with a deadline for each answer.

One call at a time is in a process, so the blame for a process that hangs or dies falls on one
episode; the others are played again in the next process, and nothing of them is lost.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from rollout.environment_worker import Call, Settings
from rollout.settings import EnvironmentConfig
from tasks.core import Problem
from tasks.environments import EnvironmentFailed, Observation
from tasks.returns import Returns

START_SECONDS = 120.0
"""How long a process may take to come up."""


class EnvironmentPool:
    """The processes of one [environment]; they start with the first call each."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.config = config
        self._workers = [_Worker(config) for _ in range(config.workers)]

    def open(
        self, name: str, problem: Problem, seed: int, returns: Returns | None = None
    ) -> Conversation:
        """The environment of a new episode, in the process that has the fewest calls to answer.

        `returns`: what is shown in place of the pictures that it returns.
        """
        worker = min(self._workers, key=lambda worker: worker.episodes)
        return Conversation(worker, name, problem, seed, returns)

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.end()


class Conversation:
    """The environment of one episode, wherever it runs.

    Attributes:
        seconds: for one answer.
        spent: for all so far, without what others' calls took before it was heard.
    """

    def __init__(
        self, worker: _Worker, name: str, problem: Problem, seed: int, returns: Returns | None
    ) -> None:
        self._worker, self._name, self._problem, self._seed = worker, name, problem, seed
        self._returns = returns
        self._turns: tuple[str, ...] = ()
        self.seconds, self.spent = worker.seconds, 0.0
        worker.episodes += 1

    async def answer(self, text: str | None) -> Observation | None:
        """To a turn; to None the reset. Raises EnvironmentFailed."""
        if text is not None:
            self._turns += (text,)
        problem, turns = self._problem, self._turns
        call = Call(self._name, problem, self._seed, turns, self.seconds, self._returns)
        try:
            answer, seconds = await self._worker.ask(call)
        except EnvironmentFailed:
            self.spent += self.seconds  # at most
            raise
        self.spent += seconds
        return answer

    def __del__(self) -> None:
        self._worker.episodes -= 1


class _Worker:
    """A process, started again when it is lost; its thread waits for it."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(1, "environment")
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self.seconds, self.episodes = config.step_seconds, 0

    async def ask(self, call: Call) -> tuple[Observation | None, float]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, call)

    def end(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._kill()

    def _ask(self, call: Call) -> tuple[Observation | None, float]:
        pipe = self._pipe or self._start()
        began = time.perf_counter()
        try:
            pipe.send(call)
            if not pipe.poll(call.seconds):
                self._kill()
                raise EnvironmentFailed("deadline", f"no answer within {call.seconds:g} s")
            reply = pipe.recv()
        except (EOFError, OSError) as error:
            raise EnvironmentFailed("died", f"its process ended ({self._kill()})") from error
        if isinstance(reply, tuple):
            raise EnvironmentFailed(*reply)
        assert reply is None or isinstance(reply, Observation)
        return reply, time.perf_counter() - began

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        # The modules that the recipe names are found there as they are here.
        path = os.pathsep.join(dict.fromkeys(place or os.getcwd() for place in sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rollout.environment_worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        config = self._config
        try:
            self._pipe.send(Settings.of(config))
            up = self._pipe.poll(START_SECONDS) and self._pipe.recv() == "ready"
        except (EOFError, OSError):
            up = False
        if not up:
            raise EnvironmentFailed("died", f"its process does not start ({self._kill()})")
        return self._pipe

    def _kill(self) -> str:
        """End the process, whatever state it is in; how it ended, in words."""
        process, self._process = self._process, None
        pipe, self._pipe = self._pipe, None
        if process is None:
            return "not running"
        process.kill()
        code = process.wait()
        if pipe is not None:
            pipe.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"
