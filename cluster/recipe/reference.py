"""What a recipe may hold, made from its sections: a JSON schema for editors, a page for readers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.recipe.recipe import Recipe
from tasks.core import Generates
from tasks.load import BUILT_IN, load_task

Schema = Mapping[str, Any]

_HEAD = """# A recipe, field by field

Made from the sections by `make reference`; recipes to copy are in [recipes/](../recipes).
What fields allow together is checked when a recipe is read; `equipoise train RECIPE --dry-run`
prints a recipe with every default.

An editor that reads TOML schemas (taplo, or Even Better TOML in VS Code) completes a recipe, shows
what a field means and marks what is wrong, if the recipe's first line says where the schema is. The
shipped ones have it; in a recipe elsewhere give the path from its folder, or a URL:

```toml
#:schema ../recipe.schema.json
```

The knobs of a task's own problems: `equipoise tasks list`.
"""
_NAMES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "table",
}
_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
}


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, the knobs of built-in tasks included."""
    document = Recipe.model_json_schema()
    knobs = []
    for name, task in ((name, load_task(name)) for name in BUILT_IN):
        if not isinstance(task, Generates):
            continue
        knob_schema = task.spec.model_json_schema(ref_template=f"#/$defs/{name}/$defs/{{model}}")
        document["$defs"][name] = knob_schema
        chosen = {"properties": {"name": {"const": name}}}
        knobs.append({"if": chosen, "then": {"properties": {"knobs": {"$ref": f"#/$defs/{name}"}}}})
    document["$defs"]["TaskConfig"]["allOf"] = knobs
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | document


def schema_text() -> str:
    """recipes/recipe.schema.json."""
    return json.dumps(schema(), ensure_ascii=False) + "\n"


def page() -> str:
    """docs/recipe.md: a table for each section."""
    full_schema = Recipe.model_json_schema()
    parts = [_HEAD]
    for heading, section in _sections(full_schema, "", full_schema["$defs"]):
        description = section["description"].removeprefix(heading)
        rows = [
            f"| `{name}` | {_type(field, full_schema['$defs'])} "
            f"| {_default(field, name in section.get('required', ()))} "
            f"| {_in_a_row(field.get('description', ''))} |"
            for name, field in section["properties"].items()
        ]
        table = "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])
        title = f"`{heading}`" if heading else "The top of the file"
        parts.append(f"## {title}\n\n{description.strip()}\n\n{table}\n")
    return "\n".join(parts)


def _sections(section: Schema, path: str, models: Schema) -> Iterator[tuple[str, Schema]]:
    """(heading, schema) of a section and of those below it, as the recipe has them."""
    listed = section["description"].startswith("[[")
    yield (f"[[{path}]]" if listed else f"[{path}]" if path else ""), section
    for name, field in section["properties"].items():
        for kind in _kinds(field):
            if "$ref" in (item := kind.get("items", kind)):
                below = models[item["$ref"].rpartition("/")[2]]
                yield from _sections(below, f"{path}.{name}" if path else name, models)


def _kinds(field: Schema) -> list[Schema]:
    """What a field may be, `None` left out: TOML has none."""
    return [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]


def _type(field: Schema, models: Schema) -> str:
    return " or ".join(_kind(kind, models) for kind in _kinds(field))


def _kind(kind: Schema, models: Schema) -> str:
    if "$ref" in kind:
        return "section"
    if "enum" in kind or "const" in kind:
        return ", ".join(f"`{json.dumps(v)}`" for v in kind.get("enum", [kind.get("const")]))
    bounds = ", ".join(
        words.format(f"{kind[name]:g}") for name, words in _BOUNDS.items() if name in kind
    )
    if kind.get("type") == "array":
        entries = kind.get("prefixItems", [kind.get("items", {})])
        least = f" (at least {kind['minItems']})" if "minItems" in kind else ""
        return f"list{least} of {_kind(entries[0], models)}"
    below = kind.get("additionalProperties")
    of = f" of {_kind(below, models)}" if isinstance(below, Mapping) else ""
    return " ".join(filter(None, [_NAMES.get(kind.get("type", ""), "any value") + of, bounds]))


def _default(field: Schema, required: bool) -> str:
    if required:
        return "required"
    if "$ref" in field:
        return ""  # a section's fields have theirs
    value = field.get("default", {})
    return "none" if value is None else f"`{json.dumps(value)}`"


def _in_a_row(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
