"""Write a table as TOML that reads back as the same table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any


def table_lines(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[str]:
    """Lines of a table: its values first, then its tables, as TOML wants them."""
    lines, below = [], []
    for key, value in table.items():
        full = (*path, key)
        name = ".".join(map(_key, full))
        if isinstance(value, Mapping):
            below += ["", f"[{name}]", *table_lines(value, full)]
        elif isinstance(value, list | tuple) and value and all(map(_is_table, value)):
            for entry in value:
                below += ["", f"[[{name}]]", *table_lines(entry, full)]
        else:
            lines.append(f"{_key(key)} = {toml_value(value)}")
    return lines + below


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def toml_value(value: Any) -> str:
    """A value in one line. Raises TypeError for what TOML has no form of."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        entries = (f"{_key(k)} = {toml_value(v)}" for k, v in value.items())
        return f"{{ {', '.join(entries)} }}"
    raise TypeError(f"TOML has no {type(value).__name__}")
