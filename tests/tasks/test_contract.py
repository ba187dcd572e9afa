"""Each way to break a task's contract is named in a line; tasks that keep it pass in silence."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from cluster.cli import main
from tasks.contract import check_problems, check_task
from tasks.core import DataError, Parsed, Problem, Style, Task
from tasks.figures import Words
from tasks.load import load_task
from tasks.responses import compose_response, oracle_prefix, parse_response
from tasks.sudoku import Sudoku


class Knobs(BaseModel):
    """None."""


@cache
def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(file, format="PNG")
    return file.getvalue()


class Shade:
    """Read a grey level of 0 to 99 and double it: a task that keeps the contract."""

    name = f"{__name__}:Shade"
    spec: type[BaseModel] = Knobs

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        return self.make("Twice?", picture(int(rng.integers(100))))

    def make(self, prompt: str, image: bytes) -> Problem:
        level = Image.open(io.BytesIO(image)).getpixel((0, 0))
        assert isinstance(level, tuple)
        n = int(level[0])
        return Problem(f"s-{n}", self.name, prompt, image, str(n), {"n": n}, {}, f"key-{n}")

    def number(self, text: str) -> tuple[int | None, tuple[str, ...]]:
        plain = text.strip().isascii() and text.strip().isdigit() and len(text) < 9
        return (int(text), ()) if plain else (None, ("bad_number",))

    def parse(self, text: str) -> Parsed:
        return parse_response(text, self.number, self.number)

    def check(self, problem: Problem, answer: Any) -> bool:
        return bool(answer == 2 * problem.truth["n"])

    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        exact = perception == problem.truth["n"]
        return exact, float(exact)

    def consistent(self, problem: Problem, perception: Any, answer: Any) -> bool:
        return bool(answer == 2 * perception)

    def oracle_prefix(self, problem: Problem) -> str:
        return oracle_prefix(problem.perception)

    def solve(self, problem: Problem, perception: Any) -> Any | None:
        return 2 * perception

    def demonstrate(self, problem: Problem, style: Style) -> str:
        return compose_response(problem.perception, "twice", str(2 * problem.truth["n"]))

    def from_row(self, query: str, image: bytes, ground_truth: str) -> Problem:
        n, _ = self.number(ground_truth)
        if n is None or n > 255:
            raise DataError("ground_truth: must be a grey level")
        return self.make(query, picture(n))

    def to_ground_truth(self, problem: Problem) -> str:
        return problem.perception


class FromTheAir(Shade):
    air: ClassVar[np.random.Generator] = np.random.default_rng(1)

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        return super().generate(self.air, spec)


class AlwaysTheSame(Shade):
    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        return replace(self.make("Twice?", picture(3)), symmetry_key=str(rng.integers(9)))


class Narrow(Shade):
    """One problem, so one of the splits is empty."""

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        return self.make("Twice?", picture(3))


class Counts(Shade):
    count: ClassVar[list[int]] = []

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        self.count.append(1)
        return replace(super().generate(rng, spec), id=f"s-{len(self.count)}")


class OneId(Shade):
    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        return replace(super().generate(rng, spec), id="s")


class NumPyTruth(Shade):
    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        made = super().generate(rng, spec)
        return replace(made, truth={"n": np.int64(made.truth["n"])})


class NumberedTruth(Shade):
    """Keys that are numbers are text behind JSON."""

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        made = super().generate(rng, spec)
        return replace(made, truth={0: made.truth["n"]} | made.truth)  # type: ignore[dict-item]

    def check(self, problem: Problem, answer: Any) -> bool:
        return bool(answer == 2 * problem.truth[0])  # type: ignore[index]


class NoImage(Shade):
    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        return replace(super().generate(rng, spec), image=b"none")


class Raises(Shade):
    def number(self, text: str) -> tuple[int | None, tuple[str, ...]]:
        return int(text), ()


class Unnamed(Shade):
    def number(self, text: str) -> tuple[int | None, tuple[str, ...]]:
        return super().number(text)[0], ()


class NoSpans(Shade):
    def parse(self, text: str) -> Parsed:
        return replace(super().parse(text), spans={})


class AcceptsAll(Shade):
    def check(self, problem: Problem, answer: Any) -> bool:
        return True


class RefusesAll(Shade):
    def check(self, problem: Problem, answer: Any) -> bool:
        return False


class States(Shade):
    def states_answer(self, problem: Problem, perception: Any) -> bool:
        return True


class LosesTheRow(Shade):
    def to_ground_truth(self, problem: Problem) -> str:
        return "7"


class RowWithoutAName(Shade):
    def from_row(self, query: str, image: bytes, ground_truth: str) -> Problem:
        return self.make(query, picture(json.loads(ground_truth)))


class UnreadablePrefix(Shade):
    def oracle_prefix(self, problem: Problem) -> str:
        return f"<perception>level {problem.perception}</perception>\n"


class HalfScore(Shade):
    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        return perception == problem.truth["n"], 0.5


class AlwaysSeen(Shade):
    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        return True, 1.0


class Peeks(Shade):
    def solve(self, problem: Problem, perception: Any) -> Any | None:
        return 2 * problem.truth["n"]


class PeeksWhenAsked(Shade):
    def consistent(self, problem: Problem, perception: Any, answer: Any) -> bool:
        return self.check(problem, answer)


class WrongSolver(Shade):
    def solve(self, problem: Problem, perception: Any) -> Any | None:
        return 2 * perception + 1


class Sloppy(Shade):
    def demonstrate(self, problem: Problem, style: Style) -> str:
        return super().demonstrate(problem, style) + (" So." if style == "verbose" else "")


class Labelled(Shade):
    def vision_labels(self, problem: Problem) -> np.ndarray:
        return np.zeros(problem.truth["n"] + 1, dtype=np.int64)


class ListedItems(Shade):
    def perception_items(self, perception: Any) -> Any:
        return [perception]


class DrawsADict(Shade):
    def draw_perception(self, problem: Problem, perception: Any) -> Any:
        return {"kind": "words"}

    def draw_answer(self, problem: Problem, perception: Any, answer: Any) -> Any:
        return Words(rows=(("right", str(answer)),), text=f"{perception:d} doubled")


class AnotherBegin(Shade):
    def begin(self, rng: np.random.Generator, spec: BaseModel) -> tuple[str, Any]:
        made = self.generate(rng, spec)
        return "key", lambda: replace(made, symmetry_key=made.symmetry_key)


class Courteous(Sudoku):
    """One of ours with a name, a prompt and a `generate` of its own."""

    name = f"{__name__}:Courteous"

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        made = super().generate(rng, spec)
        return replace(made, prompt=f"Please. {made.prompt}")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (FromTheAir, "generate: the same rng gives another problem"),
        (AlwaysTheSame, "generate: all draws are one problem"),
        (Narrow, "generate: "),
        (
            Counts,
            "generate: the same rng gives another problem; take all chance from it (draw 0: id,",
        ),
        (OneId, "generate: different problems have one id"),
        (AnotherBegin, "begin: tells another symmetry key"),
        (NumPyTruth, "problem.truth: cannot be stored as JSON"),
        (NumberedTruth, "check: raised KeyError"),
        (NoImage, "check_image: raised DataError ("),
        (Raises, "parse: raised ValueError"),
        (Unnamed, "parse: no perception was read and no defect is named"),
        (NoSpans, "parse: reads a perception without its span"),
        (AcceptsAll, "check: accepts the answer of every other problem"),
        (RefusesAll, "check: refuses the demonstrated answer"),
        (States, "states_answer: must be False for p*"),
        (LosesTheRow, "from_row: of to_ground_truth it makes another perception"),
        (RowWithoutAName, "from_row: raised JSONDecodeError; raise DataError"),
        (UnreadablePrefix, "oracle_prefix: parse does not read p* back: bad_number"),
        (HalfScore, "score_perception: of p* it must be (True, 1.0), not (True, 0.5)"),
        (AlwaysSeen, "score_perception: calls the p* of another problem exact"),
        (Peeks, "solve: looks at the problem's truth"),
        (PeeksWhenAsked, "consistent: looks at the problem's truth"),
        (WrongSolver, "solve: check refuses its answer for p*"),
        (Sloppy, "demonstrate: parse finds a defect in it: text_after_answer"),
        (Labelled, "vision_labels: their number must be the same"),
        (DrawsADict, "draw_perception: returned a dict, not a Figure"),
        (DrawsADict, "draw_answer: raised TypeError"),  # of a perception that could not be read
        (ListedItems, "perception_items: returned a list, not a frozenset"),
    ],
)
def test_what_is_broken_is_named_in_a_line(broken: type[Shade], said: str) -> None:
    task: Task = broken()
    found = check_task(task, Knobs(), problems=5)
    assert any(line.startswith(said) for line in found), found
    assert all("\n" not in line and len(line) < 300 for line in found)
    if broken not in (AlwaysTheSame, OneId):
        assert len(found) <= 4, found  # one fault is not told in many ways


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("sudoku", {"size": 4, "blanks": 3, "noise": 20}),
        ("sudoku", {"blanks": 40, "prompt": "brief"}),
        ("graph_coloring", {"vertices": 4, "canvas": 64, "noise": 10}),
        ("graph_coloring", {"vertices": 8, "chromatic": 3, "layout": "spring", "planar": "planar"}),
    ],
)
def test_tasks_that_keep_the_contract_pass(name: str, knobs: dict[str, Any]) -> None:
    task = load_task(name)
    assert check_task(task, task.spec(**knobs), problems=4) == []


def test_a_task_of_ones_own_passes_with_rows_of_a_file_too() -> None:
    task: Task = Shade()
    assert check_task(task, Knobs()) == []
    rows = [task.from_row("Twice?", b"", str(n)) for n in (3, 4, 200)]
    assert check_problems(task, rows) == []
    courteous: Task = Courteous()
    assert check_task(courteous, courteous.spec.model_validate({"size": 4}), problems=3) == []


def test_the_command_and_a_run_name_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    name = f"{__name__}:States"
    monkeypatch.setattr(States, "name", name)
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        f'name = "own"\nmodel.path = "models/tiny-qwen3-vl"\n[[tasks]]\nname = "{name}"\n'
    )
    for arguments, where in (
        (["tasks", "check", name], ""),
        (["train", str(recipe), "--dry-run"], "tasks[0]: "),
    ):
        monkeypatch.setattr(sys, "argv", ["equipoise", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        printed = capsys.readouterr().err
        assert f"{where}{name}: states_answer: must be False for p* (problem s-" in printed
    monkeypatch.setattr(sys, "argv", ["equipoise", "tasks", "check", "sudoku", "--set", "size=4"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "all its abilities keep the contract on 8 fresh problems" in capsys.readouterr().out
