"""The house of docs and design: which room may import what, read off every file's syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tasks", "rollout", "rewards", "learner", "cluster")
RECORDS = ("tasks", "rollout.record", "rollout.tokens")
MAY_IMPORT = {
    "tasks": (),
    "rollout": ("tasks",),
    "rewards": RECORDS,
    "learner": RECORDS,
    "cluster": ROOMS,
}
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers")
LONGEST_FILE = 700


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Every module a source imports, anywhere in it; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).rsplit(".", 1)[-1]
            if called in ("import_module", "__import__") and isinstance(
                node.args[0] if node.args else None, ast.Constant
            ):
                yield str(node.args[0].value)


def within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def intruders(room: str, source: str) -> list[str]:
    """Imports of ours that a room's source has and may not have."""
    allowed = (room, *MAY_IMPORT[room])
    return [m for m in imports(source) if within(m, ROOMS) and not within(m, allowed)]


@cache
def imports_of(path: Path) -> tuple[str, ...]:
    return tuple(imports(path.read_text()))


def importers(package: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in python_files(*ROOMS)
        if any(within(module, (package,)) for module in imports_of(path))
    }


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_table_allows(room: str) -> None:
    files = python_files(room)
    assert files, "a room without files proves nothing"
    found = {str(p.relative_to(ROOT)): intruders(room, p.read_text()) for p in files}
    assert {path: modules for path, modules in found.items() if modules} == {}


def test_the_table_would_catch_an_intruder() -> None:
    assert intruders("rewards", "def f():\n    from learner import losses") == ["learner.losses"]
    assert intruders("learner", "import rollout.engine") == ["rollout.engine"]
    assert intruders("learner", "from rollout import engine, record") == ["rollout.engine"]
    assert intruders("tasks", "import_module('cluster.cli')") == ["cluster.cli"]
    assert intruders("rewards", "from rollout.record import Group") == []


def test_tasks_stay_light() -> None:
    assert {package: importers(package) & _files_of("tasks") for package in HEAVY} == {
        package: set() for package in HEAVY
    }


def test_one_room_knows_vllm_and_one_file_knows_deepspeed() -> None:
    assert importers("vllm") <= _files_of("rollout")
    assert importers("deepspeed") <= {"learner/engine.py"}


def test_no_junk_drawer_and_no_file_too_long_to_read() -> None:
    files = python_files(*ROOMS, "tests", "benchmarks", "docs", "recipes")
    assert not [path for path in files if path.name in ("utils.py", "helpers.py")]
    lengths = {str(p.relative_to(ROOT)): p.read_text().count("\n") for p in files}
    assert {path: n for path, n in lengths.items() if n > LONGEST_FILE} == {}


def _files_of(room: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in python_files(room)}
