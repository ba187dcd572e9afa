"""What is wrong with a recipe, in sentences: from pydantic's errors to field, fault and remedy."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Location = tuple[str | int, ...]

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": 'text in quotes ("...")',
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list [...]",
    "list_type": "a list [...]",
    "dict_type": "a table",
    "model_type": "a section (a table)",
    "string_too_short": "text that is not empty",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def explain(
    errors: Sequence[ErrorDetails], model: type[BaseModel], below: Location = ()
) -> Iterator[tuple[Location, str]]:
    """(field, sentence) for each of pydantic's errors; fields start with `below`."""
    for error in errors:
        kind, loc, context = error["type"], error["loc"], error.get("ctx", {})
        if kind == "too_short" and len(error["input"]) >= context["min_length"]:
            continue  # counted without its bad entries, which have errors of their own
        if kind == "nested":
            nested: ValidationError = context["error"]
            inner = nested.errors(include_url=False)
            yield from explain(inner, context["model"], below + loc)
        elif kind == "recipe":
            yield below + loc + tuple(context["at"]), context["message"]
        elif kind == "value_error":
            # What a task's own spec says of itself is already a sentence, often "field: ...".
            message = str(context["error"])
            field, colon, rest = message.partition(": ")
            owner = _model_at(model, loc)
            if colon and owner and field in owner.model_fields:
                yield (*below, *loc, field), rest
            else:
                yield below + loc, message
        else:
            yield below + loc, _sentence(kind, loc, error, context, model)


def _sentence(
    kind: str,
    loc: Location,
    error: ErrorDetails,
    context: Mapping[str, Any],
    model: type[BaseModel],
) -> str:
    actual = _shown(error["input"])
    if kind == "extra_forbidden":
        return f"no such key; {_key_hint(str(loc[-1]), loc[:-1], model)}"
    if kind == "missing":
        return "is required and missing; add it"
    if kind == "literal_error":
        options = _options_at(model, loc)
        near = get_close_matches(str(error["input"]), [str(o) for o in options], n=1)
        hint = f"; did you mean {_shown(near[0])}?" if near else ""
        expected = str(context["expected"]).replace("'", '"')
        return f"expected {expected}, got {actual}{hint}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {context[bound]:g}, got {actual}"
    if kind == "string_pattern_mismatch":
        return f"got {actual}; use letters, digits, dots, dashes and underscores"
    if kind in ("too_short", "too_long") and "field_type" in context:
        limit = context.get("min_length", context.get("max_length"))
        bound = "at least" if kind == "too_short" else "at most"
        return f"needs {bound} {limit} entries, got {actual}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {actual}"
    message = error["msg"]
    return f"{message[:1].lower()}{message[1:]}, got {actual}"


def _key_hint(key: str, section: Location, model: type[BaseModel]) -> str:
    """What a key that `section` does not have could have been."""
    owner = _model_at(model, section)
    known = list(owner.model_fields) if owner else []
    if near := get_close_matches(key, known, n=1):
        return f'did you mean "{near[0]}"?'
    for name, field in model.model_fields.items():
        below = _model_in(field.annotation)
        if below is not None and key in below.model_fields and (name,) != section[:1]:
            return f'did you mean "{name}.{key}"?'
    return f"known keys: {', '.join(known)}" if known else "remove it"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's annotation holds, through `| None`, lists and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, Annotated):
        models = (_model_in(argument) for argument in get_args(annotation))
        return next((model for model in models if model is not None), None)
    return None


def _model_at(model: type[BaseModel], loc: Location) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int):  # an entry of the list whose model is already `current`
            continue
        field = current.model_fields.get(part) if current else None
        current = _model_in(field.annotation) if field else None
    return current


def _options_at(model: type[BaseModel], loc: Location) -> tuple[Any, ...]:
    owner = _model_at(model, loc[:-1])
    field = owner.model_fields.get(str(loc[-1])) if owner else None
    return get_args(field.annotation) if field else ()


def dotted(loc: Sequence[str | int]) -> str:
    """A field's place as a recipe writes it: `tasks[0].knobs`; `top` for the whole."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".") or "top"


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, str | bool | int | float) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
