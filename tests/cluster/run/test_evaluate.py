"""An evaluation asks for all it needs at once, of problems that are drawn once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from pydantic import BaseModel

from cluster.recipe.problems import open_sources
from cluster.recipe.recipe import Recipe, RecipeError
from cluster.run.evaluate import evaluate_all
from cluster.run.passes import ASKS, PASSES, every_pass, pass_request, passes_of, training_sampling
from rollout.record import Group, SampleRequest, Sampling, Turn
from rollout.settings import EnvironmentConfig
from tasks.core import Problem
from tasks.load import load_task
from tests.support.recipes import TOY, made_recipe
from tests.support.surrogate_groups import answered, reason, rollout_of
from tests.support.toys import Doubling, group, problem


def test_an_evaluation_draws_as_training_does_or_as_it_is_told() -> None:
    how = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_tokens": 40}
    told = ", ".join(f"{name} = {value}" for name, value in how.items())
    trained = ("sampler.temperature=0.8", "sampler.max_tokens=64")
    for more, sampled in (
        ("seed=1", Sampling(0.8, max_tokens=64)),
        (f"eval.sampling={{ {told} }}", Sampling(**how)),  # type: ignore[arg-type]
    ):
        recipe = made_recipe(*trained, more, tasks=TOY)
        (source,) = open_sources(recipe.tasks)
        problem = source.problem("test", 0, 0)
        asked = {name: pass_request(recipe, source, name, problem).sampling for name in PASSES}
        greedy = Sampling(0.0, max_tokens=sampled.max_tokens)
        assert asked == dict.fromkeys(PASSES, greedy) | {"sampled": sampled}
        assert training_sampling(recipe) == Sampling(0.8, max_tokens=64)


def test_where_only_perception_is_learnt_a_free_response_ends_with_it() -> None:
    recipe = made_recipe("sft.steps=1", 'sft.part="perception"', tasks=TOY)
    (source,) = open_sources(recipe.tasks)
    problem = source.problem("test", 0, 0)
    ends = {name: pass_request(recipe, source, name, problem).sampling.until for name in PASSES}
    assert ends == {name: "</perception>" if ASKS[name].kind == "free" else "" for name in PASSES}


class Samplers:
    """Right answers where the image is shown, and nothing that can be read where it is not."""

    def __init__(self) -> None:
        self.calls: list[list[SampleRequest]] = []

    def sample(self, requests: Sequence[SampleRequest]) -> list[Group]:
        self.calls.append(list(requests))
        answers = []
        for asked in requests:
            n = asked.problem.truth["n"]
            text = f"{n};{2 * n};" if asked.view == "shown" else ";;missing_answer"
            answers.append(group(n, *[text] * asked.n, name=asked.problem.id))
        return answers


@pytest.fixture
def recipe() -> Recipe:
    passes = 'passes=["greedy", "sampled", "oracle", "oracle_blank", "blind"]'
    return made_recipe(f"eval={{problems=2, samples=3, {passes}}}", tasks=f"{TOY}, {TOY}")


def test_all_passes_of_all_entries_are_asked_for_at_once(recipe: Recipe) -> None:
    samplers = Samplers()
    tables = evaluate_all(samplers, open_sources(recipe.tasks), recipe)  # type: ignore[arg-type]
    (asked,) = samplers.calls
    # Two entries of one task hold the same two problems, and each is asked in every pass.
    assert len(asked) == len({r.group_id for r in asked}) == 2 * 2 * len(PASSES)
    # A problem's passes are asked for together: an engine then has its image at hand.
    places = [
        [i for i, r in enumerate(asked) if r.problem is p]
        for p in {r.problem.id: r.problem for r in asked[:10]}.values()
    ]
    assert places == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert {(r.n, r.sampling.temperature) for r in asked} == {(1, 0.0), (3, 1.0)}
    for table in tables.values():
        values = {row.metric: (row.value, row.n) for row in table.rows}
        assert values == {
            **{name: (1.0, 2) for name in ("a", "a_p", "a_p_graded", "self_consistency")},
            **{name: (1.0, 2) for name in ("a avg@3", "a_p avg@3", "a pass@2", "a_p pass@2")},
            **{name: (1.0, 2) for name in ("a pass@3", "a_p pass@3", "a maj@3", "a_r")},
            **{name: (0.0, 2) for name in ("leak", "a_r_blank", "blind")},
        }


class BlindReader:
    """Reasons without a flaw from the perception that is forced, and has nothing else to go by."""

    def __init__(self) -> None:
        self.asked: list[SampleRequest] = []

    def answer(self, requests: Sequence[SampleRequest], seconds: float) -> list[Group]:
        self.asked += requests
        return answered(requests, reason)


class Careless(Samplers):
    """Sees every puzzle right, and solves the first two."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[Group]:
        task, made = load_task("sudoku"), []
        for place, asked in enumerate(requests):
            text = task.demonstrate(asked.problem, "terse")  # type: ignore[attr-defined]
            said = text if place < 4 else text.partition("<answer>")[0]
            rollout = rollout_of(task, "" if asked.kind == "blind" else said)
            made.append(Group(asked.group_id, asked.problem, (rollout,)))
        return made


def test_a_reader_is_asked_of_what_the_greedy_pass_saw() -> None:
    chosen = 'eval={problems=3, passes=["greedy", "blind"], reader="r", reader_place="prefix"}'
    recipe, reader = made_recipe(chosen), BlindReader()
    sources = open_sources(recipe.tasks)
    (table,) = evaluate_all(Careless(), sources, recipe, {"r": reader}).values()  # type: ignore[arg-type, dict-item]
    values = {row.metric: (row.value, row.n) for row in table.rows}
    assert values["sufficiency"] == values["reader_ceiling"] == (1.0, 3)
    assert values["used"] == values["a"] == (pytest.approx(2 / 3), 3)
    assert values["reader_blind"] == (0.0, 3)
    # With nothing and with p*, which is what the policy saw; of other passes nobody is asked.
    assert [bool(request.prefix) for request in reader.asked] == [False, True] * 3
    assert {request.sampling.temperature for request in reader.asked} == {0.0}


def test_a_reader_needs_the_greedy_pass() -> None:
    with pytest.raises(RecipeError, match=r'eval\.reader: .*"greedy"'):
        made_recipe('eval={passes=["sampled"], reader="r"}')


class JsonSamplers(Samplers):
    """A policy trained on the public style: JSON, also behind what it is forced to begin with."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[Group]:
        self.calls.append(list(requests))
        task, made = load_task("sudoku"), []
        for asked in requests:
            puzzle, solved = (json.dumps(asked.problem.truth[k]) for k in ("puzzle", "solution"))
            prefix = asked.prefix or (
                task.oracle_prefix(asked.problem) if asked.kind == "oracle" else ""
            )
            text = f"so\n{solved}" if prefix else f"{puzzle}\n\nso\n{solved}"
            (plain,) = group(0, ";;").rollouts
            said = replace(plain, text=text, prefix=prefix, parsed=task.parse(prefix + text))
            made.append(Group(asked.group_id, asked.problem, (said,) * asked.n))
        return made


def test_a_policy_that_answers_in_json_is_forced_to_begin_in_json() -> None:
    recipe, samplers = made_recipe("eval.problems=3"), JsonSamplers()
    (table,) = evaluate_all(samplers, open_sources(recipe.tasks), recipe).values()  # type: ignore[arg-type]
    values = {row.metric: row.value for row in table.rows}
    assert values["a"] == values["a_r"] == 1.0
    assert len(samplers.calls) == 2
    assert all(r.kind == "oracle" and r.prefix.endswith("]]\n\n") for r in samplers.calls[1])


def test_held_out_problems_are_drawn_once_a_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0
    generate = Doubling.generate

    def counted(self: Doubling, rng: np.random.Generator, spec: BaseModel) -> Problem:
        nonlocal drawn
        drawn += 1
        return generate(self, rng, spec)

    monkeypatch.setattr(Doubling, "generate", counted)
    samplers, sources = Samplers(), open_sources(recipe.tasks)
    evaluate_all(samplers, sources, recipe)  # type: ignore[arg-type]
    assert (once := drawn) > 0
    evaluate_all(samplers, sources, recipe)  # type: ignore[arg-type]
    assert drawn == once
    first, second = ([r.problem.id for r in call] for call in samplers.calls)
    assert first == second


class WithTool(Samplers):
    """Sees right after a true look, or a wrong one for even numbers; a look also misleads 7.

    Without the tool it is right from 6 on, and the mere offer costs it 9.
    """

    def sample(self, requests: Sequence[SampleRequest]) -> list[Group]:
        self.calls.append(list(requests))
        made = []
        for asked in requests:
            n, shown = asked.problem.truth["n"], asked.returns.kind if asked.returns else "true"
            calls, right = n < 8, n >= 6
            if asked.environment and calls:
                right = n != 7 and (shown == "true" or (shown == "elsewhere" and n % 2 == 0))
            elif asked.environment:
                right = n != 9
            found = group(n, f"{n if right else n + 1};{2 * n if right else 1};")
            turn = Turn("<look>", calls, images=int(calls))
            turns = (turn,) if asked.environment else ()
            (plain,) = found.rollouts
            made.append(
                Group(asked.group_id, asked.problem, (replace(plain, turns=turns),) * asked.n)
            )
        return made


ZOOM = 'environment={name="zoom", args={smallest=20}}'


def test_the_passes_of_a_tool_and_what_they_tell() -> None:
    passes = ", ".join(f'"{name}"' for name in every_pass(made_recipe(ZOOM).environment))
    recipe = made_recipe(ZOOM, f"eval={{problems=10, passes=[{passes}]}}", tasks=TOY)
    samplers, sources = WithTool(), open_sources(recipe.tasks)
    sources[0].drawn[recipe.eval.seed, 10] = [problem(n) for n in range(10)]
    (table,) = evaluate_all(samplers, sources, recipe).values()  # type: ignore[arg-type]
    (asked,) = samplers.calls
    by_pass = {name: [r for r in asked if f"/{name}/" in r.group_id] for name in ASKS}
    assert {name: len(of) for name, of in by_pass.items()} == dict.fromkeys(ASKS, 10)
    plain = {"oracle", "oracle_blank", "blind", "greedy_alone"}
    for name, of in by_pass.items():
        own = None if name in plain else recipe.environment
        assert [r.environment for r in of] == [own] * 10
        kind = name.removeprefix("returns_")
        assert {r.returns.kind for r in of if r.returns} == ({kind} if kind != name else set())
    # The pictures of another problem, and where `p*` is forced on an episode it is given.
    for request in by_pass["returns_other"]:
        assert request.returns and request.returns.other
        assert request.returns.other.images != request.problem.images
    assert all(r.prefix == r.problem.perception for r in by_pass["oracle_tool"])
    values = {row.metric: row.value for row in table.rows}
    expected = {
        "called": 0.8, "looked": 0.8, "a": 0.8, "a_alone": 0.4, "a_p": 0.8, "a_p_alone": 0.4,
        "a_call_gain": 0.6, "a_prompt_gain": 0.0, "a_call_harm": 0.1, "a_prompt_harm": 0.1,
        "a_r": 0.4, "a_r_tool": 0.8, "a_r_called": 0.8,
        "a_returns_blank": 0.1, "a_p_returns_other": 0.1, "a_returns_elsewhere": 0.5,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    # A run with an environment has the four terms at each of its evaluations, unless told.
    assert passes_of(made_recipe(ZOOM)) == ("greedy", "oracle", "greedy_alone")
    assert passes_of(made_recipe(ZOOM, 'eval.passes=["greedy"]')) == ("greedy",)


def test_a_wrong_place_is_asked_for_where_calls_point_at_one() -> None:
    game = EnvironmentConfig(name="tests.support.bad_environments:Counting")
    assert every_pass(None) == PASSES
    assert set(ASKS) - set(every_pass(game)) == {"returns_elsewhere"}
    with pytest.raises(RecipeError, match=r'eval\.passes: got "returns_blank", which .*leave it'):
        made_recipe('eval.passes=["greedy", "returns_blank"]')


def test_an_only_problem_has_no_other_to_show() -> None:
    recipe = made_recipe(ZOOM, 'eval={problems=1, passes=["greedy", "returns_other"]}', tasks=TOY)
    samplers = WithTool()
    (table,) = evaluate_all(samplers, open_sources(recipe.tasks), recipe).values()  # type: ignore[arg-type]
    assert len(samplers.calls[0]) == 1 and "a_returns_other" not in table.per_problem
