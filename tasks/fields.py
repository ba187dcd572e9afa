"""What the sections of a recipe are made of: their base, the types of their fields, `refusal`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from tasks.files import expanded

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(expanded)]
"""A path as people write it: `~` and `$VARIABLES` are those of the machine that reads it."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Weight = Annotated[float, Field(allow_inf_nan=False)]

OWN_NAME = re.compile(r"([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[^:]+\.py):[A-Za-z_]\w*")
"""A class or function of the user's own: `module:Class`, `folder/file.py:function`."""


@dataclass(frozen=True)
class OneOf:
    """Of a field `Annotated[str, OneOf(...)]`: one of these names, or one of the user's own."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> Any:
        return {"anyOf": [{"enum": list(self.names)}, handler(schema)]}

    def _known(self, name: str) -> str:
        if name in self.names or OWN_NAME.fullmatch(name):
            return name
        near = get_close_matches(name, self.names, n=1)
        raise refusal(
            f'got "{name}"; known: {", ".join(self.names)}, or your own as "file.py:name" or '
            '"module:name"' + (f'; did you mean "{near[0]}"?' if near else "")
        )


def refusal(message: str, *at: str | int) -> PydanticCustomError:
    """An error whose message is a whole sentence, placed at the field `at` below the model."""
    return PydanticCustomError("recipe", "{message}", {"message": message, "at": at})


def refuse(wrong: object, at: str, message: str) -> None:
    """Raise the `refusal` at a field below the model (`learner.layout`) where `wrong` is true."""
    if wrong:
        raise refusal(message, *at.split("."))


class Section(BaseModel):
    """What all sections share: unknown keys and wrong types are errors, nothing changes later.

    The docstring below a field is its meaning in docs/recipe.md and in the recipe's JSON schema.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
    )
