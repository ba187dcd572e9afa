"""What each pass of an evaluation asks of a policy, and which passes a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from cluster.recipe.problems import ProblemSource, held_out
from cluster.recipe.recipe import Recipe
from cluster.recipe.sections import TOOL_PASSES, EvalPass
from rollout.record import ImageView, Kind, SampleRequest, Sampling
from rollout.settings import EnvironmentConfig
from tasks.core import Problem, Task, labelled
from tasks.environments import LooksElsewhere, load_environment
from tasks.returns import Returns, Shows


class Asks(NamedTuple):
    """What a pass asks.

    Attributes:
        tool: with the recipe's environment, if it has one.
        returns: what is shown in place of the pictures that this returns.
    """

    kind: Kind
    view: ImageView
    tool: bool = False
    returns: Shows | None = None


ASKS: Mapping[EvalPass, Asks] = {
    "greedy": Asks("free", "shown", tool=True),
    "sampled": Asks("free", "shown", tool=True),
    "oracle": Asks("oracle", "shown"),
    "oracle_blank": Asks("oracle", "blank"),
    "blind": Asks("blind", "none"),
    "greedy_alone": Asks("free", "shown"),
    "oracle_tool": Asks("oracle", "shown", tool=True),
    "returns_blank": Asks("free", "shown", True, "blank"),
    "returns_other": Asks("free", "shown", True, "other"),
    "returns_elsewhere": Asks("free", "shown", True, "elsewhere"),
}
PASSES = tuple(name for name in ASKS if name not in TOOL_PASSES)
"""Of any policy."""


def passes_of(recipe: Recipe) -> tuple[EvalPass, ...]:
    """Those of its own evaluation: unless it says which, what its environment is worth too."""
    if recipe.eval.passes or recipe.environment is None:
        return recipe.eval.pass_names
    return (*recipe.eval.pass_names, "greedy_alone")


def every_pass(environment: EnvironmentConfig | None) -> tuple[EvalPass, ...]:
    """All that can be asked of a policy that has this environment."""
    return (*PASSES, *(tool_passes(environment) if environment else ()))


def tool_passes(environment: EnvironmentConfig) -> tuple[EvalPass, ...]:
    """What can be asked about it: a wrong place only where its calls point at one."""
    loaded = load_environment(environment.name, environment.args, environment.calls)
    without = () if isinstance(loaded, LooksElsewhere) else ("returns_elsewhere",)
    return tuple(name for name in TOOL_PASSES if name not in without)


def asked_of(recipe: Recipe, source: ProblemSource) -> list[tuple[EvalPass, SampleRequest]]:
    """All that an evaluation asks of a source, those of one problem together.

    What forces `p*` is asked of problems with a label, and `returns_other` of those to which there
    is another.
    """
    problems, passes = held_out(source, recipe.eval.seed, recipe.eval.problems), passes_of(recipe)
    others = _others(problems) if "returns_other" in passes else [None] * len(problems)
    return [
        (name, pass_request(recipe, source, name, problem, other))
        for problem, other in zip(problems, others, strict=True)
        for name in passes
        if (ASKS[name].kind != "oracle" or labelled(source.task, problem))
        and (ASKS[name].returns != "other" or other is not None)
    ]


def pass_request(
    recipe: Recipe,
    source: ProblemSource,
    name: EvalPass,
    problem: Problem,
    other: Problem | None = None,
) -> SampleRequest:
    """What a pass asks about a problem; only `sampled` draws, all else is greedy.

    What is drawn hangs on the id, which names the entry from the second one of its task on.
    `other`: whose pictures are returned where those of another problem are.
    """
    asks = ASKS[name]
    sampling = eval_sampling(recipe)
    if recipe.sft and recipe.sft.part == "perception" and asks.kind == "free":
        # What would come after it was never learnt.
        sampling = replace(sampling, until="</perception>")
    entry = source.label.removeprefix(source.task.name)
    other_problem = other if asks.returns == "other" else None
    return SampleRequest(
        group_id=f"eval/{name}/{problem.id}{entry}",
        problem=problem,
        n=recipe.eval.samples if name == "sampled" else 1,
        sampling=sampling if name == "sampled" else greedy(sampling),
        kind=asks.kind,
        view=asks.view,
        # An engine itself forces `p*` only where a response is one turn.
        prefix=_true(source.task, problem) if name == "oracle_tool" else "",
        environment=recipe.environment if asks.tool else None,
        returns=Returns(asks.returns, other_problem) if asks.returns else None,
    )


def greedy(sampling: Sampling) -> Sampling:
    """The likeliest tokens, ended alike."""
    return Sampling(0.0, max_tokens=sampling.max_tokens, until=sampling.until)


def _others(problems: Sequence[Problem]) -> list[Problem | None]:
    """To each problem the next one that shows as many pictures, and others than it."""
    others = []
    for index, problem in enumerate(problems):
        turned = (*problems[index + 1 :], *problems[:index])
        count, images = len(problem.images), problem.images
        like = (o for o in turned if len(o.images) == count and o.images != images)
        others.append(next(like, None))
    return others


def _true(task: Task, problem: Problem) -> str:
    return task.oracle_prefix(problem) if labelled(task, problem) else ""


def training_sampling(recipe: Recipe) -> Sampling:
    """How a recipe draws tokens."""
    sampler = recipe.sampler
    return Sampling(temperature=sampler.temperature, max_tokens=sampler.max_tokens)


def eval_sampling(recipe: Recipe) -> Sampling:
    """How its evaluations do: as in training, but for what [eval.sampling] says."""
    return replace(training_sampling(recipe), **recipe.eval.sampling.model_dump(exclude_none=True))
