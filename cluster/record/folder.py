"""What a run leaves behind: metrics, rollouts, images, the recipe and the versions.

    RUN/recipe.toml                      the resolved recipe
    RUN/versions.json                    packages, commit, machine
    RUN/metrics/part-000001.parquet      step, name, value, wall_seconds; joined on close into
    RUN/metrics.parquet
    RUN/rollouts/step-000001.parquet     one row a rollout (see `ROLLOUT_SCHEMA`)
    RUN/demonstrations/step-000001.parquet   of SFT: the first update's demonstrations
    RUN/images/<sha256>.png              every image once
    RUN/evaluations/step-000000.json     what an evaluation measured, by task and problem
    RUN/tool_use.json                    the same of `equipoise diagnose RUN --tool`
    RUN/tensorboard/                     the same metrics
    RUN/events.parquet                   what befell it (see `events.py`)

Each file is written whole under another name and then renamed, so a crash costs no more than
the step it happened in. `tracker.py` writes, `stored.py` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
        # What was asked: enough to score the row again, with the images of `image_sha256`.
        "prompt": pa.string(),
        "true_perception": pa.string(),
        "truth": pa.string(),  # JSON
        "knobs": pa.string(),  # JSON
        "symmetry_key": pa.string(),
        "image_sha256": pa.list_(pa.string()),  # of each image, in the problem's order
        "extra": pa.string(),  # JSON; null where there is none
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
        # Of a response with an environment; null in others, whose images are the problem's.
        "shown_sha256": pa.list_(pa.string()),  # of all images that it stands for, in order
        "episode": pa.string(),  # JSON: its turns (`rollout.record.Turn`), how it failed
        "seconds": pa.float64(),
        "sampler": pa.string(),
        # What it earned.
        "terms": NAMED_VALUES,
        "total": pa.float64(),
        "advantages": NAMED_VALUES,  # by `CREDIT_COLUMNS`
        "zero_variance": pa.bool_(),
        "dropped": pa.bool_(),
        "failures": pa.list_(pa.string()),  # "term: kind: message", of the whole group
        # What is true of it; null where nobody can tell, all of it where the task itself failed.
        "a": pa.bool_(),
        "a_p": pa.bool_(),
        "a_p_graded": pa.float64(),
        "self_consistency": pa.bool_(),
        "leak": pa.bool_(),
        # Of a response with an environment: wrong (right) before its first look, right (wrong) now.
        "reread_gain": pa.bool_(),
        "reread_loss": pa.bool_(),
    }
)

DEMONSTRATION_SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "segments": pa.list_(pa.int8()),
        "image_sha256": pa.list_(pa.string()),  # of those shown, in the prompt's order
    }
)

TOKEN_ARRAYS = ("prompt_ids", "response_ids", "logprobs", "versions", "segments")
"""Null in a run of `output.rollout_tokens = false`."""

REREAD = ("reread_gain", "reread_loss")
TRUTH_COLUMNS = ("a", "a_p", "a_p_graded", "self_consistency", "leak", *REREAD)
"""Fields of a `Diagnosis`, one value a rollout; null where there is none."""

MAY_BE_ABSENT = ("extra", "shown_sha256", "episode", *REREAD)
"""Columns that may be null, and that older runs do not have."""

_ROLLOUT = ("rollout_id", "group_id", "kind", "view", "prefix", "text", "finish_reason", "seconds")
ROLLOUT_COLUMNS = (*_ROLLOUT, "sampler", *TOKEN_ARRAYS)
"""Fields of a `Rollout` that are stored under their own names."""


TOOL_FILE = "tool_use.json"


def image_lists(table: pa.Table) -> pa.Table:
    """The table with a list of images a row; in older runs `image_sha256` is one hash or null."""
    field = ROLLOUT_SCHEMA.field("image_sha256")
    index = table.schema.get_field_index(field.name)
    if index < 0 or table.schema.field(index).type != pa.string():
        return table
    lists = [[] if sha is None else [sha] for sha in table.column(index).to_pylist()]
    return table.set_column(index, field, pa.array(lists, field.type))


def read_rows(file: Path, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`, null where an older run had none; raises as PyArrow does."""
    stored_schema = pq.read_schema(file)
    index = schema.get_field_index("image_sha256")
    if index >= 0 and stored_schema.field("image_sha256").type == pa.string():
        schema = schema.set(index, stored_schema.field("image_sha256"))
    return image_lists(pq.read_table(file, schema=schema))


def named_values(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """A cell of type `NAMED_VALUES`; `by_name` reads it back."""
    return [{"name": name, "value": float(value)} for name, value in values.items()]


def by_name(cell: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What `named_values` wrote."""
    return {item["name"]: item["value"] for item in cell}


def metric_parts(run: Path) -> list[Path]:
    """The parts of a run's metrics that are not joined yet, in the order of their steps."""
    return sorted((run / "metrics").glob("part-*.parquet"))


def step_file(run: Path, kind: str, step: int) -> Path:
    """Where a step's `rollouts`, `demonstrations` or `evaluations` are."""
    return run / kind / f"step-{step:06d}.{'json' if kind == 'evaluations' else 'parquet'}"
