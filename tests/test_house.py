"""The house of docs and design: which room may import what, read off every file's syntax."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tasks", "rollout", "rewards", "learner", "cluster")
RECORDS = ("tasks", "rollout.record", "rollout.settings", "rollout.tokens")
MAY_IMPORT = {
    "tasks": (),
    "rollout": ("tasks",),
    "rewards": RECORDS,
    "learner": (*RECORDS, "rollout.demonstrated"),
    "cluster": ROOMS,
}
CLUSTER_MAY_IMPORT = {
    "recipe": (),
    "record": ("recipe",),
    "run": ("recipe", "record"),
    "ablation": ("recipe", "record"),
    "report": ("recipe", "record", "ablation"),
    "jobs": ("recipe", "ablation"),
}
"""The rooms inside cluster/; the commands, its flat files, may import all of them."""
COMMANDS = {
    "__init__", "__main__", "ablate_cli", "cells_cli", "cli", "demo", "doctor", "measure_cli",
    "models_cli", "names", "pretrained", "start", "submit_cli", "tasks_cli",
}  # fmt: skip
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers")
LONGEST_FILE = 400
REASON = "one file"
"""How the first comment of a longer file begins to say why it is not two."""
IMPORTS = (ast.Import, ast.ImportFrom)


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


@pytest.mark.parametrize("room", CLUSTER_MAY_IMPORT)
def test_rooms_of_cluster_import_one_way(room: str) -> None:
    files = python_files(f"cluster/{room}")
    assert files, "a room without files proves nothing"
    allowed = tuple(f"cluster.{name}" for name in (room, *CLUSTER_MAY_IMPORT[room]))
    found = {
        str(path.relative_to(ROOT)): [
            module
            for module in imports_of(path)
            if within(module, ("cluster",)) and not within(module, allowed)
        ]
        for path in files
    }
    assert {path: modules for path, modules in found.items() if modules} == {}


def circle(sources: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Modules that import each other in a circle, its first again at the end; [] for none.

    `sources`: module -> what it imports, at its head, in a function or for its types alone.
    """
    graph = {}
    for module, imported in sources.items():
        parts = [(name, name.rpartition(".")[0]) for name in imported]
        graph[module] = {next((m for m in pair if m in sources), module) for pair in parts}
        graph[module] -= {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        modules: list[str] = error.args[1]
        return modules
    return []


def test_no_two_modules_import_each_other() -> None:
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in python_files(*ROOMS)}
    names = {".".join(at.parts).removesuffix(".__init__"): path for at, path in paths.items()}
    assert circle({name: imports_of(path) for name, path in names.items()}) == []


def test_a_circle_would_be_caught() -> None:
    lazy = tuple(imports("def f():\n    from cluster.run import a"))
    assert circle({"cluster.run.a": ("cluster.run.b.g",), "cluster.run.b": lazy})
    ring = {"tasks.a": ("tasks.b",), "tasks.b": ("tasks.c.x",), "tasks.c": ("tasks.a.y",)}
    assert len(circle(ring)) == 4
    assert circle(ring | {"tasks.c": ("os", "tasks.c.z", "tasks.d")}) == []


def test_flat_files_of_cluster_are_the_commands() -> None:
    assert {path.stem for path in (ROOT / "cluster").glob("*.py")} == COMMANDS


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


def test_the_driver_comes_up_without_the_libraries_of_its_actors() -> None:
    """They are imported once, in the process that works with them: a second costs seconds."""
    loaded = imported_at_once("cluster.run.train") | imported_at_once("cluster.cli")
    assert {"learner.actor.LearnerGroup", "ray"} <= loaded
    heavy = ("transformers", "deepspeed", "vllm", "peft", "accelerate", "scipy.stats")
    assert {name for name in loaded if within(name, heavy)} == set()


def test_a_process_imports_what_it_works_with_and_no_more() -> None:
    """What others' packages stand at the head of each actor's file, before it is asked anything."""
    light = {"PIL", "jinja2", "numpy", "pydantic", "pydantic_core", "ray", "xxhash"}
    for actor, allowed in {
        "rewards.worker": light,
        "rollout.sampler": light | {"torch"},
        "learner.actor": light | {"torch"},
    }.items():
        packages = {name.split(".")[0] for name in imported_at_once(actor)}
        assert packages - {*ROOMS, *sys.stdlib_module_names} <= allowed, actor


def imported_at_once(module: str) -> set[str]:
    """What importing a module of ours imports before anything is called, `from a import b` as a.b.

    Ours are followed, not others' modules.
    """
    found: set[str] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        path = _file_of(name) or _file_of(name.rpartition(".")[0])
        if name not in found and path is not None:
            queue += first_imports(path)
        found.add(name)
    return found


@cache
def first_imports(path: Path) -> tuple[str, ...]:
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, IMPORTS)]
    return tuple(imports(ast.unparse(ast.Module(body, []))))


def _file_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def test_no_junk_drawer_and_no_file_too_long_to_read() -> None:
    files = python_files(*ROOMS, "tests", "benchmarks", "docs", "recipes")
    assert not [path for path in files if path.name in ("utils.py", "helpers.py")]
    lengths = {str(p.relative_to(ROOT)): p.read_text().count("\n") for p in files}
    long = [path for path, n in lengths.items() if n > LONGEST_FILE]
    reasons = {path: ast.get_docstring(ast.parse((ROOT / path).read_text())) or "" for path in long}
    assert [path for path, told in reasons.items() if REASON not in told.lower()] == []


def _files_of(room: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in python_files(room)}
