"""From the name a recipe writes to the task object: `sudoku`, `vqa`, `module:Class`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from tasks.core import ABILITIES, Generates, Task, lacking, members

BUILT_IN = {
    "sudoku": "tasks.sudoku:Sudoku",
    "graph_coloring": "tasks.graph_coloring:GraphColoring",
    "scenes": "tasks.scenes:Scenes",
    "vqa": "tasks.vqa.task:Vqa",
    "vqa/think_answer": "tasks.vqa.task:ThinkAnswer",
    "vqa/boxed": "tasks.vqa.task:Boxed",
}


def load_task(name: str) -> Task:
    """Make the task that `name` stands for.

    Raises:
        ValueError: an unknown name, a module that is absent or fails on import, a class that
            is absent, cannot be made without arguments, lacks members of `Task`, or has half an
            ability.
    """
    target = BUILT_IN.get(name, name)
    module_name, colon, class_name = target.partition(":")
    label = f'task "{name}"'
    if not colon:
        hint = _did_you_mean(name, BUILT_IN)
        raise ValueError(
            f'no task "{name}"{hint}; the built-in tasks are {", ".join(BUILT_IN)}, '
            'and a task of your own is named "module:Class"'
        )
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise ValueError(f'{label}: expected "module:Class", two Python names')

    task_class = import_named(label, target)
    if not inspect.isclass(task_class):
        raise ValueError(f'{label}: module {module_name} does not name a class: "{class_name}"')
    try:
        task: Any = task_class()
    except Exception as error:
        raise ValueError(
            f"{label}: {class_name}() failed ({type(error).__name__}: {error}); "
            "a task is made without arguments"
        ) from error
    _check_members(name, task)
    return task


def import_named(label: str, target: str) -> Any:
    """What a recipe names by `"module:name"` or `"folder/file.py:name"`.

    Modules, and files without an absolute path, are found from the working folder or PYTHONPATH,
    in every process of a run. Raises ValueError, which begins with `label`: no such module or file,
    one that fails on import, no such name in it.
    """
    module_name, _, name = target.rpartition(":")
    try:
        if module_name.endswith(".py"):
            module = _module_of_file(module_name)
        else:
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The named module itself is absent, as opposed to something that it imports.
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            kind = "file" if module_name.endswith(".py") else "module"
            raise ValueError(
                f'{label}: no {kind} "{error.name}" on the path; run from the folder '
                "that holds it, or add that folder to PYTHONPATH"
            ) from error
        raise ValueError(f"{label}: {module_name} cannot be imported: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{label}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        hint = _did_you_mean(name, [known for known in vars(module) if known[0] != "_"])
        raise ValueError(f'{label}: {module_name} has no "{name}"{hint}')
    return getattr(module, name)


def _module_of_file(file: str) -> ModuleType:
    """The module that a file is, loaded once a process; it may import what lies beside it."""
    file_path = next((p for root in ("", *sys.path) if (p := Path(root, file)).is_file()), None)
    if file_path is None:
        raise ModuleNotFoundError(name=file)
    path = file_path.resolve()
    # The file's name alone may be that of a module of the library.
    name = f"{path.stem}@{path.parent}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path += [folder for folder in [str(path.parent)] if folder not in sys.path]
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _check_members(name: str, task: Task) -> None:
    if missing := lacking(task, Task):
        raise ValueError(
            f'task "{name}" lacks {", ".join(missing)}; tasks.core.Task says what each must do'
        )
    for ability in ABILITIES:
        missing = lacking(task, ability)
        if missing and (half := [n for n in members(ability) if n not in missing]):
            raise ValueError(
                f'task "{name}" has {", ".join(half)} and lacks {", ".join(missing)}; '
                f"tasks.core.{ability.__name__} is both or neither"
            )
    if isinstance(task, Generates) and not (
        inspect.isclass(task.spec) and issubclass(task.spec, BaseModel)
    ):
        raise ValueError(f'task "{name}": `spec` must be a pydantic model class of its knobs')
    # A problem carries this name and is later checked by the task it names; a subclass that
    # kept its parent's name would hand its problems to the parent.
    if task.name != name:
        raise ValueError(f'task "{name}": its `name` is {task.name!r}; set name = "{name}"')


def _did_you_mean(word: str, known: dict[str, str] | list[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
