"""A run that does not get on: where every process of it stands, and what the recipe says of it."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.recipe.recipe import Say
from cluster.recipe.sections import WatchConfig
from cluster.record.events import Event, add_events
from cluster.run.nodes import own_actors
from tasks.liveness import silent_since, stacks_of

NODE_SECONDS = 60.0
"""For the stacks of all actors; a node that does not tell by then is named."""
LEAVE_SECONDS = 120.0
"""For a driver that was told to end; then it is ended."""
STUCK = 75
"""Its exit code then: EX_TEMPFAIL of sysexits.h."""


class Stalled(TimeoutError):
    """No actor of a run has answered for `watch.stall_seconds`."""


@contextmanager
def watched(watch: WatchConfig, run: Path | None, say: Say) -> Iterator[None]:
    """Within, a run that does not get on is told of, and ended where the recipe says so.

    The stacks of its processes go to `run/stacks`. Under `on_stall = "stop"` this thread, the main
    one, gets `Stalled`; one that does not end by it within LEAVE_SECONDS is ended: whatever
    supervises the run starts it again.
    """
    if run is None or not watch.stall_seconds or not _is_main():
        yield
        return
    over = threading.Event()
    before = signal.signal(signal.SIGALRM, _raise)
    watcher = _Watcher(watch, run, say, over)
    thread = threading.Thread(target=watcher.run, name="stall-watch", daemon=True)
    thread.start()
    try:
        yield
    except Stalled:
        raise Stalled(watcher.why) from None
    finally:
        with watcher.acting:  # no alarm comes once nobody hears it
            over.set()
        signal.signal(signal.SIGALRM, before)


class _Watcher:
    why = ""

    def __init__(self, watch: WatchConfig, run: Path, say: Say, over: threading.Event) -> None:
        self._watch, self._run, self._say, self._over = watch, run, say, over
        self._main = threading.get_ident()
        self.acting = threading.Lock()

    def run(self) -> None:
        limit, began, reported = self._watch.stall_seconds, time.monotonic(), 0.0
        while not self._over.wait(min(limit / 4, 5.0)):
            since = max(began, silent_since())
            if since == reported or time.monotonic() - since < limit:
                continue
            reported = since  # once a silence
            try:
                stacks = str(write_stacks(self._run, _of_actors))
            except OSError as error:
                stacks = f"not written ({error.strerror})"
            self.why = f"no actor answered for {limit:g} s (watch.stall_seconds); stacks: {stacks}"
            if self._over.is_set():
                return
            with suppress(OSError):
                add_events(self._run, Event("driver", "stalled", self.why))
            self._say(f"warning: {self.why}")
            if self._watch.on_stall == "stop":
                with self.acting:
                    if self._over.is_set():
                        return
                    signal.pthread_kill(self._main, signal.SIGALRM)
                if not self._over.wait(LEAVE_SECONDS):
                    with suppress(OSError):
                        add_events(self._run, Event("driver", "failed", f"Stalled: {self.why}"))
                    os._exit(STUCK)
                return


def write_stacks(run: Path, of_actors: Callable[[], Iterator[tuple[str, str]]]) -> Path:
    """Where each process stands, in a new file below `run/stacks`: the driver, then the actors."""
    file = run / "stacks" / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.txt"
    file.parent.mkdir(exist_ok=True)
    with file.open("w", encoding="utf-8", errors="backslashreplace") as out:
        out.write("== driver\n")
        out.flush()
        faulthandler.dump_traceback(out, all_threads=True)
        for who, stacks in of_actors():
            out.write(f"\n== {who}\n{stacks.rstrip()}\n")
            out.flush()
    return file


def _of_actors() -> Iterator[tuple[str, str]]:
    """Who, and where it stands: every actor of this job that lives."""
    answer: Future[list[tuple[str, str]]] = Future()
    # Ray itself may be what does not answer.
    threading.Thread(target=_ask, args=[answer], daemon=True).start()
    try:
        yield from answer.result(NODE_SECONDS)
    except TimeoutError:
        yield "actors", f"Ray did not tell within {NODE_SECONDS:g} s"
    except Exception as error:
        yield "actors", f"Ray did not tell: {type(error).__name__}: {error}"


def _ask(answer: Future[list[tuple[str, str]]]) -> None:
    try:
        answer.set_result(list(_by_node()))
    except Exception as error:
        answer.set_exception(error)


def _by_node() -> Iterator[tuple[str, str]]:
    context, nodes = ray.get_runtime_context(), defaultdict[str, list[tuple[str, int]]](list)
    for actor in own_actors():
        who = f"{actor['Name'] or actor['ActorClassName']}, process {actor['Pid']}"
        nodes[actor["Address"]["NodeID"]].append((who, actor["Pid"]))
    calls = {}
    for node, processes in nodes.items():
        pids = [pid for _, pid in processes]
        if node == context.get_node_id():  # without Ray, as far as it goes
            yield from zip([who for who, _ in processes], _stacks(pids), strict=True)
        else:
            on_node = NodeAffinitySchedulingStrategy(node, soft=False)
            remote = ray.remote(num_cpus=0, max_retries=0)(_stacks)
            calls[node] = remote.options(scheduling_strategy=on_node).remote(pids)
    until = time.monotonic() + NODE_SECONDS / 2
    for node, call in calls.items():
        names = [who for who, _ in nodes[node]]
        try:
            traces = ray.get(call, timeout=max(0.0, until - time.monotonic()))
        except (RayError, TimeoutError) as error:
            traces = [f"its node does not tell: {type(error).__name__}"] * len(names)
        yield from zip(names, traces, strict=True)


def _stacks(pids: Sequence[int]) -> list[str]:
    with ThreadPoolExecutor(32) as threads:  # each that is frozen takes its time
        return list(threads.map(stacks_of, pids))


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise(*_: int | FrameType | None) -> None:
    raise Stalled
