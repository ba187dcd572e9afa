"""Recipe section [[tasks]]."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from tasks.core import Generates
from tasks.fields import PathText, Rate, Section, Text, refusal


class TaskConfig(Section):
    """[[tasks]] One source of problems. `weight` is its share of the problems in a step."""

    name: Text
    """`"sudoku"`, `"graph_coloring"`, `"scenes"`, or `"module:Class"` on the Python path."""
    weight: Rate = 1.0
    """Its share of the problems in a step, beside those of the other entries."""
    data: PathText | None = None
    """A Parquet data set to draw problems from instead of generating them; needed by a task that
    generates none."""
    too_long: Literal["error", "drop"] = "error"
    """Of problems that do not fit the policy: prompt and image leave less than `sampler.max_tokens`
    of `model.max_model_len`, or its processor refuses the image. `error` lists them before anything
    is started; `drop` leaves them out of training and evaluation, counted."""
    knobs: dict[str, Any] = Field(default_factory=dict)
    """Difficulty of generated problems; resolved against the task's `spec`."""
    style: Literal["terse", "verbose"] = "terse"
    """How the chain-of-thought teacher writes SFT demonstrations."""

    @field_validator("name")
    @classmethod
    def _task_loads(cls, name: str) -> str:
        from tasks.load import load_task

        try:
            load_task(name)
        except ValueError as error:
            raise refusal(str(error)) from error
        return name

    @field_validator("knobs")
    @classmethod
    def _knobs_fit_the_task(cls, knobs: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from tasks.load import load_task

        if "name" not in info.data:  # already reported
            return knobs
        if info.data.get("data") is not None:
            if knobs:
                raise refusal("knobs generate problems, but `data` is set; remove one of them")
            return knobs
        task = load_task(info.data["name"])
        if not isinstance(task, Generates):
            if knobs:
                raise refusal(
                    f'task "{task.name}" draws no problems, so it has no knobs; remove them'
                )
            return knobs
        spec = task.spec
        try:
            return spec.model_validate(knobs).model_dump(mode="json", exclude_none=True)
        except ValidationError as error:
            raise PydanticCustomError(
                "nested", "bad knobs", {"error": error, "model": spec}
            ) from error
