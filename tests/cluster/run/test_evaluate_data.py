"""An evaluation of people's own questions: its numbers by hand, and what its folder keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.recipe.problems import open_sources
from cluster.recipe.recipe import Recipe, RecipeError, UserError, data_task
from cluster.recipe.sections import EvalConfig
from cluster.record.evaluation import EvalTable
from cluster.report.run_report import run_report
from cluster.run.evaluate import Found, evaluate_all
from cluster.run.evaluate_data import Made, keep, read_evaluation
from cluster.run.passes import PASSES
from rollout.record import Group, Rollout, SampleRequest
from rollout.settings import ModelConfig
from tasks.load import load_task
from tests.support.recipes import made_recipe
from tests.support.vqa_files import cell, write_parquet

pytestmark = pytest.mark.usefixtures("own_cache")

NONE = np.zeros(0, np.int32)
SAMPLED = {
    1: ["1", "1.0", "9", "<b>"],  # right twice, in other words
    2: ["3", "3", "2", "2"],  # a tie
    3: ["4", "5", "6", "3"],  # four answers, once each
    4: ["", "", "", ""],
}


def response(problem_id: str, place: int, text: str, asked: SampleRequest) -> Rollout:
    whole = f"Bars. \\boxed{{{text}}}" if text else "Bars."
    return Rollout(
        rollout_id=f"{asked.group_id}/{place}", group_id=asked.group_id, kind=asked.kind,
        view=asked.view, prompt_ids=NONE, response_ids=NONE, images=(), logprobs=NONE,
        versions=NONE, segments=NONE, prefix="", text=whole,
        parsed=load_task("vqa/boxed").parse(whole), finish_reason="stop", seconds=0.0, sampler="s",
    )  # fmt: skip


class Samplers:
    """Greedy is right of what `right` holds; without the image nothing is."""

    def __init__(self, right: set[int]) -> None:
        self.right = right

    def sample(self, requests: Sequence[SampleRequest]) -> list[Group]:
        found = []
        for asked in requests:
            number = int(asked.problem.truth["answers"][0])
            texts = [str(number) if number in self.right else "0"]
            if asked.n > 1:
                texts = SAMPLED[number]
            elif asked.kind == "blind":
                texts = ["0"]
            rollouts = [response(asked.problem.id, i, t, asked) for i, t in enumerate(texts)]
            found.append(Group(asked.group_id, asked.problem, tuple(rollouts)))
        return found


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [
        {"images": [cell(n)], "problem": "<image>How many?", "answer": str(n), "level": n % 2}
        for n in SAMPLED
    ]
    return str(write_parquet(tmp_path / "bars.parquet", rows))


def evaluated(data: str, folder: Path, right: set[int], earlier: EvalTable | None = None) -> Made:
    task = data_task(data, settings=["form=boxed"])
    chosen = EvalConfig(problems=4, samples=4, passes=PASSES)
    recipe = Recipe(name="e", model=ModelConfig(path="m"), tasks=(task,), eval=chosen)
    (source,) = open_sources(recipe.tasks)
    found: Found = {}
    tables = evaluate_all(Samplers(right), [source], recipe, keep=found.update)  # type: ignore[arg-type]
    return keep(folder, recipe, source, tables["vqa"], found, ["level"], earlier)


def test_the_numbers_are_those_worked_out_by_hand(data: str, tmp_path: Path) -> None:
    made = evaluated(data, tmp_path / "run", {1, 2})
    values = {row.metric: row.value for row in made.table.rows if "defect" not in row.metric}
    assert values == pytest.approx(
        {
            "a": 2 / 4,
            "a avg@4": (2 + 2 + 1 + 0) / 16,
            # 1 - C(4 - c, 2) / C(4, 2) for c = 2, 2, 1, 0
            "a pass@2": (5 / 6 + 5 / 6 + 1 / 2 + 0) / 4,
            "a pass@4": 3 / 4,
            "a maj@4": (1 + 1 / 2 + 1 / 4 + 0) / 4,
            "blind": 0.0,
        }
    )
    assert {value: part["a"].value for value, part in made.parts["level"].items()} == {
        "0": 1 / 2,
        "1": 1 / 2,
    }
    assert made.parts["level"]["1"]["a avg@4"].value == (2 + 1) / 8
    assert made.parts["level"]["1"]["a"].n == 2


def test_every_response_is_kept_and_shown(data: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    evaluated(data, folder, {1, 2})
    (file,) = (folder / "rollouts").glob("*.parquet")
    rows = pq.read_table(file).to_pylist()
    assert len(rows) == 4 * (1 + 4 + 1)
    shown = run_report(folder).read_text("utf-8")
    # What a model wrote is text on the page.
    assert "1.0" in shown and "<b>}" not in shown
    assert read_evaluation(folder)["a"].value == 1 / 2


def test_two_checkpoints_are_compared_problem_by_problem(data: str, tmp_path: Path) -> None:
    evaluated(data, tmp_path / "one", {1, 2})
    made = evaluated(data, tmp_path / "two", {2, 3, 4}, read_evaluation(tmp_path / "one"))
    (change,) = [change for change in made.changes if change.metric == "a"]
    assert (change.paired, change.gained, change.lost) == (4, 2, 1)
    rows = pq.read_table(tmp_path / "two" / "compared.parquet").to_pylist()
    pairs = sorted((row["level"], row["a before"], row["a after"]) for row in rows)
    assert pairs == [("0", 0.0, 1.0), ("0", 1.0, 1.0), ("1", 0.0, 1.0), ("1", 1.0, 0.0)]
    kept = json.loads((tmp_path / "two" / "evaluation.json").read_text("utf-8"))["vqa"]
    assert kept.keys() == {"before", "after", "change"}
    assert read_evaluation(tmp_path / "two")["a"].value == 3 / 4


def test_an_entry_of_the_recipe_says_how_the_file_is_read(data: str, tmp_path: Path) -> None:
    tasks = '{ name = "vqa", data = "x", form = "think_answer", checker = "number" }'
    like = made_recipe(tasks=tasks)
    told = data_task(data, like=like, settings=["columns.answer=level"])
    assert (told.form, told.checker, told.data) == ("think_answer", "number", {"test": data})
    assert told.columns == {"answer": "level"}
    with pytest.raises(RecipeError, match=r"--set form: "):
        data_task(data, settings=["form=json"])
    with pytest.raises(UserError, match="no evaluation of data there"):
        read_evaluation(tmp_path)
