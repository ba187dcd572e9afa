"""Recipe section [[tasks]]."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tasks.checkers import CHECKERS, Gold
from tasks.core import Generates
from tasks.fields import PathText, Rate, Section, Text, refusal, refuse


class TaskConfig(Section):
    """[[tasks]] One source of problems. `weight` is its share of the problems in a step."""

    name: Text
    """`"sudoku"`, `"graph_coloring"`, `"scenes"`, `"vqa"` for a file of images, questions and
    answers, or `"module:Class"` on the Python path."""
    weight: Rate = 1.0
    """Its share of the problems in a step, beside those of the other entries."""
    data: PathText | dict[Literal["train", "test"], PathText] | None = None
    """A data set to draw problems from instead of generating them; needed by a task that generates
    none. The folder of one that `equipoise tasks generate` or `import` made; of `vqa` any folder or
    file of rows (Parquet, JSON lines, JSON, Arrow), a name on the Hugging Face hub (`owner/name`,
    `owner/name:config`), or `{ train = ..., test = ... }`. Files and folders also by URI
    (`s3://…`)."""
    columns: dict[str, str | list[str]] = Field(default_factory=dict)
    """Of `vqa`: which column is `question`, `images`, `answer`, `choices`, `perception`, `response`
    or `split`; a struct's field has a dot (`reward_model.ground_truth`). Layouts of the public data
    sets need none."""
    checker: str | dict[str, Any] | None = None
    """Of `vqa`: what judges answers: `expression`, `choice`, `number`, `text`, `box` or `point`;
    with options `{ name = "number", tolerance = 0.05 }`; by row `{ column = "verifier" }`. Without
    it, what suits the layout."""
    form: Literal["segments", "think_answer", "boxed"] = "segments"
    """Of `vqa`: how responses are written. `segments`: perception, reasoning and answer in our
    tags. `think_answer` and `boxed` have no perception, so what needs one is not there."""
    prompt: Text | None = None
    """Of `vqa`: what the policy is asked, with `{question}` in it. Without it, the question and how
    to write the `form`."""
    bad_rows: Literal["error", "skip"] = "error"
    """Of `vqa`: rows that cannot be used, and training rows that repeat a held-out one: listed
    before anything is started, or left out, counted by reason."""
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

    @property
    def task_name(self) -> str:
        """The task as its problems name it."""
        return self.name if self.form == "segments" else f"{self.name}/{self.form}"

    @property
    def data_named(self) -> str:
        """The data as messages name it."""
        return ", ".join(self.data.values()) if isinstance(self.data, dict) else str(self.data)

    @model_validator(mode="after")
    def _rows_are_of_vqa(self) -> TaskConfig:
        task, _, form = self.name.partition("/")
        refuse(task == "vqa" and form, "name", f'write name = "vqa" and form = "{form}"')
        if self.name == "vqa":
            prompt = self.prompt or "{question}"
            refuse("{question}" not in prompt, "prompt", 'write "{question}" where it stands')
            shows = re.search(r"<image(_\d+)?>", prompt) is not None
            refuse(shows, "prompt", "images stand in the question; leave the placeholder out")
            checker, options = self.judged
            known = ", ".join(CHECKERS)
            unknown = f"no checker {checker!r}; there are {known}, or {{ column = ... }}"
            refuse(checker and checker not in CHECKERS, "checker", unknown)
            fault = (
                CHECKERS[checker].fault(Gold(("1",), (), options)) if options and checker else ""
            )
            refuse(fault and fault.startswith("options"), "checker", str(fault))
            return self
        for name in ("columns", "checker", "prompt"):
            refuse(getattr(self, name), name, 'is of name = "vqa"; remove it')
        refuse(self.form != "segments", "form", 'is of name = "vqa"; remove it')
        refuse(self.bad_rows != "error", "bad_rows", 'is of name = "vqa"; remove it')
        refuse(isinstance(self.data, dict), "data", "give the folder of a data set")
        return self

    @property
    def judged(self) -> tuple[str, dict[str, Any]]:
        """The checker's name, "" for that of each row, and its options."""
        if not isinstance(self.checker, dict):
            return self.checker or "", {}
        options = {k: v for k, v in self.checker.items() if k not in ("name", "column")}
        return str(self.checker.get("name", "")), options

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
