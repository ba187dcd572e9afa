"""Ablation files: what a cell's recipe becomes, and what is said of a file that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.ablation.grid import Ablation, changes, load_ablation
from cluster.recipe.recipe import RecipeError, load_recipe, resolved_toml
from tests.support.recipes import recipe_text

BASE = recipe_text(
    "reward = { alpha = 0.25, deadline_seconds = 9 }\nalgorithm.updates_per_step = 2"
)
FILE = """
question = "What is learnt?"
base = "recipes/base.toml"
seeds = [7, 3]
[budget]
kind = "updates"
amount = 12
[[arms]]
name = "base"
"""

SHIPPED = sorted((Path(__file__).resolve().parents[3] / "recipes" / "ablations").glob("*.toml"))

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes `FILE` and more beside its base recipe."""

    def made(more: str = "", file: str = FILE, base: str = BASE) -> Path:
        (tmp_path / "recipes").mkdir(exist_ok=True)
        (tmp_path / "recipes" / "base.toml").write_text(base)
        path = tmp_path / "which-reward.toml"
        path.write_text(file + more)
        return path

    return made


def arms(ablation: Ablation) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for cell in ablation.cells:
        found.setdefault(cell.arm, []).append(cell.id)
    return found


def test_cells_are_arms_by_difficulties_by_seeds_seed_by_seed(write: Write) -> None:
    more = """
[[arms]]
name = "slow"
set = { learner.learning_rate = 1e-6, "algorithm.group_size" = 4 }
[[difficulties]]
name = "easy"
[[difficulties]]
name = "noisy"
set = { "tasks[0].knobs.noise" = 90 }
"""
    ablation = load_ablation(write(more))
    assert ablation.name == "which-reward"
    ids = [cell.id for cell in ablation.cells]
    assert ids[:4] == [
        "base--easy--seed-7",
        "slow--easy--seed-7",
        "base--noisy--seed-7",
        "slow--noisy--seed-7",
    ]
    assert len(set(ids)) == 8 and [cell.seed for cell in ablation.cells] == [7] * 4 + [3] * 4
    for cell in ablation.cells:
        recipe = cell.recipe
        assert (recipe.name, recipe.seed, recipe.question) == (
            cell.id,
            cell.seed,
            "What is learnt?",
        )
        assert recipe.algorithm.steps * recipe.algorithm.updates_per_step == 12
        assert recipe.tasks[0].knobs["noise"] == (90 if cell.difficulty == "noisy" else 0)
        slow = cell.arm == "slow"
        assert (recipe.learner.learning_rate == 1e-6) == (recipe.algorithm.group_size == 4) == slow


@pytest.mark.parametrize("kind", ["tokens", "seconds"])
def test_a_budget_of_tokens_or_seconds_is_the_runs_own(
    kind: str, write: Write, tmp_path: Path
) -> None:
    path = write()
    path.write_text(path.read_text().replace('"updates"', f'"{kind}"'))
    for cell in load_ablation(path).cells:
        algorithm = cell.recipe.algorithm
        assert algorithm.budget is not None
        assert (algorithm.budget.kind, algorithm.budget.amount) == (kind, 12)
        # One token a rollout, or 10 ms a step: the budget is spent long before.
        each = algorithm.problems_per_step * algorithm.group_size if kind == "tokens" else 0.01
        assert algorithm.steps * each >= 12
        (tmp_path / "cell.toml").write_text(resolved_toml(cell.recipe))
        assert load_recipe(tmp_path / "cell.toml") == cell.recipe
    own = FILE + '[[arms]]\nname = "b"\nset.algorithm.budget = { kind = "tokens", amount = 9 }'
    path.write_text(own)
    with pytest.raises(RecipeError, match=r"set: algorithm\.budget.*\[budget\] decides"):
        load_ablation(path)


def test_a_cells_recipe_is_a_recipe_file(write: Write, tmp_path: Path) -> None:
    for cell in load_ablation(write()).cells:
        (tmp_path / "cell.toml").write_text(resolved_toml(cell.recipe))
        assert load_recipe(tmp_path / "cell.toml") == cell.recipe


def test_an_arms_reward_replaces_the_section_and_set_changes_a_field(write: Write) -> None:
    more = """
[[arms]]
name = "terms"
[[arms.reward.terms]]
name = "outcome"
[[arms.reward.terms]]
name = "perception_graded"
weight = 0.5
[[arms]]
name = "alpha"
set.reward.alpha = 0.75
"""
    reward = {cell.arm: cell.recipe.reward for cell in load_ablation(write(more)).cells}
    assert (reward["base"].alpha, reward["base"].deadline_seconds) == (0.25, 9)
    assert (reward["alpha"].alpha, reward["alpha"].deadline_seconds) == (0.75, 9)
    assert (reward["terms"].alpha, reward["terms"].deadline_seconds) == (None, 60)
    assert [(t.name, t.weight) for t in reward["terms"].terms] == [
        ("outcome", 1.0),
        ("perception_graded", 0.5),
    ]


def test_what_every_cell_sets_comes_before_what_an_arm_sets(write: Write) -> None:
    path = write('[[arms]]\nname = "b"\nset.learner.threads = 3')
    path.write_text("set = { learner.threads = 2, sampler.cpus = 0.5 }\n" + path.read_text())
    ablation = load_ablation(path)
    threads = {cell.arm: cell.recipe.learner.threads for cell in ablation.cells}
    assert threads == {"base": 2, "b": 3}
    assert {cell.recipe.sampler.cpus for cell in ablation.cells} == {0.5}
    assert ablation.base.learner.threads == 2


WRONG = {
    "set: learner.lerning_rate: no such key": "set.learner.lerning_rate = 1\n" + FILE,
    "set: seed: the ablation's seeds decide it": "set.seed = 1\n" + FILE,
    'budget.kind: expected "updates", "tokens" or "seconds"': FILE.replace('"updates"', '"hours"'),
    "seeds[1]: 7 is already seeds[0]": FILE.replace("[7, 3]", "[7, 7]"),
    "seeds: needs at least 1": FILE.replace("[7, 3]", "[]"),
    'arms[1]: "base" is already arms[0]': FILE + '[[arms]]\nname = "base"',
    'questions: no such key; did you mean "question"?': FILE.replace("question", "questions", 1),
    "arms[0].name: got": FILE.replace('name = "base"', 'name = "a/b"'),
    "not valid TOML": FILE + "[[",
    "base: ": FILE.replace("recipes/base", "recipes/bsae"),
    "arms[1] (b): reward.alpha: must be at most 1, got 2": FILE
    + '[[arms]]\nname = "b"\nset.reward.alpha = 2',
    'arms[1] (b): reward.terms[0].name: no reward term "percption"; did you mean': FILE
    + '[[arms]]\nname = "b"\nreward = { terms = [{ name = "percption" }] }',
    'arms[1] (b): learner.lerning_rate: no such key; did you mean "learning_rate"?': FILE
    + '[[arms]]\nname = "b"\nset.learner.lerning_rate = 1',
    "difficulties[0] (d): tasks[4].knobs.noise=1: tasks is a list with 1 entries": FILE
    + '[[difficulties]]\nname = "d"\nset = { "tasks[4].knobs.noise" = 1 }',
    "arms[1] (b).set: algorithm.steps: [budget] decides how long a run is; remove it": FILE
    + '[[arms]]\nname = "b"\nset.algorithm.steps = 9',
    "arms[1] (b).set: seed: the ablation's seeds decide it": FILE
    + '[[arms]]\nname = "b"\nset.seed = 9',
    "arms[1] (b): tasks differs from that of arms[0] (base), so the arms would not be paired": FILE
    + '[[arms]]\nname = "b"\nset = { "tasks[0].knobs.noise" = 9 }',
    "arms[1] (b): model differs": FILE + '[[arms]]\nname = "b"\nset.model.path = "other"',
    "arms[1] (b): algorithm.problems_per_step differs": FILE
    + '[[arms]]\nname = "b"\nset.algorithm.problems_per_step = 32',
    "budget.amount: 12 updates cannot be made in whole steps of arms[1] (b), whose": FILE
    + '[[arms]]\nname = "b"\nset.algorithm.updates_per_step = 5',
    "arms[0] (base) with difficulties[0] (d): sampler.max_tokens: got 900": FILE
    + "set.model.max_model_len = 800\n"
    + '[[difficulties]]\nname = "d"\nset.sampler.max_tokens = 900',
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_is_said_with_file_and_place(write: Write, said: str) -> None:
    path = write(file=WRONG[said])
    with pytest.raises(RecipeError) as refused:
        load_ablation(path)
    lines = str(refused.value).splitlines()
    assert any(f"{path}: {said}" in line for line in lines)
    assert all(line.startswith(f"{path}: ") and "--set" not in line for line in lines)


def test_all_faults_are_said_at_once(write: Write) -> None:
    more = """
[[arms]]
name = "b"
set = { reward.alpha = 2, learner.ranks = 0 }
[[difficulties]]
name = "d"
set.eval.problems = 0
"""
    with pytest.raises(RecipeError) as refused:
        load_ablation(write(more))
    assert len(str(refused.value).splitlines()) == 3


def test_a_base_that_is_wrong_is_named_as_such(write: Write) -> None:
    path = write(base=BASE.replace('model.path = "m"', "model = {}"))
    with pytest.raises(RecipeError, match=r"which-reward\.toml: base: .*base\.toml: model\.path"):
        load_ablation(path)


def test_the_identity_is_what_decides_results(write: Write) -> None:
    def identity(*replaced: str) -> dict[str, object]:
        text = FILE.replace(*replaced) if replaced else FILE  # type: ignore[call-arg]
        found: dict[str, object] = json.loads(
            json.dumps(load_ablation(write(file=text)).identity())
        )
        return found

    same = identity()
    assert changes(same, identity("seeds", "parallel = 3\nseeds")) == []
    assert changes(same, identity("amount", "expected_minutes = 3\namount")) == []
    assert changes(same, identity("12", "14")) == ["budget.amount: 12 -> 14"]
    assert changes(same, identity("[7, 3]", "[7]")) == ["seeds[1]: 3 -> gone"]
    (base,) = changes(
        same, json.loads(json.dumps(load_ablation(write(base=BASE.replace("9", "8"))).identity()))
    )
    assert base == "base.reward.deadline_seconds: 9.0 -> 8.0"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_ablation_loads_and_opens_with_its_question(path: Path) -> None:
    ablation = load_ablation(path)
    text = path.read_text()
    assert text.startswith("# ") and "Budget on two cores" in text
    assert ablation.config.budget.expected_minutes
    assert len(ablation.config.seeds) >= 3 and len(ablation.config.arms) >= 2
