"""Trackers beside the run folder: what a recipe asks for leaves, and nothing else does.

Each is fed by a thread of its own, so that neither a network that hangs nor a service that fails
can end a run or hold it up; what the run folder holds is whole in any case.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

CLOSE_SECONDS = 30.0
"""How long the end of a run waits for what is still on its way."""
WAITING = 10_000
"""Records that may wait for a slow service; further ones are lost, and counted."""

Row = Mapping[str, str | float]
"""What leaves of a rollout."""


class Sink(Protocol):
    """A tracker, as its own package has it; all calls come from one thread."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of a step; a step may come more than once."""

    def rollouts(self, step: int, rows: Sequence[Row]) -> None:
        """A few rollouts, as text."""

    def close(self) -> None:
        """Send what is left."""


class Wandb:
    """Weights & Biases: without what it tells of its own accord (host, command, code, console)."""

    def __init__(self, project: str, name: str, folder: Path) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, save_code=False,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
            x_save_requirements=False, host="", login_timeout=10,
        )  # fmt: skip
        self._wandb = wandb
        self._run = wandb.init(project=project, name=name, dir=str(folder), settings=settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def rollouts(self, step: int, rows: Sequence[Row]) -> None:
        columns: list[Any] = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[row.get(name) for name in columns] for row in rows]
        table = self._wandb.Table(columns, cells, allow_mixed_types=True)
        self._run.log({"rollouts": table}, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI or in the run folder; other signs in names become `_`."""

    def __init__(self, project: str, name: str, folder: Path) -> None:
        import mlflow

        self._mlflow = mlflow
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # skinny has no database
            mlflow.set_tracking_uri((folder / "mlflow").absolute().as_uri())
        mlflow.set_experiment(project)
        # Else it tells who runs what from where.
        tags = dict.fromkeys(("mlflow.user", "mlflow.source.name"), "equipoise")
        mlflow.start_run(run_name=name, tags=tags, log_system_metrics=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        named = {re.sub(r"[^\w/.\- ]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step)

    def rollouts(self, step: int, rows: Sequence[Row]) -> None:
        self._mlflow.log_dict({"rollouts": [dict(row) for row in rows]}, f"rollouts/{step}.json")

    def close(self) -> None:
        self._mlflow.end_run()


class Swanlab:
    """SwanLab: without what it tells of its own accord (host, command, git, console)."""

    def __init__(self, project: str, name: str, folder: Path) -> None:
        import swanlab

        self._swanlab = swanlab
        probes = ("hardware", "runtime", "requirements", "conda", "git", "monitor")
        settings = swanlab.Settings(
            interactive=False, terminal={"proxy_type": "none"}, probe=dict.fromkeys(probes, False)
        )
        swanlab.init(project=project, name=name, log_dir=str(folder / "swanlab"), settings=settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._swanlab.log(dict(metrics), step=step)

    def rollouts(self, step: int, rows: Sequence[Row]) -> None:
        texts = [self._swanlab.Text(_as_text(row)) for row in rows]
        self._swanlab.log({"rollouts": texts}, step=step)

    def close(self) -> None:
        self._swanlab.finish()


class Trackio:
    """trackio, which keeps its records on this machine unless TRACKIO_SPACE_ID is set."""

    def __init__(self, project: str, name: str, folder: Path) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project, name, embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def rollouts(self, step: int, rows: Sequence[Row]) -> None:
        self._trackio.log({"rollouts": "\n\n".join(map(_as_text, rows))}, step=step)

    def close(self) -> None:
        self._trackio.finish()


class RayMetrics:
    """The metrics agents of the Ray cluster, which Prometheus reads: the latest numbers as a gauge.

    `ray_equipoise_metric{metric="acc/a", project="...", run="..."}`; rollouts are no numbers.
    """

    def __init__(self, project: str, name: str, folder: Path) -> None:
        from ray.util.metrics import Gauge

        self._gauge = Gauge(
            "equipoise_metric",
            description="The latest number of docs/metrics.md under its name there.",
            tag_keys=("metric", "project", "run"),
        )
        self._gauge.set_default_tags({"project": project, "run": name})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in {**metrics, "step": step}.items():
            self._gauge.set(value, {"metric": name})

    def rollouts(self, step: int, rows: Sequence[Row]) -> None:
        """None leaves."""

    def close(self) -> None:
        """Ray's agents are sent the numbers as they are set."""


SINKS: dict[str, Callable[[str, str, Path], Sink]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "swanlab": Swanlab,
    "trackio": Trackio,
    "ray": RayMetrics,
}


class Outside:
    """One tracker of a run, fed by a thread; whatever happens to it is told by one warning."""

    def __init__(self, kind: str, project: str, folder: Path) -> None:
        """Begin at once; `folder` is the run's, whose name the tracker's run gets."""
        self._kind, self._lost, self._failed = kind, 0, False
        self._waiting: queue.Queue[tuple[int, Mapping[str, float], Sequence[Row]] | None]
        self._waiting = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._feed, args=(project, folder), daemon=True)
        self._thread.start()

    def send(self, step: int, metrics: Mapping[str, float], rows: Sequence[Row] = ()) -> None:
        """Hand over numbers of a step, or a few of its rollouts; never waits."""
        if self._failed:
            return
        try:
            self._waiting.put_nowait((step, dict(metrics), tuple(rows)))
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Let what is on its way arrive, within `CLOSE_SECONDS`."""
        until = time.monotonic() + CLOSE_SECONDS
        if not self._failed:
            with suppress(queue.Full):
                self._waiting.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._tell(f"did not take all within {CLOSE_SECONDS:g} s")
        if self._lost:
            self._tell(f"was too slow for {self._lost:,} records")

    def _feed(self, project: str, folder: Path) -> None:
        try:
            sink = SINKS[self._kind](project, folder.absolute().name, folder)
            while (job := self._waiting.get()) is not None:
                step, metrics, rows = job
                if metrics:
                    sink.log(step, metrics)
                if rows:
                    sink.rollouts(step, rows)
            sink.close()
        except (Exception, SystemExit) as error:
            self._failed = True
            self._tell(f"failed: {type(error).__name__}: {error}")

    def _tell(self, message: str) -> None:
        first = message.strip().partition("\n")[0]
        warnings.warn(
            f"tracker {self._kind} {first}; the run goes on, and its folder has everything",
            stacklevel=2,
        )


def _as_text(row: Row) -> str:
    return "\n".join(f"{name}: {value}" for name, value in row.items())
