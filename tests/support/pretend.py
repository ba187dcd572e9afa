"""Groups and requests without an engine, for tests of the pool."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from rollout.jobs import Died, Refused
from rollout.pool import SamplerPool
from rollout.record import Group, Rollout, SampleRequest, Sampling, ScoreRequest
from rollout.settings import SamplerConfig
from tasks.core import Parsed, Problem

VOCABULARY = 50


def problem(name: str) -> Problem:
    return Problem(
        id=name,
        task="sudoku",
        images=(f"image of {name}".encode(),),
        prompt="p",
        perception="",
        truth={},
        symmetry_key=name,
        knobs={},
    )


def request(name: str, of: str = "", n: int = 4, max_tokens: int = 8) -> SampleRequest:
    return SampleRequest(name, problem(of or name), n, Sampling(max_tokens=max_tokens))


def score_request(name: str, tokens: int = 3) -> ScoreRequest:
    return ScoreRequest(name, problem("p"), np.zeros(tokens, np.int32), ())


def group(asked: SampleRequest, sampler: str = "sampler-0") -> Group:
    """A group as a healthy sampler returns it; its tokens hang on the group's id alone."""
    rng = np.random.default_rng(list(asked.group_id.encode()))
    return Group(
        asked.group_id,
        asked.problem,
        tuple(
            Rollout(
                rollout_id=f"{asked.group_id}/{place}",
                group_id=asked.group_id,
                kind=asked.kind,
                view=asked.view,
                prompt_ids=np.zeros(2, np.int32),
                response_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
                images=asked.problem.images,
                logprobs=-rng.random(length).astype(np.float32),
                versions=np.zeros(length, np.int32),
                segments=np.zeros(length, np.int8),
                prefix="",
                text="",
                parsed=Parsed(None, "", None, {}, ()),
                finish_reason="stop",
                seconds=0.0,
                sampler=sampler,
            )
            for place, length in enumerate(rng.integers(0, asked.sampling.max_tokens + 1, asked.n))
        ),
    )


class Threaded:
    """A sampler on the threads of a pool; `fate(request)` may put `Died` in place of a reply."""

    over = threading.Event()
    """Lets go of what hangs, at the end of a test."""

    def __init__(self, name: str, threads: ThreadPoolExecutor, fate: Callable[[Any], Any]) -> None:
        self.name, self._threads, self.fate = name, threads, fate
        self.alive = True
        self.version: int | None = None
        self.versions: list[int] = []
        self.hangs, self.gone = threading.Event(), threading.Event()
        self.reached = threading.Event()
        self.weights = "as loaded"
        self.waits_in: dict[str, threading.Event] = {}
        self.fails_in: tuple[str, ...] = ()
        self.dies_in: tuple[str, ...] = ()
        self.hangs_in: tuple[str, ...] = ()

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self._threads.submit(self._run, method, *args)

    def watch(self, future: Future[Any], then: Callable[[Any], None]) -> None:
        future.add_done_callback(lambda done: then(done.result()))

    def cancel(self, future: Future[Any]) -> None:
        future.cancel()

    def kill(self) -> None:
        self.alive = False
        self.gone.set()

    def _run(self, method: str, *args: Any) -> Any:
        if method == "answer":
            return self.fate(args[0]) or self._reply(args[0])
        if method in self.waits_in:
            assert self.waits_in[method].wait(60)
        if method in self.fails_in:
            return Refused(ValueError("out of cheese"), f"{self.name}: ValueError: out of cheese")
        if method in self.dies_in:
            return Died("engine", f"{self.name}: the engine's process died")
        if method in self.hangs_in:
            self.hangs.set()
            while not (self.over.is_set() or self.gone.wait(0.01)):
                continue
            return Died("actor", f"{self.name}: gone")
        if method in ("renew", "ready") and args[0] is not None:
            self.version = args[0].version
            self.versions.append(self.version)
            self.reached.set()
        if method in ("renew", "ready"):
            return self.version if method == "renew" else (VOCABULARY, self.version)
        return {"0/layer": self.weights} if method == "weight_checksums" else None

    def _reply(self, asked: Any) -> Any:
        if not self.alive:
            return Died("actor", f"{self.name}: gone")
        if hasattr(asked, "group_id"):
            return group(asked, self.name)
        return -np.ones(len(asked.response_ids), np.float32)


class Samplers:
    """What a pool starts its samplers with; remembers every life, and every pool made here."""

    def __init__(self, fate: Callable[[Any], Any] = lambda asked: None) -> None:
        self.threads = ThreadPoolExecutor(8)
        self.fate = fate
        self.lives: list[Threaded] = []
        self._pools: list[SamplerPool] = []

    def pool(
        self, count: int, settings: SamplerConfig, name: str = "sampler", renewal: float = 120.0
    ) -> SamplerPool:
        """A pool of these samplers, that `close` stops: its thread never outlives a test."""
        self._pools.append(SamplerPool(self, count, settings, name, renewal))
        return self._pools[-1]

    def __call__(self, name: str) -> Threaded:
        self.lives.append(Threaded(name, self.threads, self.fate))
        return self.lives[-1]

    def close(self) -> None:
        """Stop all pools and end all threads, those that hang too."""
        Threaded.over.set()
        for pool in self._pools:
            pool.stop()
        self.threads.shutdown()
        Threaded.over.clear()
