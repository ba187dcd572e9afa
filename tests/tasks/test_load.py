"""A task by its name: built in, or a class of the user's own; what is wrong with a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.dataset_write import write_dataset
from tasks.load import load_task
from tests.support.shade import read_dataset


def own_module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


def test_a_users_own_task_from_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "support" / "shade.py").read_text()
    head, _, _ = text.partition("SHADE = Shade()")
    head = head.replace('name = "shade"', 'name = "own_shade:Shade"')
    own_module(tmp_path, "own_shade", head, monkeypatch)
    task = load_task("own_shade:Shade")
    write_dataset(tmp_path / "data", {"train": 5}, task, task.spec(), 0, "verbose")
    assert {p.task for p in read_dataset(tmp_path / "data")} == {"own_shade:Shade"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sudokku", 'no task "sudokku"; did you mean "sudoku"'),
        ("", "the built-in tasks are"),
        ("no_such_module:Task", 'no module "no_such_module" on the path'),
        ("tasks.no_such:Task", 'no module "tasks.no_such" on the path'),
        ("own_bad:Taks", 'has no "Taks"; did you mean "Task"'),
        ("own_bad:number", "does not name a class"),
        ("own_bad:Task", "lacks name, parse, check; "),
        ("own_half:Half", "has solve and lacks consistent; tasks.core.Solves is both or neither"),
        ("own_bad:Asks", r"Asks\(\) failed .*without arguments"),
        ("own_bad:Task()", "two Python names"),
        ("own_bad:os.system", "two Python names"),
        ("own_deps:Task", "own_deps cannot be imported: No module named 'not_installed'"),
        ("own_crash:Task", "own_crash cannot be imported: ZeroDivisionError"),
        ("own_child:Child", r"its `name` is 'sudoku'; set name = \"own_child:Child\""),
    ],
)
def test_what_is_wrong_with_a_task_name(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {
        "own_bad": "number = 3\nclass Task: pass\nclass Asks:\n    def __init__(self, x): pass\n",
        "own_deps": "import not_installed\n",
        "own_crash": "1 / 0\n",
        "own_half": "from tasks.sudoku import Sudoku\nclass Half(Sudoku): consistent = None\n",
        "own_child": "from tasks.sudoku import Sudoku\nclass Child(Sudoku): pass\n",
    }
    for module, text in modules.items():
        own_module(tmp_path, module, text, monkeypatch)
    with pytest.raises(ValueError, match=message):
        load_task(name)
