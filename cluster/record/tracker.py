"""The writing end of a run folder (`folder.py` says what is in it)."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.recipe.sections import OutputConfig
from cluster.record.evaluation import EvalTable
from cluster.record.folder import (
    DEMONSTRATION_SCHEMA,
    METRIC_SCHEMA,
    ROLLOUT_COLUMNS,
    ROLLOUT_SCHEMA,
    TOKEN_ARRAYS,
    TRUTH_COLUMNS,
    metric_parts,
    named_values,
    read_rows,
    step_file,
)
from cluster.record.metric_table import unlisted
from cluster.record.outside import Outside
from cluster.record.stored import read_metrics
from cluster.record.versions import environment
from rewards.advantages import CREDIT_COLUMNS, NO_CALL_COLUMNS
from rewards.scored import ScoredGroup
from tasks.files import put, put_text

if TYPE_CHECKING:
    from learner.batch import TrainBatch  # torch


class UnlistedMetric(ValueError):
    """A metric that is not in the table."""


class Tracker:
    """Writes a run's records; use it in a `with` block or call `close`."""

    def __init__(
        self,
        run_dir: Path | str,
        recipe_toml: str | None = None,
        after_step: int | None = None,
        output: OutputConfig | None = None,
    ) -> None:
        """Open a new run folder, or go on in one (a later value of a step's metric counts).

        `recipe_toml` is the resolved recipe's text; None leaves the file alone. `after_step`: the
        run goes on from the end of that step, and what later steps left behind is removed.
        `output`: which rollouts stay; without it all of them.
        """
        # Two seconds of imports that reading a run does not need.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.run_dir = Path(run_dir)
        for folder in ("metrics", "rollouts", "images"):
            (self.run_dir / folder).mkdir(parents=True, exist_ok=True)
        if recipe_toml is not None:
            put_text(self.run_dir / "recipe.toml", recipe_toml)
        versions = json.dumps(environment(), indent=2, sort_keys=True) + "\n"
        put_text(self.run_dir / "versions.json", versions)
        self._events = EventFileWriter(str(self.run_dir / "tensorboard"))
        if after_step is not None:
            self._rewind(after_step)
        self._part = max((int(p.stem[5:]) for p in metric_parts(self.run_dir)), default=0)
        self._images: set[str] = set()
        self._output = output or OutputConfig()
        self._first_step = (after_step or 0) + 1
        self._known: set[str] = set()
        of_recipe = self._output
        self._outside = [Outside(k, of_recipe.project, self.run_dir) for k in of_recipe.trackers]

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError as closing:
            if error is None:
                raise
            # A disk that takes no more ended the block; the parts of the metrics are there.
            error.add_note(f"nor could the metrics be joined: {closing}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write numbers of a step; the names are those of docs/metrics.md.

        Raises UnlistedMetric, which names all that are not, up to the first step of this
        process. Later such a number is told by a warning and left out: no run dies of it late.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        refused = self._refused(step, metrics)
        now = time.time()
        rows = [(step, name, float(v), now) for name, v in metrics.items() if name not in refused]
        if not rows:
            return
        self._part += 1
        columns = [
            pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), METRIC_SCHEMA, strict=True)
        ]
        table = pa.Table.from_arrays(columns, schema=METRIC_SCHEMA)
        part = self.run_dir / "metrics" / f"part-{self._part:06d}.parquet"
        put(part, lambda path: pq.write_table(table, path))
        values = [Summary.Value(tag=name, simple_value=value) for _, name, value, _ in rows]
        self._events.add_event(Event(step=step, wall_time=now, summary=Summary(value=values)))
        self._events.flush()
        for tracker in self._outside:
            tracker.send(step, {name: value for _, name, value, _ in rows})

    def log_evaluation(self, step: int, tables: Mapping[str, EvalTable]) -> None:
        """Write an evaluation, a table a task, whole; then its numbers under `eval/<task>/`."""
        put_evaluation(self.run_dir, step, tables)
        rows = [(task, row) for task, table in tables.items() for row in table.rows]
        self.log(step, {f"eval/{task}/{row.metric}": row.value for task, row in rows})

    def log_rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Write every rollout of a step, in one file, and the images not yet written.

        What [output] does not ask for is not written, and what it asks no longer is removed.
        """
        every, keep = self._output.rollouts_every, self._output.rollouts_keep
        if step > 1 and (not every or step % every):
            return
        rows = []
        for scored in groups:
            images = [self._save_image(image) for image in scored.group.problem.images]
            for i, rollout in enumerate(scored.group.rollouts):
                row = _rollout_row(step, scored, i, images)
                if rollout.turns:
                    row["shown_sha256"] = [self._save_image(image) for image in rollout.images]
                    turns = [asdict(turn) for turn in rollout.turns]
                    episode = _storable({"turns": turns, "failure": rollout.failure})
                    row["episode"] = json.dumps(episode)
                rows.append(row)
        if tracked := [_told_outside(row) for row in rows[: self._output.tracked_rollouts]]:
            for tracker in self._outside:
                tracker.send(step, {}, tracked)
        if not self._output.rollout_tokens:
            rows = [row | dict.fromkeys(TOKEN_ARRAYS) for row in rows]
        self._put_table("rollouts", step, rows, ROLLOUT_SCHEMA)
        if keep:
            self._forget_all_but(keep)

    def log_demonstrations(self, step: int, batch: TrainBatch) -> None:
        """Write the demonstrations of an update (`DEMONSTRATION_SCHEMA`) and their images."""
        rows = [
            {
                "prompt_ids": sequence.prompt_ids,
                "response_ids": sequence.response_ids,
                "segments": sequence.segments,
                "image_sha256": [self._save_image(image) for image in sequence.images],
            }
            for sequence in batch.sequences
        ]
        self._put_table("demonstrations", step, rows, DEMONSTRATION_SCHEMA)

    def close(self) -> None:
        """Join the metric parts into one table. Safe to call twice."""
        self._events.close()
        while self._outside:
            self._outside.pop().close()
        if metric_parts(self.run_dir):
            self._join(read_metrics(self.run_dir))

    def _refused(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Names that are not in the table; each is told once."""
        if not (refused := unlisted(metrics.keys() - self._known)):
            self._known |= metrics.keys()
            return []
        line = f"not in cluster/record/metrics.toml, so not logged: {', '.join(refused)}"
        if step <= self._first_step:
            raise UnlistedMetric(line)
        warnings.warn(line, stacklevel=3)
        return refused

    def _put_table(
        self, kind: str, step: int, rows: list[dict[str, Any]], schema: pa.Schema
    ) -> None:
        table = pa.Table.from_pylist(rows, schema=schema)
        file = step_file(self.run_dir, kind, step)
        file.parent.mkdir(exist_ok=True)
        put(file, lambda path: pq.write_table(table, path, compression="zstd"))

    def _join(self, metrics: pa.Table) -> None:
        """Write all metrics as one table, in the place of its parts."""
        put(self.run_dir / "metrics.parquet", lambda path: pq.write_table(metrics, path))
        for part in metric_parts(self.run_dir):
            part.unlink()

    def _forget_all_but(self, keep: int) -> None:
        """Remove the rollouts of all steps but the first and the last `keep`, and their images."""
        first, *files = sorted((self.run_dir / "rollouts").glob("step-*.parquet"))
        old, retained = files[:-keep], [first, *files[-keep:]]

        def images(of: Sequence[Path]) -> set[str]:
            names = ("image_sha256", "shown_sha256")
            only = pa.schema([ROLLOUT_SCHEMA.field(name) for name in names])
            columns = [column for file in of for column in read_rows(file, only)]
            lists = [images for column in columns for images in column.to_pylist()]
            return {sha for images in lists for sha in images or ()}

        gone = images(old) - images(retained) if old else set()
        for file in old:
            file.unlink()
        for sha in gone:
            for file in (self.run_dir / "images").glob(f"{sha}.*"):
                file.unlink()
            self._images.discard(sha)

    def _rewind(self, step: int) -> None:
        """Forget every step after `step`, and how the run ended."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if (self.run_dir / "metrics.parquet").exists() or metric_parts(self.run_dir):
            table = read_metrics(self.run_dir)
            # The warm-up of vision counts steps of its own, all before SFT's first.
            early = pc.or_(
                pc.less_equal(table["step"], step), pc.starts_with(table["name"], "warmup/")
            )
            self._join(table.filter(early))
        for pattern in ("rollouts/step-*.parquet", "evaluations/step-*.json"):
            for file in self.run_dir.glob(pattern):
                if int(file.stem[5:]) > step:
                    file.unlink()
        for name in ("evaluation.json", "error.txt"):
            (self.run_dir / name).unlink(missing_ok=True)
        # TensorBoard drops what it read from this step on.
        start = SessionLog(status=SessionLog.START)
        self._events.add_event(Event(step=step + 1, wall_time=time.time(), session_log=start))

    def _save_image(self, image: bytes) -> str:
        sha = hashlib.sha256(image).hexdigest()
        if sha not in self._images:
            suffix = "jpg" if image.startswith(b"\xff\xd8") else "png"
            file = self.run_dir / "images" / f"{sha}.{suffix}"
            if not file.exists():
                put(file, lambda path: path.write_bytes(image))
            self._images.add(sha)
        return sha


def put_evaluation(run_dir: Path, step: int, tables: Mapping[str, EvalTable]) -> None:
    """Write an evaluation, a table a task, whole."""
    file = step_file(run_dir, "evaluations", step)
    file.parent.mkdir(exist_ok=True)
    tables_json = {task: table.to_dict() for task, table in tables.items()}
    put_text(file, json.dumps(tables_json, indent=1))


def _rollout_row(step: int, scored: ScoredGroup, i: int, images: list[str]) -> dict[str, Any]:
    rollout, problem, truth = scored.group.rollouts[i], scored.group.problem, scored.diagnosis
    parsed = rollout.parsed
    row = {name: getattr(rollout, name) for name in ROLLOUT_COLUMNS}
    row |= {
        "group_id": scored.group.group_id,
        "step": step,
        "problem_id": problem.id,
        "task": problem.task,
        "prompt": problem.prompt,
        "true_perception": problem.perception,
        "truth": json.dumps(dict(problem.truth)),
        "knobs": json.dumps(dict(problem.knobs)),
        "symmetry_key": problem.symmetry_key,
        "image_sha256": images,
        "extra": json.dumps(dict(problem.extra)) if problem.extra else None,
        "perception": None if parsed.perception is None else repr(parsed.perception),
        "answer": None if parsed.answer is None else repr(parsed.answer),
        "defects": list(parsed.defects),
        "terms": named_values({name: values[i] for name, values in scored.terms.items()}),
        "total": float(scored.totals[i]),
        "advantages": named_values(
            {
                name: value
                for name, value in zip(CREDIT_COLUMNS, scored.advantages[i], strict=True)
                if rollout.turns or name in NO_CALL_COLUMNS
            }
        ),
        "zero_variance": scored.zero_variance,
        "dropped": scored.dropped,
        "failures": [f"{f.term}: {f.kind}: {f.message}" for f in scored.failures],
    }
    if truth is not None:
        truths = {name: getattr(truth, name) for name in TRUTH_COLUMNS}
        row |= {name: values[i].item() for name, values in truths.items() if values is not None}
    return {name: _storable(value) for name, value in row.items()}


def _told_outside(row: Mapping[str, Any]) -> dict[str, str | float]:
    """What leaves of a stored rollout."""
    tracked = {name: row[name] for name in ("task", "prompt", "text", "total")}
    return tracked | {f"reward/{each['name']}": each["value"] for each in row["terms"]}


def _storable(value: Any) -> Any:
    """Text that UTF-8 can hold: a lone surrogate becomes its escape; the ids are the truth."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return {name: _storable(item) for name, item in value.items()}
    return value
