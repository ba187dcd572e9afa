"""A vLLM engine on a thread of its own in this process, asked from an event loop.

vLLM's own `AsyncLLM` keeps its core in a further process, which imports vLLM, torch and
transformers a second time, and is sent every request and every token. A sampler is a process of
its own already, that Ray starts again when it is lost.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

T = TypeVar("T")
Work = Callable[["LLMEngine"], Any]


class EngineFailed(RuntimeError):
    """A step of the engine failed, or it was shut down: it answers no more."""


class EngineThread:
    """An engine that takes a step as long as it has requests, and work between two steps."""

    def __init__(self, args: Any, threads: int) -> None:
        """Start an engine by vLLM's `EngineArgs`; raises what vLLM raises.

        `threads`: of torch, for what the engine computes on a CPU.
        """
        self._work: queue.SimpleQueue[tuple[Work, Future[Any]] | None] = queue.SimpleQueue()
        self._running: dict[str, Future[RequestOutput]] = {}
        self._paused = False
        self._failure: BaseException | None = None
        started: Future[tuple[int, int]] = Future()
        self._thread = threading.Thread(
            target=self._run, args=[args, threads, started], name="engine", daemon=True
        )
        self._thread.start()
        self.vocabulary, self.context = started.result()
        """How many token ids the model can draw from, and of how many a sequence may be."""

    async def do(self, work: Callable[[LLMEngine], T]) -> T:
        """What `work` returns, called on the engine's thread between two steps.

        Raises what it raises, and EngineFailed where the engine has failed or fails meanwhile.
        """
        result: Future[T] = Future()
        self._work.put((work, result))
        if self._failure is not None:  # the thread may have looked for the last time
            self._end()
        return await asyncio.wrap_future(result)

    async def generate(self, request_id: str, prompt: Any, params: Any) -> RequestOutput:
        """The finished output of a request; dropped where nobody waits for it any more.

        Raises what vLLM says of the request, and EngineFailed as `do`.
        """
        finished: Future[RequestOutput] = Future()

        def add(llm: LLMEngine) -> None:
            llm.add_request(request_id, prompt, params)
            self._running[request_id] = finished

        def drop(llm: LLMEngine) -> None:
            if self._running.pop(request_id, None) is not None:
                llm.abort_request([request_id])

        try:
            await self.do(add)
            return await asyncio.wrap_future(finished)
        finally:
            if not finished.done() or finished.cancelled():
                self._work.put((drop, Future()))

    async def pause(self) -> None:
        """Take no step until `resume`; running requests keep their place."""
        await self.do(self._drain)

    async def resume(self) -> None:
        """Take steps again."""

        def resume(llm: LLMEngine) -> None:
            self._core(llm).resume_scheduler()
            self._paused = False

        await self.do(resume)

    def shutdown(self) -> None:
        """Stop the engine and its workers; what waits for it gets EngineFailed."""
        self._work.put(None)
        self._thread.join()

    def _run(self, args: Any, threads: int, started: Future[tuple[int, int]]) -> None:
        try:
            # Of this thread's own pool; vLLM leaves it alone where threads are not bound to cores.
            torch.set_num_threads(threads)
            from vllm.v1.engine.llm_engine import LLMEngine

            llm = LLMEngine.from_engine_args(args, enable_multiprocessing=False)
        except BaseException as error:
            started.set_exception(error)
            return
        config = llm.model_config
        started.set_result((int(config.get_vocab_size()), int(config.max_model_len)))
        try:
            while self._work_off(llm):
                if llm.has_unfinished_requests() and not self._paused:
                    self._step(llm)
            self._failure = EngineFailed("it was shut down")
        except BaseException as error:  # whatever ends the thread, who waits is told
            self._failure = error
        self._end()
        llm.engine_core.shutdown()

    def _work_off(self, llm: LLMEngine) -> bool:
        """Do what is asked, waiting for it where there is no step to take; False: to stop."""
        idle = self._paused or not llm.has_unfinished_requests()
        while idle or not self._work.empty():
            item = self._work.get()
            if item is None:
                return False
            work, result = item
            if not result.set_running_or_notify_cancel():
                continue
            try:
                result.set_result(work(llm))
            except Exception as error:
                result.set_exception(error)
            idle = self._paused or not llm.has_unfinished_requests()
        return True

    def _step(self, llm: LLMEngine) -> None:
        for output in llm.step():
            if output.finished and output.request_id in self._running:
                finished = self._running.pop(output.request_id)
                if finished.set_running_or_notify_cancel():
                    finished.set_result(output)

    def _drain(self, llm: LLMEngine) -> None:
        core = self._core(llm)
        core.pause_scheduler(mode="keep", clear_cache=False)
        while core.batch_queue:  # steps that an accelerator has begun belong to the old weights
            self._step(llm)
        self._paused = True

    @staticmethod
    def _core(llm: LLMEngine) -> Any:
        return llm.engine_core.engine_core

    def _end(self) -> None:
        """Tell all who wait."""
        error = EngineFailed(f"{type(self._failure).__name__}: {self._failure}")
        error.__cause__ = self._failure
        waiting = list(self._running.values())
        self._running.clear()
        with suppress(queue.Empty):
            while True:
                if (item := self._work.get_nowait()) is not None:
                    waiting.append(item[1])
        for future in waiting:
            if not future.done():
                future.set_exception(error)
