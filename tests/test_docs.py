"""The documents in docs/ against the code: files, names, metrics, columns and the example."""

from __future__ import annotations

import ast
import importlib
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from cluster.recipe.problems import held_out, open_sources
from cluster.recipe.recipe import load_recipe
from cluster.record.folder import METRIC_SCHEMA, ROLLOUT_SCHEMA
from rewards.judge import JudgeSettings
from rewards.settings import BUILT_IN, RewardConfig
from rewards.terms import load_term
from rollout.record import Group, Rollout
from tasks.calls import CallForm
from tasks.contract import check_problems, check_task
from tasks.core import DataError
from tasks.dataset_import import import_rows
from tasks.dataset_write import write_dataset
from tasks.datasets import read_examples
from tasks.environments import DONE, Observation, load_environment
from tasks.load import load_task
from tasks.splits import draw_problem, split_of
from tests.support.shade import png

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tasks", "rollout", "rewards", "learner", "cluster")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def first_column(text: str) -> list[str]:
    """Code spans in the first cell of each table row; `\\|` is no cell's end."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [span for row in rows for span in code_spans(re.split(r"(?<!\\)\|", row)[1])]


def block(name: str, language: str, place: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", DOCS[name], re.DOTALL)[place]


def test_every_file_and_link_that_is_named_exists() -> None:
    named = {
        span.split(":")[0]
        for text in DOCS.values()
        for span in code_spans(text)
        if re.match(rf"({'|'.join((*ROOMS, 'tests', 'recipes', 'docs'))})/[\w/]+\.\w+", span)
    }
    assert sorted(path for path in named if not (ROOT / path).is_file()) == []
    links = {link for text in DOCS.values() for link in re.findall(r"\]\(([\w./]+)\)", text)}
    assert sorted(link for link in links if not (ROOT / "docs" / link).exists()) == []


def test_every_heading_that_a_link_leads_to_exists() -> None:
    """A section that is lost, or named anew, is missed by those who link to it."""
    pages = {
        path: path.read_text("utf-8")
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    }
    known = {page: {anchor(heading) for heading in headings(text)} for page, text in pages.items()}
    links = [
        (page, (page.parent / target).resolve() if target else page, place)
        for page, text in pages.items()
        for target, place in re.findall(r"\]\(([\w./]*)#([\w-]+)\)", text)
    ]
    assert links
    lost = [
        f"{page.name}: {target.name}#{place}"
        for page, target, place in links
        if place not in known.get(target, ())
    ]
    assert lost == []


def headings(text: str) -> list[str]:
    """Without what stands in blocks of code."""
    return re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)


def anchor(heading: str) -> str:
    """GitHub's: small letters and digits, dashes for spaces, all else left out."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_reward_term_is_in_the_guide_and_its_recipes_load() -> None:
    terms = DOCS["rewards.md"].split("\n\n| term |")[1].split("\n\n")[0]
    assert set(first_column(terms.replace("|---", ""))) == set(BUILT_IN)
    for place in range(3):
        reward = tomllib.loads(block("rewards.md", "toml", place))["reward"]
        for entry in RewardConfig.model_validate(reward).terms:
            if entry.name == "judge":  # made only where its key is
                JudgeSettings.model_validate(entry.args)
            else:
                load_term(entry.name, entry.args)


def test_every_name_in_the_index_of_papers_exists() -> None:
    index = [
        match.groups()
        for span in code_spans(DOCS["papers.md"])
        if (match := re.fullmatch(r"([\w/]+\.py):([\w.]+)", span))
    ]
    assert len(index) > 20
    assert [(file, name) for file, name in index if not defines(ROOT / file, name)] == []
    assert not defines(ROOT / "learner" / "policy_loss.py", "PolicyLoss.sum")


def defines(file: Path, name: str) -> bool:
    """Whether a file defines a function, class, method or constant of that dotted name."""
    body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in body if part in names_of(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return [getattr(node, "name", "")]


def test_the_columns_of_the_run_folder() -> None:
    text = DOCS["runs.md"].split("Columns of the rollouts")[1].split("\n\n")[1]
    assert first_column(text) == ROLLOUT_SCHEMA.names
    assert ", ".join(f"`{name}`" for name in METRIC_SCHEMA.names) in DOCS["runs.md"]


def test_the_core_alone_reads_files_and_judges_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meter.py").write_text(block("your_task.md", "python"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    task, source = load_task("meter:Meter"), tmp_path / "mine"
    source.mkdir()
    for shade in range(3):
        (source / f"{shade}.png").write_bytes(png(shade, 8))
    rows = [
        {"query": "What does it say?", "image": f"{shade}.png", "ground_truth": f"{shade + 1}.0"}
        for shade in range(3)
    ]
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert import_rows(source, task, tmp_path / "data")["splits"]["train"]["rows"] == 3
    problems = [example.problem for example in read_examples(tmp_path / "data", "train")]
    assert check_problems(task, problems) == []
    parsed = task.parse(
        "<perception>a dial</perception><reasoning></reasoning><answer>1.01</answer>"
    )
    assert [task.check(problem, parsed.answer) for problem in problems] == [True, False, False]
    rows[0]["ground_truth"] = " "
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match="line 1: ground_truth: "):
        import_rows(source, task, tmp_path / "bad")


@pytest.fixture
def dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example task of docs/your_task.md, as a reader would save it."""
    (tmp_path / "dots.py").write_text(block("your_task.md", "python", 1), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return load_task("dots:Dots")


def test_the_example_task_keeps_the_contract(dots: Any, tmp_path: Path) -> None:
    for index in range(20):
        problem = draw_problem(dots, dots.spec(most=6), "train", 5, index)
        assert split_of(problem) == "train"
        seen = dots.parse(dots.oracle_prefix(problem)).perception
        assert dots.score_perception(problem, seen) == (True, 1.0)
        for style in ("terse", "verbose"):
            response = dots.demonstrate(problem, style)
            parsed = dots.parse(response)
            assert response.startswith(dots.oracle_prefix(problem))
            assert parsed.defects == ()
            assert dots.check(problem, parsed.answer)
            assert dots.consistent(problem, parsed.perception, parsed.answer)
        assert dots.solve(problem, seen) == parsed.answer
        assert not dots.check(problem, parsed.answer + 1)
        again = dots.from_row(problem.prompt, problem.images[0], dots.to_ground_truth(problem))
        assert (again.id, again.truth, again.symmetry_key) == (
            problem.id,
            problem.truth,
            problem.symmetry_key,
        )
    for text in (
        "",
        "red:9",
        "<perception>red:٣ green:0 blue:0</perception>",
        "<answer>" + "9" * 9999,
    ):
        parsed = dots.parse(text)
        assert parsed.perception is None and parsed.answer is None and parsed.defects

    write_dataset(tmp_path / "data", {"train": 12, "test": 4}, dots, dots.spec(), 0, "terse")
    examples = list(read_examples(tmp_path / "data", "train"))
    assert len(examples) == 12 and all(e.response for e in examples)
    rows = [
        {
            "query": e.problem.prompt,
            "image": f"{e.problem.id}.png",
            "ground_truth": e.problem.perception,
        }
        for e in examples
    ]
    source = tmp_path / "mine"
    source.mkdir()
    for example in examples:
        (source / f"{example.problem.id}.png").write_bytes(example.problem.images[0])
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert import_rows(source, dots, tmp_path / "imported")["splits"]["train"]["rows"] == 12


def test_the_example_reward_and_recipes(dots: Any, tmp_path: Path) -> None:
    problem = draw_problem(dots, dots.spec(), "train", 0, 0)
    total = sum(problem.truth["counts"])
    texts = [f"{dots.oracle_prefix(problem)}<answer>{n}</answer>" for n in (total, total + 1, 999)]
    none = np.zeros(0, np.int32)
    rollouts = tuple(
        Rollout(
            rollout_id=str(i), group_id="g", kind="free", view="shown", prompt_ids=none,
            response_ids=none, images=(), logprobs=none, versions=none, segments=none, prefix="",
            text=text, parsed=dots.parse(text), finish_reason="stop", seconds=0.0, sampler="s",
        )
        for i, text in enumerate([*texts, "nothing"])
    )  # fmt: skip
    lines = len(block("your_task.md", "python", 1).splitlines())
    assert f", {lines} lines together" in (ROOT / "README.md").read_text("utf-8")
    term = load_term("dots:Close", {"scale": 4.0})
    assert list(term(dots, Group("g", problem, rollouts))) == [1.0, 0.75, 0.0, 0.0]

    recipe = tmp_path / "dots.toml"
    first, sft = block("your_task.md", "toml", 0), block("your_task.md", "toml", 1)
    recipe.write_text(first + sft, encoding="utf-8")
    loaded = load_recipe(recipe)
    assert loaded.tasks[0].name == "dots:Dots" and loaded.sft is not None
    assert [term.name for term in loaded.reward.effective_terms()][-1] == "dots:Close"
    model, stored = block("your_task.md", "toml", 3), block("your_task.md", "toml", 2)
    recipe.write_text(f'name = "x"\n{model}{stored}', encoding="utf-8")
    assert load_recipe(recipe).tasks[0].data == "data/mine"


FORMS = get_args(CallForm)


def test_the_environments_of_the_guide_and_of_the_example_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hints.py").write_text(block("environments.md", "python"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    rng = np.random.default_rng(0)
    hint = load_environment("hints:Hint", {"most": 1})
    asked = draw_problem(load_task("sudoku"), load_task("sudoku").spec(), "train", 0, 0)
    hint.reset(replace(asked, truth={"answer": "seven"}), rng)
    assert hint.step("<hint>") == Observation("It has 5 letters.", reward=-0.1)
    assert hint.step("<hint>") == DONE

    recipe = load_recipe(ROOT / "examples" / "maze" / "maze.toml")
    assert recipe.environment is not None
    (source,) = open_sources(recipe.tasks)
    assert len(held_out(source, recipe.eval.seed, recipe.eval.problems)) == recipe.eval.problems
    maze = load_task(recipe.environment.name)
    assert check_task(maze, maze.spec(side=3), 5) == []
    for index in range(5):
        problem = draw_problem(maze, maze.spec(side=3), "train", 5, index)
        walk, json_walk = (load_environment(recipe.environment.name, {}, form) for form in FORMS)
        told = [made.reset(problem, rng) for made in (walk, json_walk)]
        assert told[0] and told[1] and "<go>" in told[0].how and '"go"' in told[1].tools
        assert walk.step("<go>away</go>").defects == ("bad_move",)
        assert json_walk.step("<go>up</go>").defects == ("other_form",)
        (x, y), (to_x, to_y) = problem.truth["at"], problem.truth["out"]
        moves = ["right" if to_x > x else "left"] * abs(to_x - x)
        moves += ["down" if to_y > y else "up"] * abs(to_y - y)
        calls = [json_walk.written(f"I go <go>{move}</go>") for move in moves]  # type: ignore[attr-defined]
        same = [replace(json_walk.step(call), role="user") for call in calls]
        assert maze.parse("".join(calls)).answer == moves
        *on_the_way, last = [walk.step(f"I go <go>{move}</go>") for move in moves]
        assert same == [*on_the_way, last]
        assert all(len(one.images) == 1 and not one.done for one in on_the_way)
        assert (last.reward, last.done) == (1.0, True)
        text = " ".join(f"<go>{move}</go>" for move in moves)
        assert maze.check(problem, maze.parse(text).answer)
        assert not maze.check(problem, [])
