"""The reading end of a run folder: metrics, scores alone, or groups that can be scored again.

Shapes: G rollouts in a group. `tracker.py` wrote what is read here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.record.folder import (
    MAY_BE_ABSENT,
    METRIC_SCHEMA,
    ROLLOUT_COLUMNS,
    ROLLOUT_SCHEMA,
    TOKEN_ARRAYS,
    TRUTH_COLUMNS,
    by_name,
    image_lists,
    metric_parts,
    read_rows,
    step_file,
)
from rewards.advantages import CREDIT_COLUMNS, NO_CALL_COLUMNS
from rewards.scored import Diagnosis, FailureKind, ScoredGroup, TermFailure, measured
from rollout.record import Group, Rollout, Turn, as_turns, viewed
from tasks.core import DataError, Problem, Task
from tasks.load import load_task
from tasks.placeholders import as_shown
from tasks.turns import read_turns

Row = Mapping[str, Any]
T = TypeVar("T")

SCORE_COLUMNS = (
    *("group_id", "step", "task", "symmetry_key", "defects", "terms", "total", "zero_variance"),
    *("dropped", "failures", *TRUTH_COLUMNS),
)
GROUP_COLUMNS = (
    *("problem_id", "prompt", "true_perception", "truth", "knobs", "image_sha256", "extra"),
    *("shown_sha256", "episode", *ROLLOUT_COLUMNS),
)
_STEP_FILE = re.compile(r"step-(\d+)\.parquet")
_FAILURE = re.compile(rf"(.*?): ({'|'.join(get_args(FailureKind))}): (.*)", re.DOTALL)


@dataclass(frozen=True)
class StoredScores:
    """What a run recorded about one group.

    Attributes:
        symmetry_key: of the problem; with the task it names the puzzle.
        terms: term name -> float64 [G], as in `ScoredGroup`: a failed term is absent, or zero
            where the recipe counts it as zero.
        totals: float64 [G], NaN where dropped.
        failures: without tracebacks, which are not stored.
        diagnosis: None where the task's own code failed.
    """

    step: int
    task: str
    symmetry_key: str
    group_id: str
    terms: Mapping[str, np.ndarray]
    totals: np.ndarray
    zero_variance: bool
    dropped: bool
    failures: tuple[TermFailure, ...]
    diagnosis: Diagnosis | None

    def measured(self) -> dict[str, np.ndarray]:
        """The terms that gave values of their own; zeros that stand for a failure are not."""
        return measured(self.terms, self.failures)


@dataclass(frozen=True)
class StoredGroup:
    """A group as it was sampled, parsed again by its task, with what the run recorded.

    Text that UTF-8 cannot hold was stored as escapes, so it may parse differently than it did;
    the token ids are as they were.
    """

    group: Group
    scores: StoredScores


def read_metrics(run_dir: Path | str) -> pa.Table:
    """All metrics of a run (`METRIC_SCHEMA`), running, ended or crashed.

    Where a step was logged twice (a resumed run repeats the step it crashed in), the later
    value stands. Raises FileNotFoundError for a folder that holds no metrics.
    """
    whole = Path(run_dir) / "metrics.parquet"
    files = [*([whole] if whole.exists() else []), *metric_parts(Path(run_dir))]
    if not files:
        raise FileNotFoundError(f"{run_dir}: no metrics.parquet and no metrics/part-*.parquet")
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for file in files:
        for row in pq.read_table(file, schema=METRIC_SCHEMA).to_pylist():
            rows[row["step"], row["name"]] = row
    return pa.Table.from_pylist(list(rows.values()), schema=METRIC_SCHEMA)


def last_step(run_dir: Path) -> int:
    """The last step that a run logged, ended or crashed; 0 where it logged none."""
    try:
        rows = read_metrics(run_dir).to_pylist()
    except FileNotFoundError:
        return 0
    # The warm-up of vision counts steps of its own.
    return max((row["step"] for row in rows if not row["name"].startswith("warmup/")), default=0)


def last_logged_step(run_dir: Path) -> int:
    """The step that a run which goes on logged last; 0 where it logged none yet.

    Raises OSError where a part of the metrics cannot be read, as when it was just joined.
    """
    parts = metric_parts(run_dir)
    return max(pq.read_table(parts[-1], columns=["step"])["step"].to_pylist()) if parts else 0


def read_rollouts(run_dir: Path | str, step: int) -> pa.Table:
    """The rollouts of a step (`ROLLOUT_SCHEMA`), in scoring order.

    Raises FileNotFoundError for a step without rollouts.
    """
    file = _file(run_dir, step)
    if not file.exists():
        raise FileNotFoundError(f"{file}: this run holds no rollouts of step {step}")
    return read_rows(file, ROLLOUT_SCHEMA)


def stored_steps(run_dir: Path | str) -> list[int]:
    """Steps whose rollouts a run folder holds, ascending.

    Raises DataError for a folder that is no run's.
    """
    folder = Path(run_dir) / "rollouts"
    matches = (_STEP_FILE.fullmatch(file.name) for file in folder.glob("step-*.parquet"))
    steps = sorted(int(match[1]) for match in matches if match)
    if not steps:
        defect = "no folder" if not Path(run_dir).is_dir() else "no run with rollouts"
        raise DataError(
            f"{run_dir}: {defect}: expected rollouts/step-*.parquet in it; give the run folder "
            "that `equipoise train` printed"
        )
    return steps


def not_kept(run_dir: Path | str) -> str | None:
    """Which of a run's rollouts, or what of them, is not in its folder, in words; None if all is.

    Raises DataError for a folder that is no run's.
    """
    steps = stored_steps(run_dir)
    try:
        names = ("step", "name")
        logged = zip(*(read_metrics(run_dir)[name].to_pylist() for name in names), strict=True)
        trained = {step for step, name in logged if name == "group/count"}
    except FileNotFoundError:
        trained = set()
    missing = sorted((trained | set(range(1, steps[-1] + 1))) - set(steps))
    defects = []
    if missing:
        count = len(steps) + len(missing)
        listed = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        defects.append(f"the rollouts of {len(missing)} of {count} steps ({listed}) are not there")
    if tokens_missing(_file(run_dir, steps[-1])):
        defects.append("token arrays are not there")
    return " and ".join(defects) + " (see [output] in its recipe)" if defects else None


def tokens_missing(file: Path) -> bool:
    """Whether a file of rollouts was written without token arrays."""
    try:
        column = pq.read_table(file, columns=["response_ids"])["response_ids"]
    except (pa.ArrowException, OSError, KeyError):
        return False  # whoever reads the file says what is wrong with it
    return bool(len(column)) and column.null_count == len(column)


def read_scores(run_dir: Path | str, step: int) -> list[StoredScores]:
    """What was recorded about each group of a step, in scoring order; tokens are left unread.

    Raises DataError naming file and column for what cannot be read.
    """
    file = _file(run_dir, step)
    return [_scores(file, rows) for rows in _rows_by_group(file, SCORE_COLUMNS)]


def read_groups(run_dir: Path | str, step: int) -> list[StoredGroup]:
    """The groups of a step, in scoring order, images included, ready to be scored again.

    Raises DataError naming file and column for what cannot be read: a column that is absent or
    of another type, a task that cannot be loaded, an image that is gone or not the one stored.
    """
    return [group for _, group in _groups(run_dir, step)]


def read_scored(run_dir: Path | str, step: int) -> list[ScoredGroup]:
    """The groups of a step as the learner got them, in scoring order, with stored advantages.

    What is not stored is empty: tracebacks of failures, and the seconds that terms took. Raises
    DataError as `read_groups` does, and for advantages of other columns than `CREDIT_COLUMNS`.
    """
    scored = []
    for rows, stored in _groups(run_dir, step, ("advantages",)):
        table = [by_name(row["advantages"]) for row in rows]
        if any(tuple(a) not in (CREDIT_COLUMNS, NO_CALL_COLUMNS) for a in table):
            raise DataError(
                f"{_file(run_dir, step)}: column 'advantages': expected the keys "
                f"{', '.join(NO_CALL_COLUMNS)} in every row, and act where there are calls"
            )
        scores = stored.scores
        scored.append(
            ScoredGroup(
                group=stored.group,
                terms=scores.terms,
                totals=scores.totals,
                advantages=np.array([[a.get(c, 0.0) for c in CREDIT_COLUMNS] for a in table]),
                zero_variance=scores.zero_variance,
                dropped=scores.dropped,
                failures=scores.failures,
                seconds={},
                diagnosis=scores.diagnosis,
            )
        )
    return scored


def _groups(
    run_dir: Path | str, step: int, extra_columns: Sequence[str] = ()
) -> Iterator[tuple[list[Row], StoredGroup]]:
    """Each group of a step with its rows, which have the columns `extra_columns` as well."""
    file = _file(run_dir, step)
    tasks: dict[str, Task] = {}
    for rows in _rows_by_group(file, tuple({*SCORE_COLUMNS, *GROUP_COLUMNS, *extra_columns})):
        name = rows[0]["task"]
        if name not in tasks:
            tasks[name] = _column(file, "task", load_task, name)
        problem = _problem(Path(run_dir), file, rows[0])
        rollouts = tuple(_rollout(Path(run_dir), file, tasks[name], problem, row) for row in rows)
        group = Group(rows[0]["group_id"], problem, rollouts)
        yield rows, StoredGroup(group, _scores(file, rows))


def _file(run_dir: Path | str, step: int) -> Path:
    return step_file(Path(run_dir), "rollouts", step)


def _rows_by_group(file: Path, columns: Sequence[str]) -> Iterator[list[Row]]:
    """Rows of one group after another; the rows of a group are written together."""
    rows = _read_columns(file, columns).to_pylist()
    for _, group in itertools.groupby(rows, key=lambda row: row["group_id"]):
        yield list(group)


def _read_columns(file: Path, columns: Sequence[str]) -> pa.Table:
    """The named columns in the types of `ROLLOUT_SCHEMA`, without nulls but for the truth and
    what a problem need not have."""
    try:
        table = pq.ParquetFile(file)
        absent = [name for name in columns if name not in table.schema_arrow.names]
        if needed := [name for name in absent if name not in MAY_BE_ABSENT]:
            raise DataError(f"{file}: column {needed[0]!r} is missing; expected a run's rollouts")
        full_table = image_lists(table.read(columns=list(columns)))
        for name in absent:
            field = ROLLOUT_SCHEMA.field(name)
            full_table = full_table.append_column(field, pa.nulls(len(full_table), field.type))
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; this run holds no rollouts of that step") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error
    for name in columns:
        index, field = full_table.schema.get_field_index(name), ROLLOUT_SCHEMA.field(name)
        column = _column(file, name, full_table.column(index).cast, field.type)
        if column.null_count and name in TOKEN_ARRAYS and tokens_missing(file):
            raise DataError(
                f"{file}: without token arrays (output.rollout_tokens = false in the run's "
                "recipe), so its groups cannot be scored or learnt from again"
            )
        if column.null_count and name not in (*TRUTH_COLUMNS, *MAY_BE_ABSENT):
            raise DataError(f"{file}: column {name!r} has empty cells; expected {field.type}")
        full_table = full_table.set_column(index, field, column)
    return full_table


def _scores(file: Path, rows: Sequence[Row]) -> StoredScores:
    first = rows[0]
    terms = [by_name(row["terms"]) for row in rows]
    names = list(terms[0])
    if any(set(term) != set(names) for term in terms):
        raise DataError(
            f"{file}: column 'terms': rollouts of group {first['group_id']!r} have different terms"
        )
    return StoredScores(
        step=first["step"],
        task=first["task"],
        symmetry_key=first["symmetry_key"],
        group_id=first["group_id"],
        terms={name: np.array([term[name] for term in terms], np.float64) for name in names},
        totals=np.array([row["total"] for row in rows], np.float64),
        zero_variance=first["zero_variance"],
        dropped=first["dropped"],
        failures=tuple(_failure(file, text) for text in first["failures"]),
        diagnosis=_diagnosis(rows),
    )


def _failure(file: Path, text: str) -> TermFailure:
    match = _FAILURE.fullmatch(text)
    if match is None:
        raise DataError(f"{file}: column 'failures': expected 'term: kind: message', got {text!r}")
    return TermFailure(match[1], cast(FailureKind, match[2]), match[3])


def _diagnosis(rows: Sequence[Row]) -> Diagnosis | None:
    columns = {name: [row[name] for row in rows] for name in TRUTH_COLUMNS}
    truth = {name: np.array(column) for name, column in columns.items() if None not in column}
    if "a" not in truth:
        return None
    return Diagnosis(**truth, defects=tuple(tuple(row["defects"]) for row in rows))


def _problem(run_dir: Path, file: Path, row: Row) -> Problem:
    return Problem(
        id=row["problem_id"],
        task=row["task"],
        prompt=row["prompt"],
        perception=row["true_perception"],
        truth=_column(file, "truth", json.loads, row["truth"]),
        knobs=_column(file, "knobs", json.loads, row["knobs"]),
        symmetry_key=row["symmetry_key"],
        images=tuple(_image(run_dir, file, sha) for sha in row["image_sha256"]),
        extra=_column(file, "extra", json.loads, row["extra"] or "{}"),
    )


def _rollout(run_dir: Path, file: Path, task: Task, problem: Problem, row: Row) -> Rollout:
    fields: dict[str, Any] = {name: row[name] for name in ROLLOUT_COLUMNS}
    for name in TOKEN_ARRAYS:
        dtype = ROLLOUT_SCHEMA.field(name).type.value_type.to_pandas_dtype()
        fields[name] = np.array(row[name], dtype)
    if row["shown_sha256"] is None:
        images = as_shown(problem.prompt, viewed(problem, row["view"]))
    else:
        images = tuple(_image(run_dir, file, sha) for sha in row["shown_sha256"])
    if row["episode"] is not None:
        fields["turns"], fields["failure"] = _column(file, "episode", turns_of, row["episode"])
    said = as_turns(row["prefix"], row["text"], fields.get("turns", ()))
    return Rollout(**fields, images=images, parsed=read_turns(task, said))


def turns_of(cell: str) -> tuple[tuple[Turn, ...], str]:
    """The turns of a stored episode, and how its environment failed."""

    def read_turns(turns: list[dict[str, Any]], failure: str) -> tuple[tuple[Turn, ...], str]:
        return tuple(Turn(**t | {"defects": tuple(t.get("defects", ()))}) for t in turns), failure

    return read_turns(**json.loads(cell))


def _image(run_dir: Path, file: Path, sha: str) -> bytes:
    # The name comes from a file: only a hash may become a path.
    if not re.fullmatch(r"[0-9a-f]{64}", sha or ""):
        raise DataError(f"{file}: column 'image_sha256': {sha!r} is no SHA-256")
    for suffix in ("png", "jpg"):
        path = run_dir / "images" / f"{sha}.{suffix}"
        if path.exists():
            image = path.read_bytes()
            if hashlib.sha256(image).hexdigest() != sha:
                raise DataError(f"{path}: its contents are not those of its name; copy it again")
            return image
    raise DataError(
        f"{file}: column 'image_sha256': {run_dir / 'images' / sha}.png is missing; copy the run "
        "folder whole"
    )


def _column(file: Path, name: str, read: Callable[[Any], T], value: Any) -> T:
    """`read(value)`, its errors naming file and column."""
    try:
        return read(value)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{file}: column {name!r}: {error}") from error
