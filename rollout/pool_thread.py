"""The thread of a pool: it hears what samplers answer, hands out work while engines have room, and
starts again what dies, hangs or returns garbage. What it decides is decided by `rollout.dispatch`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rollout.dispatch import Dispatch, SamplerLost
from rollout.jobs import Cause, Command, Died, PoolClient, Refused, retire
from rollout.record import Weights
from rollout.settings import SamplerConfig
from tasks.liveness import beat

TICK_SECONDS = 0.5
"""How often the pool looks at the clock when nothing happens."""


class PoolThread:
    """A pool's dispatch, the processes of its samplers, and the thread that stands between them."""

    def __init__(
        self,
        start: Callable[[str], PoolClient],
        count: int,
        settings: SamplerConfig,
        name: str = "sampler",
        renewal: float = 120.0,
    ) -> None:
        """`start` starts the process of a sampler, named `<name>-<index>`, and does not wait.

        `renewal`: seconds in which a sampler must have fetched a version of the weights.
        """
        self._weights: Weights | None = None
        self._start, self._settings = start, settings
        self._clients: dict[str, tuple[int, PoolClient]] = {}
        self._calls: dict[int, Any] = {}
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._changed = threading.Condition(threading.RLock())
        self._stopped = False
        self.turn: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Entered while the samplers are waited for: it is their turn then."""
        names = [f"{name}-{index}" for index in range(count)]
        self._dispatch = Dispatch(names, settings, time.monotonic(), renewal)
        self._carry_out()
        self._thread = threading.Thread(target=self._run, name=f"{name}-pool", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Shut the engines down, then their actors; nothing where that is done."""
        retire(self.release())

    def release(self) -> list[PoolClient]:
        """End the pool and not its samplers, which are returned for another pool to start with."""
        with self._changed:
            self._stopped = True
        self._events.put(())
        self._thread.join()
        with self._changed:
            clients, self._clients = self._clients, {}
        return [client for _, client in clients.values()]

    def _tell(self, event: Callable[[float], None]) -> None:
        """Let the dispatch know of something, and the thread carry out what follows."""
        with self._changed:
            event(time.monotonic())
            self._changed.notify_all()
        self._events.put(())

    def _wait(self, is_over: Callable[[], bool], until: float | None = None) -> None:
        """Wait, on the caller's thread, until `is_over` or `until`; raises the pool's own error."""
        with self._changed:
            while not is_over():
                if self._dispatch.error is not None:
                    raise self._dispatch.error
                seconds = TICK_SECONDS if until is None else until - time.monotonic()
                if seconds <= 0:
                    return
                self._changed.wait(min(TICK_SECONDS, seconds))

    def _run(self) -> None:
        """The pool's thread: events in, commands out."""
        try:
            while not self._stopped:
                events = [self._next_event()]
                while not self._events.empty():
                    events.append(self._events.get())
                with self._changed:
                    for event in filter(None, events):
                        self._hear(*event)
                    # After what was heard: an answer that waited for this thread is not late.
                    self._dispatch.tick(time.monotonic())
                    self._changed.notify_all()
                self._carry_out()
        except BaseException as error:
            with self._changed:
                self._dispatch.error = error
                self._changed.notify_all()
            raise

    def _next_event(self) -> tuple[Any, ...]:
        with self._changed:
            due = self._dispatch.next_due()
        seconds = TICK_SECONDS if due is None else due - time.monotonic()
        try:
            return self._events.get(timeout=max(0.0, min(TICK_SECONDS, seconds)))
        except queue.Empty:
            return ()

    def _hear(self, action: str, name: str, life: int, ticket: int, result: Any) -> None:
        now, dispatch = time.monotonic(), self._dispatch
        if action != "ping":  # an engine that only lives does not get on
            beat()
        if action == "send":
            self._calls.pop(ticket, None)
            dispatch.replied(name, life, ticket, result, now)
        elif not isinstance(result, Died | Refused):
            if action == "start":
                vocabulary, version = result
                dispatch.started(name, life, vocabulary, version, now)
            elif action == "renew":
                dispatch.renewed(name, life, result, now)
            elif action == "sleep":
                dispatch.slept(name, life, now)
            elif action == "wake":
                dispatch.woken(name, life, result, now)
            else:
                dispatch.ponged(name, life, now)
        elif action == "start" and dispatch.initial:
            refusal = result.error if isinstance(result, Refused) else None
            dispatch.error = dispatch.error or refusal or SamplerLost(result.message)
        else:
            cause: Cause = "transfer" if action in ("renew", "wake") else "engine"
            if action == "start":
                cause = "start"
            elif isinstance(result, Died):  # whatever it was asked to do meanwhile
                cause = result.cause
            dispatch.lost(name, life, cause, result.message, now)

    def _carry_out(self) -> None:
        """Do what the dispatch asks for. Only the pool's thread is here (and its maker, once)."""
        with self._changed:
            commands = self._dispatch.take()
        for command in commands:
            self._do(command)

    def _do(self, command: Command) -> None:
        name, life = command.name, command.life
        if command.do == "start":
            fresh = self._start(name)
            with self._changed:
                self._clients[name] = (life, fresh)
                weights = self._weights
            self._watch(command, fresh, fresh.call("ready", weights))
            return
        current, client = self._clients[name]
        if current != life:
            return
        if command.do == "send":
            call = client.call("answer", command.request)
            self._calls[command.ticket] = call
            self._watch(command, client, call)
        elif command.do == "drop":
            # Its reply may have come between the decision and here.
            if (call := self._calls.pop(command.ticket, None)) is not None:
                client.cancel(call)
        elif command.do in ("ping", "renew", "sleep", "wake"):
            arguments = (self._weights,) if command.do in ("renew", "wake") else ()
            self._watch(command, client, client.call(command.do, *arguments))
        else:
            with self._changed:
                del self._clients[name]
            if command.do == "kill":
                client.kill()
            else:
                threading.Thread(target=retire, args=([client],), daemon=True).start()

    def _watch(self, command: Command, client: PoolClient, future: Any) -> None:
        heard = (command.do, command.name, command.life, command.ticket)
        client.watch(future, lambda result: self._events.put((*heard, result)))
