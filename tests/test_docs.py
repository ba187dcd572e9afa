"""The documents in docs/ against the code: files, names, metrics, columns and the example."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.recipe.problems import left_out
from cluster.recipe.recipe import load_recipe
from cluster.record.metrics import EvalPass, eval_table, step_metrics
from cluster.record.tracking import METRIC_SCHEMA, ROLLOUT_SCHEMA
from rewards.compose import Composition, compose_groups
from rewards.judge import JudgeSettings
from rewards.settings import RewardConfig
from rewards.terms import BUILT_IN, Outcome, load_term
from rollout.dispatch import Dispatch, Job, PoolLimits
from rollout.record import Group, Rollout
from tasks.core import SEGMENTS
from tasks.dataset_import import import_rows
from tasks.dataset_write import write_dataset
from tasks.datasets import read_examples
from tasks.load import load_task
from tasks.splits import draw_problem, split_of
from tests.support.pretend import request
from tests.support.toys import TASK, Misbehaves, group, score

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


def made_by_scoring() -> set[str]:
    """Names of a step's metrics and of an evaluation with every pass, on hand-made groups."""
    groups = [group(1, "1;2;", "1;3;", "2;4;x"), group(2, "2;4;", "3;6;"), group(0, "0;0;")]
    composition = Composition({"outcome": 1.0, "nan": 0.0}, on_failure={"nan": "drop_group"})
    scored = compose_groups(
        groups, [score(g, Outcome(), Misbehaves("nan")) for g in groups], composition
    )
    passes: dict[EvalPass, list[Group]] = {
        "greedy": [group(1, "1;2;x")],
        "sampled": [group(1, "1;2;", "1;3;")],
        "oracle": [group(1, "1;2;")],
        "oracle_blank": [group(1, "1;2;")],
        "blind": [group(1, ";3;")],
    }
    rows = eval_table(TASK, passes).rows
    return set(step_metrics(scored, 7)) | {f"eval/{TASK.name}/{row.metric}" for row in rows}


def made_by_the_learner() -> set[str]:
    """Names of an update's metrics under every loss, on one hand-made micro-batch."""
    import torch

    from learner.batch import Tokens, TrainBatch
    from learner.correction import Correction
    from learner.engine import DeepSpeedLearner, _summary
    from learner.losses import BalancedLoss, TokenMeanLoss, token_statistics
    from learner.policy_loss import Papo, PolicyLoss

    values = torch.linspace(-2, -1, 4)
    one = torch.zeros(4, dtype=torch.long)
    tokens = Tokens(torch.arange(4), torch.tensor([0, 1, 2, -1]), values, torch.ones(4), one)
    every_term = PolicyLoss(
        entropy_weight=1, kl_weight=1, entropy_weights=dict.fromkeys(SEGMENTS, 1.0),
        papo=Papo(1, 1), correction=Correction("icepop", 5.0, 0.5),
    )  # fmt: skip
    names = set()
    by_update = set(
        re.findall(r'metrics\["(\w+)"\] = ', inspect.getsource(DeepSpeedLearner.update))
    )
    for loss, prefix in (
        (every_term, "learner"),
        (BalancedLoss(), "sft"),
        (TokenMeanLoss(), "sft"),
    ):
        found = {f"sum/loss/{name}": 0.0 for name in loss.denominators(TrainBatch(()))}
        found |= token_statistics(values, -values, tokens, loss)
        found |= {"sum/padded": 8.0, "sum/kept": 4.0, "sum/shared": 2.0}
        names |= {f"{prefix}/{name}" for name in {*_summary(found), *by_update}}
    return names


def made_by_the_drivers() -> set[str]:
    """Names of clock and transfer, and those that the drivers write out as text."""
    from cluster.recipe.recipe import Recipe
    from cluster.run.budget import Spent
    from cluster.run.refill import Refilled
    from cluster.run.sft import balance_metrics
    from cluster.run.stream import GroupStream
    from cluster.run.train import StepClock, sampler_metrics, transfer_metrics
    from learner.balance import SegmentGradients
    from rollout.transfer import TransferReport
    from tests.support.simulated_pool import SimulatedPool

    clock = StepClock({})
    for phase in re.findall(r'clock\.lap\("(\w+)"\)', (ROOT / "cluster/run/train.py").read_text()):
        clock.lap(phase)
    names = set(clock.metrics([], [], [], {})) | set(transfer_metrics(TransferReport(1.0, 1, 1, 1)))
    names |= {"curriculum/sudoku/share", "curriculum/sudoku/success"}
    narrow: Any = SimpleNamespace(label="sudoku", left_out={"train": 1})
    names |= set(left_out([narrow]))
    names |= set(Spent().metrics()) | set(Refilled([], missing=0).metrics())
    pool = Dispatch(["sampler-0"], PoolLimits(), 0.0)
    pool.add([Job(request("g"), submitted=True)], 0.0)
    pool.started("sampler-0", 0, 50, 0.0)
    pool.lost("sampler-0", 0, "actor", "gone", 1.0)
    counted: Any = SimpleNamespace(counts=lambda: pool.counts(2.0))
    run: Any = SimpleNamespace(samplers=counted, frozen={"m": counted})
    names |= set(sampler_metrics(run))
    plain = {"name": "x", "model": {"path": "m"}, "tasks": [{"name": "sudoku"}]}
    names |= set(GroupStream(Recipe.model_validate(plain), [], SimulatedPool(1, [1.0])).metrics())
    counts = dict.fromkeys(("perception", "reasoning", "answer", "other"), 4.0)
    updated = {f"tokens/{name}": n for name, n in counts.items()}
    names |= set(balance_metrics(updated, 0.5, SegmentGradients(1.0, 1.0, 0.0)))
    names.add("throughput/learner_tokens_per_second")
    names |= {"reward/judge/calls/requests", "reward/judge/calls/failures/timeout"}
    for file in ("cluster/run/train.py", "cluster/run/sft.py", "learner/warmup.py"):
        for name in re.findall(
            r'"((?:policy|sft|warmup|learner|reward)/[\w{}/]*\w)"', (ROOT / file).read_text()
        ):
            names.add(re.sub(r"{\w+}", "sudoku", name))
    return names


def test_every_metric_is_documented_and_no_other() -> None:
    made = made_by_scoring() | made_by_the_learner() | made_by_the_drivers()
    documented = [name for name in first_column(DOCS["metrics.md"]) if "/" in name]
    patterns = {
        name: re.compile(re.sub(r"<\w+>", r"[^/]+", re.escape(name).replace(r"\<", "<")))
        for name in documented
    }
    assert len(made) > 80
    assert {n for n in made if not any(p.fullmatch(n) for p in patterns.values())} == set()
    assert {d for d, p in patterns.items() if not any(p.fullmatch(n) for n in made)} == set()


@pytest.fixture
def dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example task of docs/your_task.md, as a reader would save it."""
    (tmp_path / "dots.py").write_text(block("your_task.md", "python"), encoding="utf-8")
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
        again = dots.from_row(problem.prompt, problem.image, dots.to_ground_truth(problem))
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
        (source / f"{example.problem.id}.png").write_bytes(example.problem.image)
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
            response_ids=none, logprobs=none, versions=none, segments=none, prefix="", text=text,
            parsed=dots.parse(text), finish_reason="stop", seconds=0.0, sampler="s",
        )
        for i, text in enumerate([*texts, "nothing"])
    )  # fmt: skip
    lines = len(block("your_task.md", "python").splitlines())
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
