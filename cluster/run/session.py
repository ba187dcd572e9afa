"""What every command begins and ends with: Ray, its folder, its input, an error that says why.

A failure of any actor becomes a `RunFailed` with that actor's own error on top, is written to the
run folder, and ends the run.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.recipe.fetching import model_uris, pinned_recipe
from cluster.recipe.machine import claimed, full_shared_memory, os_error_text, require_answer
from cluster.recipe.placement import Command
from cluster.recipe.preflight import Ready, ask_input, ask_machine
from cluster.recipe.recipe import Recipe, RunFailed, Say, UserError
from cluster.record.events import FOR_GOOD, Event, add_events
from cluster.record.mirror import require_mirror
from cluster.record.role_logs import RoleLogs, driver_log
from cluster.run.checkpoints import Resumed
from cluster.run.keeping import disk_error
from cluster.run.kept import is_keeping
from cluster.run.logs import actor_logs
from cluster.run.nodes import fetch_on_nodes, wait_for_nodes
from cluster.run.own_ray import closed_to_others, end_of_own_node
from cluster.run.stall import watched
from rewards.scored import RewardError
from rollout.dispatch import SamplerLost
from rollout.transfer import WeightTransferError
from tasks.files import put_text

LOCAL_RAY_TRIES = 3


@contextmanager
def connected(address: str | None, meanwhile: Callable[[], Any] = lambda: None) -> Iterator[Any]:
    """Attach to a Ray cluster, or start a local one; leave it, or end it, with the block.

    Within `cluster.run.kept.keeping` it stays, and is there already for the next.

    `meanwhile` is called on another thread, since a Ray that starts is mostly waited for; the
    block gets what it returns, and what it raises is raised here. (Ray itself starts on this
    thread: its processes end with the thread that began them.)
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is not None:
        print(f"connecting to {address} ...", file=sys.stderr, flush=True)
        require_answer(address)
    answer: Future[Any] = Future()
    # A daemon, so that Ctrl-C ends a command whatever is still being asked.
    threading.Thread(target=_call, args=[meanwhile, answer], daemon=True).start()
    _attach(address)
    try:
        yield answer.result()
    finally:
        if not is_keeping():
            ray.shutdown()


def _call(work: Callable[[], Any], outcome: Future[Any]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)


def _attach(address: str | None) -> None:
    """`ray.init`, tried again where a local node was slow to come up.

    Ray gives a new node 30 seconds, which a busy machine can take; it raises a bare Exception.
    Without an address it would join whatever cluster was last started on this machine: a run
    joins only the one that it is told, by `address` or, as the jobs of a cluster are, by
    RAY_ADDRESS.
    """
    own_ray = address is None and not _told_by_job()
    job = address is None and not own_ray
    for tries_left in range(LOCAL_RAY_TRIES - 1, -1, -1):
        try:
            # A node of our own hands its environment on, so that the workers that it starts at
            # once are those that the actors get; asked for by each job, they would not fit.
            with (
                _environment(_worker_environment() if own_ray else {}),
                closed_to_others() if own_ray and not ray.is_initialized() else nullcontext(),
            ):
                ray.init(
                    address="local" if own_ray else address,
                    include_dashboard=None if address else False,
                    log_to_driver=False,
                    logging_level="error",
                    ignore_reinit_error=True,
                    runtime_env={"env_vars": _worker_environment()} if job else None,
                )
            return
        except Exception as error:
            ray.shutdown()
            if address is not None:
                why = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(f"--address {address}: Ray cannot join it: {why}") from error
            if not tries_left or "timed out" not in str(error):
                raise


def _told_by_job() -> bool:
    """Whether this is a job of a cluster, which says so itself."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """What is started within has these variables too."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _worker_environment() -> dict[str, str]:
    """What local workers need to find the same code as the driver, and to keep quiet."""
    paths = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@contextmanager
def session(
    recipe: Recipe,
    command: Command,
    address: str | None,
    folder: Path | None,
    say: Say,
    resumed: Resumed | None = None,
) -> Iterator[Ready]:
    """A command's folder, if it writes one, its input, and a Ray that has room for it.

    What the recipe names by URI is on every node then, and pinned in `Ready.recipe`. Input that
    cannot be used is refused before more than Ray is started, or anything is written.
    Raises RunFailed with the failing actor's own error on top, also in `<folder>/error.txt`.
    """
    logs = RoleLogs(folder) if folder else None
    with (
        driver_log(logs),
        claimed(folder, new=resumed is None) if folder else nullcontext(),
    ):
        recipe = pinned_recipe(recipe, say)
        ask_machine(recipe, command, say, folder=folder)
        if recipe.output.mirror and folder and command != "eval":
            require_mirror(recipe.output.mirror, folder, resumed is not None)
        ask = partial(ask_input, recipe, command, say)
        with (
            connected(address, ask) as ready,
            actor_logs(logs),
            actor_errors(folder),
            watched(recipe.watch, folder, say),
        ):
            wait_for_nodes(recipe, command, say, own_ray=address is None and not _told_by_job())
            fetch_on_nodes(model_uris(recipe), recipe.placement, say)
            for reason in resumed.refused if resumed else ():
                say(f"warning: checkpoint refused: {reason}")
            if resumed:
                unit = "update" if command == "sft" else "step"
                say(f"going on after {unit} {resumed.position.step}, from {resumed.checkpoint}")
            if logs:
                logs.open()
            yield ready


@contextmanager
def actor_errors(folder: Path | None) -> Iterator[None]:
    """Turn an actor's error into RunFailed with that error on top; kept in `folder`, if any."""
    try:
        yield
    except (
        RunFailed,
        RayError,
        RewardError,
        SamplerLost,
        WeightTransferError,
        TimeoutError,
    ) as error:
        message = explain(error)
        if folder is not None:
            # A full disk may be what ended the run.
            with suppress(OSError, ValueError):
                folder.mkdir(parents=True, exist_ok=True)
                put_text(folder / "error.txt", message + "\n")
                kind = FOR_GOOD if comes_again(error) else "failed"
                add_events(folder, Event("driver", kind, _in_a_line(message)))
        if isinstance(error, RunFailed):
            raise
        raise RunFailed(message) from error


def _in_a_line(message: str) -> str:
    """The first line of an error, with whose process died, which Ray tells further down."""
    first, actor = message.partition("\n")[0], re.search(r"^\s*class_name: (\S+)", message, re.M)
    return f"{first} ({actor[1]})" if actor else first


def comes_again(error: BaseException) -> bool:
    """Whether a run that goes on would only meet the same error: not one of a process or a node.

    What a rank raised may be a peer's death; the same at the same step tells (`again`).
    """
    return isinstance(error, RunFailed | RewardError) or disk_error(error) is not None


def explain(error: BaseException) -> str:
    """The actor's own error first, then where it happened.

    Of one that died: what else is known to kill, where that is so on this machine now.
    """
    told = _explained(error)
    died = isinstance(error, RayError | SamplerLost) and not isinstance(error, RayTaskError)
    cause = (end_of_own_node() or full_shared_memory()) if died else ""
    return f"{cause}; {told}" if cause else told


def _explained(error: BaseException) -> str:
    if isinstance(error, RunFailed):
        return str(error)
    if isinstance(error, RayTaskError):
        cause = error.cause
        if (full := disk_error(error)) is not None:
            return os_error_text(full)
        return f"{type(cause).__name__}: {cause}\n\n{error}"
    if isinstance(error, RayActorError):
        return f"an actor's process died: {error}"
    return f"{type(error).__name__}: {error}"
