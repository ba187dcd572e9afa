"""Each way to break a task's contract is named in a line; tasks that keep it pass in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from tasks.contract import check_problems, check_task
from tasks.core import Problem
from tasks.figures import Words
from tasks.sudoku import Sudoku
from tests.support.shade import SHADE, SPEC, Shade, shades
from tests.support.terminal import Equipoise

AIR, NUMBERS = np.random.default_rng(1), count()
(THREE,) = (replace(problem, images=(SHADE.picture(3),)) for problem in shades([3]))


def generate(change: Callable[[Problem], dict[str, Any]]) -> dict[str, Any]:
    """A `generate` whose problems are changed."""

    def changed(self: Shade, rng: np.random.Generator, spec: BaseModel) -> Problem:
        made = Shade.generate(self, rng, spec)
        return replace(made, **change(made))

    return {"generate": changed}


def begin_another(self: Shade, rng: np.random.Generator, spec: BaseModel) -> tuple[str, Any]:
    made = self.generate(rng, spec)
    return "key", lambda: made


BROKEN: list[tuple[dict[str, Any], str]] = [
    (
        {"generate": lambda self, rng, spec: Shade.generate(self, AIR, spec)},
        "generate: the same rng gives another problem",
    ),
    (
        {"generate": lambda self, rng, spec: replace(THREE, symmetry_key=str(rng.integers(9)))},
        "generate: all draws are one problem",
    ),
    ({"generate": lambda *_: THREE}, "generate: "),  # one problem, so one split is empty
    (
        generate(lambda _: {"id": f"s-{next(NUMBERS)}"}),
        "generate: the same rng gives another problem; take all chance from it (draw 0: id,",
    ),
    (generate(lambda _: {"id": "s"}), "generate: different problems have one id"),
    ({"begin": begin_another}, "begin: tells another symmetry key"),
    (
        generate(lambda made: {"truth": {"shade": np.int64(made.truth["shade"])}}),
        "problem.truth: cannot be stored as JSON",
    ),
    (  # keys that are numbers are text behind JSON
        generate(lambda made: {"truth": {0: made.truth["shade"]} | made.truth})
        | {"check": lambda _, problem, answer: answer == problem.truth[0] + 1},
        "check: raised KeyError",
    ),
    (generate(lambda _: {"images": (b"none",)}), "check_image: raised DataError ("),
    (generate(lambda _: {"prompt": "<image> of <image>"}), "placed: raised DataError ("),
    ({"number": lambda _, text: (int(text), ())}, "parse: raised ValueError"),
    (
        {"number": lambda self, text: (Shade.number(self, text)[0], ())},
        "parse: no perception was read and no defect is named",
    ),
    (
        {"parse": lambda self, text: replace(Shade.parse(self, text), spans={})},
        "parse: reads a perception without its span",
    ),
    ({"check": lambda *_: True}, "check: accepts the answer of every other problem"),
    ({"check": lambda *_: False}, "check: refuses the demonstrated answer"),
    ({"states_answer": lambda *_: True}, "states_answer: must be False for p*"),
    (
        {"to_ground_truth": lambda *_: "7"},
        "from_row: of to_ground_truth it makes another perception",
    ),
    (
        {"from_row": lambda _, query, *row: SHADE.from_row(query, row[0], str(json.loads(row[1])))},
        "from_row: raised JSONDecodeError; raise DataError",
    ),
    (
        {"oracle_prefix": lambda _, made: f"<perception>level {made.perception}</perception>\n"},
        "oracle_prefix: parse does not read p* back: bad_number",
    ),
    (
        {"score_perception": lambda _, made, seen: (seen == made.truth["shade"], 0.5)},
        "score_perception: of p* it must be (True, 1.0), not (True, 0.5)",
    ),
    (
        {"score_perception": lambda *_: (True, 1.0)},
        "score_perception: calls the p* of another problem exact",
    ),
    (
        {"solve": lambda _, made, seen: made.truth["shade"] + 1},
        "solve: looks at the problem's truth",
    ),
    (
        {"consistent": lambda _, made, seen, answer: answer == made.truth["shade"] + 1},
        "consistent: looks at the problem's truth",
    ),
    ({"solve": lambda _, made, seen: seen + 2}, "solve: check refuses its answer for p*"),
    (
        {
            "demonstrate": lambda self, made, style: (
                Shade.demonstrate(self, made, style) + (" So." if style == "verbose" else "")
            )
        },
        "demonstrate: parse finds a defect in it: text_after_answer",
    ),
    (
        {"vision_labels": lambda _, made: np.zeros(made.truth["shade"] + 1, dtype=np.int64)},
        "vision_labels: their number must be the same",
    ),
    (
        {"perception_items": lambda _, seen: [seen]},
        "perception_items: returned a list, not a frozenset",
    ),
    (
        {"draw_perception": lambda *_: {"kind": "words"}},
        "draw_perception: returned a dict, not a F",
    ),
    (  # of a perception that could not be read
        {"draw_answer": lambda _, made, seen, answer: Words(rows=(), text=f"{seen:d}")},
        "draw_answer: raised TypeError",
    ),
]


@pytest.mark.parametrize(("members", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_what_is_broken_is_named_in_a_line(members: dict[str, Any], said: str) -> None:
    for name, member in members.items():
        if callable(member):
            member.__name__ = name  # as a method's own is
    task = type("Broken", (Shade,), members)()
    found = check_task(task, SPEC, problems=5)
    assert any(line.startswith(said) for line in found), found
    assert all("\n" not in line and len(line) < 300 for line in found)
    if "all draws" not in said and "have one id" not in said:
        assert len(found) <= 4, found  # one fault is not told in many ways


class Courteous(Sudoku):
    """One of ours with a name, a prompt and a `generate` of its own."""

    name = f"{__name__}:Courteous"

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        made = super().generate(rng, spec)
        return replace(made, prompt=f"Please. {made.prompt}")


def test_a_task_of_ones_own_passes_with_rows_of_a_file_too() -> None:
    assert check_task(SHADE, SPEC) == []
    rows = [SHADE.from_row("Which?", SHADE.picture(n), str(n)) for n in (3, 4, 200)]
    assert check_problems(SHADE, rows) == []
    courteous = Courteous()
    assert check_task(courteous, courteous.spec.model_validate({"size": 4}), problems=3) == []


class States(Shade):
    name = f"{__name__}:States"

    def states_answer(self, problem: Problem, perception: Any) -> bool:
        return True


def test_the_command_and_a_run_name_what_is_wrong(tmp_path: Any, equipoise: Equipoise) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        f'name = "own"\nmodel.path = "models/tiny-qwen3-vl"\n[[tasks]]\nname = "{States.name}"\n'
    )
    for arguments, where in (
        (["tasks", "check", States.name], ""),
        (["train", str(recipe), "--dry-run"], "tasks[0]: "),
    ):
        code, _, error = equipoise(*arguments)
        said = f"{where}{States.name}: states_answer: must be False for p* (problem shade-"
        assert code == 2 and said in error
    code, printed, _ = equipoise("tasks", "check", "sudoku", "--set", "size=4")
    assert code == 0 and "all its abilities keep the contract on 8 fresh problems" in printed
