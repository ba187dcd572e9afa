"""Rewards that are functions: what their rows say, how they are found, how they fail."""

from __future__ import annotations

import importlib
import json
import re
import textwrap
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.functions import Row, rows_of
from rewards.scored import TermError
from rewards.settings import RewardConfig, RewardTermConfig
from rewards.terms import facts_of, load_term, score_group, score_step
from rollout.record import Group
from tasks.load import import_named, load_task
from tasks.splits import draw_problem
from tests.support.toys import TASK, group, rollout

OWN = "tests.support.toys:above_the_mean"


def test_a_row_holds_what_was_asked_written_and_known() -> None:
    task = load_task("graph_coloring")
    problem = draw_problem(task, task.spec(), "train", 0, 0)
    whole = task.demonstrate(problem, "terse")
    texts = [whole, whole.split("</answer>")[0], whole.split("<answer>")[0], "I see nothing."]
    ids, segments = np.arange(7, dtype=np.int32), np.zeros(7, np.int8)
    rollouts = tuple(
        rollout(f"g-{i}", text, task.parse(text), ids, segments, finish_reason="length")
        for i, text in enumerate(texts)
    )
    rows = rows_of(Group("g", problem, rollouts))
    read, unclosed, cut, prose = rows
    assert read.perception == problem.perception
    assert f"<answer>\n{read.answer}\n</answer>" in whole
    assert f"<reasoning>\n{read.reasoning}\n</reasoning>" in whole
    assert (unclosed.answer, cut.answer) == (read.answer, None)
    assert (cut.perception, cut.defects) == (problem.perception, ("missing_answer",))
    assert (prose.perception, prose.reasoning, prose.answer) == (None, None, None)
    assert [row.response for row in rows] == texts
    for row in rows:
        assert (row.prompt, row.images, row.problem) == (problem.prompt, problem.images, problem.id)
        assert (row.gold, row.extra, row.task) == (problem.truth, problem.extra, problem.task)
        assert (row.tokens, row.finish_reason, row.group) == (7, "length", "g")


def test_a_function_is_a_term_of_a_group_or_of_the_step() -> None:
    groups = [group(1, "1;2;", "1;;x"), group(2, "2;;", "2;44;", "2;4;")]
    term = load_term(OWN)
    assert term.name == "above_the_mean"
    (mine,) = [score_group(TASK, groups[1], {"own": term}).values["own"]]
    lengths = np.array([3.0, 5.0, 4.0])
    np.testing.assert_allclose(mine, lengths - 4.0)
    together = score_step(groups, {"own": term})
    values = [part.values["own"].tolist() for part in together.parted([2, 3])]
    assert values == [[0.0, 0.0], [-1.0, 1.0, 0.0]]
    assert all(part.seconds == together.seconds for part in together.parted([2, 3]))
    failing = score_step([*groups, group(0, "0;0;")], {"own": load_term(OWN, {"what": "short"})})
    for part in failing.parted([2, 3, 1]):
        assert [(f.term, f.kind) for f in part.failures] == [("own", "wrong_length")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working folder."""
    (tmp_path / "mine").mkdir()
    files = {
        "beside_the_rewards.py": "SCALE = 3\n",
        "json.py": """
            from dataclasses import dataclass
            import beside_the_rewards

            made = []

            @dataclass
            class Kept:
                value: float

            def score(rows, offset=0.0):
                made.append(len(rows))
                return [Kept(beside_the_rewards.SCALE * row.tokens + offset).value for row in rows]

            def of_two(task, group):
                return []

            number = 3
        """,
        "broken.py": "import json\nraise KeyError('cells')\n",
    }
    for name, text in files.items():
        (tmp_path / "mine" / name).write_text(textwrap.dedent(text), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_is_found_from_the_working_folder_and_may_have_any_name(folder: Path) -> None:
    one = group(1, "1;2;", "1;;x")
    for name in ("mine/json.py:score", f"{folder}/mine/json.py:score"):
        RewardTermConfig(name=name)
        term = load_term(name, {"offset": 0.5})
        assert score_group(TASK, one, {"own": term}).values["own"].tolist() == [12.5, 15.5]
    # Loaded once, and not in the place of the library's module of that name.
    assert import_named("a list", "mine/json.py:made") == [2, 2]
    assert importlib.import_module("json") is json


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("mine/json.py:scrore", {}, 'mine/json.py has no "scrore"; did you mean "score"'),
        ("mine/jsn.py:score", {}, 'no file "mine/jsn.py" on the path; run from the folder'),
        ("mine/broken.py:score", {}, "mine/broken.py cannot be imported: KeyError: 'cells'"),
        ("mine/json.py:of_two", {}, "called as of_two(rows): missing a required argument"),
        ("mine/json.py:score", {"offst": 1.0}, "score(rows, offst=1.0): got an unexpected keyword"),
        ("mine/json.py:number", {}, "int object is not callable"),
    ],
)
def test_a_function_that_cannot_be_called_is_one_line(
    folder: Path, name: str, args: dict[str, Any], says: str
) -> None:
    with pytest.raises(TermError) as error:
        facts_of([RewardTermConfig(name=name, args=args)])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"reward term '{name}'")


@pytest.mark.parametrize("name", ["outcome", "tests.support.toys:later"])
def test_only_a_plain_function_takes_the_whole_step(name: str) -> None:
    with pytest.raises(TermError, match=f"'{name}': scope = \"step\" is for a plain function"):
        facts_of([RewardTermConfig(name=name, scope="step")])
    assert facts_of([RewardTermConfig(name=OWN, scope="step")])["above_the_mean"].function


def test_the_page_names_every_field_of_a_row_and_its_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "your_reward.md").read_text(encoding="utf-8")
    code, toml = (re.findall(rf"```{kind}\n(.*?)```", page, re.S)[0] for kind in ("python", "toml"))
    (tmp_path / "my_rewards.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (entry,) = RewardConfig.model_validate(tomllib.loads(toml)["reward"]).terms
    term: Any = load_term(entry.name, entry.args)
    empty = {field.name: None for field in fields(Row)}
    rows = [
        Row(**empty | {"answer": answer, "gold": {"total": 7}, "tokens": tokens})  # type: ignore[arg-type]
        for answer, tokens in (("7", 50), ("it is 7", 150), ("8", 50), (None, 200))
    ]
    assert term.function(rows) == [1.0, 0.5, 0.0, -1.0]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", " ".join(cells)) == list(empty)
