"""The knobs of `scenes`: what is there to think about, and what makes seeing it hard."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.fields import Section

MAX_IMAGE_SIDE = 2048
MOST = 9
"""Things of one place; a larger count is no reading of such a picture."""


class ScenesSpec(Section):
    """The knobs of one distribution of scenes."""

    rows: int = Field(default=2, ge=1, le=8, description="of places")
    columns: int = Field(default=3, ge=1, le=8, description="of places")
    places: int = Field(default=4, ge=1, le=64, description="where there is something")
    kinds: int = Field(default=3, ge=1, le=12, description="of things, in one scene")
    most: int = Field(default=3, ge=1, le=MOST, description="things of one place")

    ask: Literal["any", "sum", "compare", "walk"] = Field(
        default="any", description="`sum` with 0 steps counts, `walk` with 0 steps looks up a place"
    )
    steps: int = Field(
        default=1,
        ge=0,
        le=8,
        description="additions, comparisons or moves on the way to the answer",
    )
    distractors: int = Field(default=0, ge=0, le=8, description="sentences that do not matter")
    phrasings: Literal["training", "held_out"] = Field(
        default="training", description="wordings of the question; `held_out` for evaluation only"
    )

    things: Literal["training", "held_out"] = Field(
        default="training", description="which are shown; `held_out` for evaluation only"
    )
    variety: int = Field(default=9, ge=1, le=9, description="things of each of the 12 sorts")
    look_alikes: bool = Field(default=False, description="things of one sort, such as fruit")
    place_size: int = Field(default=80, ge=16, le=400, description="a place's side, pixels")
    thing_size: float = Field(default=0.9, ge=0.1, le=1.0, description="of the room that it has")
    overlap: float = Field(default=0.0, ge=0.0, le=0.6, description="of things of one place")
    turn: float = Field(default=0.0, ge=0.0, le=180.0, description="largest, degrees")
    noise: float = Field(default=0.0, ge=0.0, le=255.0, description="Gaussian sigma, of 255")
    contrast: float = Field(default=1.0, gt=0.0, le=1.0, description="1 is as drawn")
    lines: bool = Field(default=True, description="thin lines between places")

    prompt: Literal["brief", "full"] = "full"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.kinds <= self.places <= self.rows * self.columns:
            raise ValueError(
                f"places: {self.places} must hold {self.kinds} kinds within {self.rows} x "
                f"{self.columns} places; set it between kinds and rows * columns"
            )
        if self.ask in ("sum", "compare", "any") and self.steps >= self.kinds:
            raise ValueError(
                f"steps: {self.steps} need more than {self.steps} kinds; lower steps, raise kinds "
                'or ask = "walk"'
            )
        if self.ask == "compare" and not self.steps:
            raise ValueError("steps: a comparison is at least one; raise steps")
        if self.ask == "walk" and self.steps and self.rows * self.columns == 1:
            raise ValueError("steps: one place leaves nowhere to go; raise rows or columns")
        available = min(self.variety, 3 if self.things == "held_out" else 9)
        if self.look_alikes and self.kinds > available:
            raise ValueError(
                f"kinds: {available} things of one sort are the most; lower kinds, raise variety, "
                "or look_alikes = false"
            )
        if self.place_size * max(self.rows, self.columns) > MAX_IMAGE_SIDE:
            raise ValueError(
                f"place_size: the image would be over {MAX_IMAGE_SIDE} px wide; lower it"
            )
        return self
