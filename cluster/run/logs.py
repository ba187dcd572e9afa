"""What actors print, on whichever node, brought to the run's folder (`cluster.record.role_logs`).

Ray's log monitor on each node tells a job's driver what its workers print, with the role that
`tasks.liveness.listen` names. A node whose Ray has none (`--include-log-monitor=false`) tells
nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._raylet import GcsLogSubscriber  # type: ignore[attr-defined]
from ray.exceptions import RpcError

from cluster.record.role_logs import RoleLogs

QUIET_SECONDS = 0.5
"""Without a line for so long, all that was printed has come; Ray looks ten times a second."""
LAST_SECONDS = 3.0
"""For the last lines, whatever still comes."""


@contextmanager
def actor_logs(logs: RoleLogs | None) -> Iterator[None]:
    """Within, lines of this job's actors go to their files; Ray must be connected."""
    if logs is None:
        yield
        return
    context, over = ray.get_runtime_context(), threading.Event()
    subscriber = GcsLogSubscriber(address=context.gcs_address)
    subscriber.subscribe()
    words = (subscriber, context.get_job_id(), logs, over)
    reader = threading.Thread(target=_read, args=words, name="role-logs", daemon=True)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()
        subscriber.close()


def _read(subscriber: Any, job: str, logs: RoleLogs, over: threading.Event) -> None:
    """Until it is over and all has come, or Ray's head is gone, of which the run tells itself."""
    ended = float("inf")
    while time.monotonic() < ended + LAST_SECONDS:
        if over.is_set():
            ended = min(ended, time.monotonic())
        try:
            batch = subscriber.poll(timeout=QUIET_SECONDS)
        except (RpcError, OSError):
            return
        if batch is None:  # the head does not answer for a while
            over.wait(QUIET_SECONDS)
        elif not batch["lines"]:
            if ended < float("inf"):
                return
        elif batch["pid"] == "raylet":  # of no job; it tells whom it ended for want of memory
            logs.take("ray", f"raylet on {batch['ip']}", batch["lines"])
        elif batch["job"] == job:
            process = f"process {batch['pid']} on {batch['ip']}"
            logs.take(batch["actor_name"] or "tasks", process, batch["lines"])
