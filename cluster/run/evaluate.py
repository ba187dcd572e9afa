"""Evaluation: what a policy gets right, what it sees, and what it thinks given perfect sight.

Each pass is a rollout kind on the same engines: `greedy` and `sampled` answer freely, `oracle`
is forced to start from `p*`, `oracle_blank` the same with the image blanked, `blind` has no
image at all. `greedy` and `sampled` have the recipe's environment, if it has one; what it is worth
is told by `greedy_alone`, which has none, `oracle_tool`, which has it beside `p*`, and by returning
other pictures than it returns. Every number comes with its n and a 95% interval.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from cluster.recipe.problems import ProblemSource, held_out
from cluster.recipe.recipe import Recipe, RunFailed
from cluster.recipe.sections import EvalConfig, EvalPass, EvalSampling
from cluster.record.evaluation import EvalTable, eval_table, with_language, with_readings
from cluster.run.engines import sampling_from
from cluster.run.passes import asked_of, every_pass, passes_of
from cluster.run.standstill import unread_tables
from rewards.language import OwnText
from rewards.reader import Reader, readings
from rewards.scored import Answerer
from rewards.settings import Place
from rollout.pool import SamplerPool
from rollout.record import Group, ReplyError, SampleRequest
from rollout.settings import ModelConfig, SamplerConfig
from rollout.tokens import Chat, load_processor
from tasks.core import labelled
from tasks.files import put_text
from tasks.response_form import form_of, oracle_prefix_in
from tasks.settings import TaskConfig

Found = dict[str, dict[EvalPass, list[Group]]]
"""Entry's label -> pass -> a group a problem."""


def evaluate_all(
    samplers: SamplerPool,
    sources: Sequence[ProblemSource],
    recipe: Recipe,
    frozen: Mapping[str, Answerer] | None = None,
    keep: Callable[[Found], object] | None = None,
) -> dict[str, EvalTable]:
    """The recipe's own evaluation: a table a task, on its held-out problems.

    All passes of all tasks are asked for at once, so that no engine waits for another pass's last
    response; those of one problem together, whose image an engine then has at hand. What starts
    from `p*` is asked again where the free responses show that the policy writes a perception in
    another form than the task's own. `frozen`: engines by checkpoint, that of `eval.reader` among
    them where the recipe has one. `keep` is given all responses.
    """
    asked = [
        (source, name, request) for source in sources for name, request in asked_of(recipe, source)
    ]
    groups = samplers.sample([request for *_, request in asked])
    again = _in_the_policys_form([(source, request) for source, _, request in asked], groups)
    for index, group in zip(
        again, samplers.sample([*again.values()]) if again else (), strict=True
    ):
        groups[index] = group
    groups_of: Found = {
        source.label: {name: [] for name in passes_of(recipe)} for source in sources
    }
    for (source, name, _), group in zip(asked, groups, strict=True):
        groups_of[source.label][name].append(group)
    if keep is not None:
        keep(groups_of)
    tables = {source.label: eval_table(source.task, groups_of[source.label]) for source in sources}
    if recipe.eval.reader:
        assert frozen is not None
        chosen = recipe.eval
        reader = Reader(chosen.reader, chosen.reader_place, recipe.sampler.max_tokens)
        read = [(s, group) for s in sources for group in groups_of[s.label]["greedy"]]
        made = readings(reader, frozen[reader.model], [(s.task, g) for s, g in read])
        for source in sources:
            of_source = {
                group.problem.id: reading
                for (s, group), reading in zip(read, made, strict=True)
                if s is source and reading is not None
            }
            tables[source.label] = with_readings(tables[source.label], of_source)
    return with_language(tables, kept_of_language(samplers, recipe)) if recipe.eval.text else tables


def kept_of_language(samplers: SamplerPool, recipe: Recipe) -> dict[str, dict[str, float]]:
    """What `rewards.language` makes of the policy that the samplers have.

    Raises RunFailed where one of its requests has no answer.
    """
    chat, own = Chat(load_processor(recipe.model.path, reading=recipe.model)), OwnText.read()
    requests = own.requests(chat.text)
    replies = samplers.answer(requests, recipe.sampler.request_timeout_seconds)
    answered = [reply for reply in replies if isinstance(reply, np.ndarray)]
    if lost := [reply for reply in replies if isinstance(reply, ReplyError)]:
        raise RunFailed(f"eval.text: {lost[0].message}")
    return own.values(answered)


def _in_the_policys_form(
    asked: Sequence[tuple[ProblemSource, SampleRequest]], groups: Sequence[Group]
) -> dict[int, SampleRequest]:
    """The oracle requests, by place, where the free responses are in another form than theirs."""
    free: dict[str, list[str]] = {source.label: [] for source, _ in asked}
    for (source, request), group in zip(asked, groups, strict=True):
        if request.kind == "free":
            free[source.label] += [rollout.text for rollout in group.rollouts]
    tasks = {source.label: source.task for source, _ in asked}
    forms = {label: form_of(tasks[label], texts) for label, texts in free.items()}
    again = {}
    for index, (source, request) in enumerate(asked):
        task = source.task
        if request.kind == "oracle" and labelled(task, request.problem):
            prefix = oracle_prefix_in(forms[source.label], task, request.problem)
            if prefix != task.oracle_prefix(request.problem):
                again[index] = replace(request, prefix=prefix)
    return again


def eval_recipe(
    name: str, checkpoint: str, task: TaskConfig, asked: EvalConfig, like: Recipe | None
) -> Recipe:
    """Of an evaluation by all passes; `like` says how the checkpoint is run, if it is there."""
    sampling = like.eval.sampling if like else EvalSampling()
    passes = every_pass(like.environment if like else None)
    return Recipe(
        name=name,
        model=like.model.model_copy(update={"path": checkpoint})
        if like
        else ModelConfig(path=checkpoint),
        tasks=(task,),
        sampler=like.sampler if like else SamplerConfig(),
        environment=like.environment if like else None,
        eval=asked.model_copy(update={"passes": passes, "sampling": sampling}),
    )


def run_eval(
    checkpoint: str,
    task: TaskConfig,
    problems: int,
    samples: int,
    seed: int,
    as_json: bool,
    output: Path | None,
    address: str | None,
    like: Recipe | None = None,
    reader: str = "",
    reader_place: Place = "prompt",
) -> EvalTable:
    """`equipoise eval`: all passes of one task on one checkpoint, printed as a table or JSON.

    `output`: a file for the JSON. `reader`, `reader_place`: as in [eval].

    `like`: a recipe whose [model], [sampler], [environment] and [eval.sampling] say how the
    checkpoint is run.

    Raises DataError or ModelError for input that cannot be used, RunFailed where the engine
    ends the evaluation.
    """
    from cluster.run.session import session

    asked = EvalConfig(
        problems=problems, samples=samples, seed=seed, reader=reader, reader_place=reader_place
    )
    recipe = eval_recipe("eval", checkpoint, task, asked, like)
    console = Console(stderr=as_json)
    with session(recipe, "eval", address, None, console.print) as ready:
        count = len(held_out(ready.sources[0], seed, problems))
        console.print(f"{count} held-out problems; starting the sampler (vLLM) ...")
        recipe = ready.recipe
        with sampling_from(recipe, recipe.model.path, "eval") as (pool, frozen, _):
            (table,) = evaluate_all(pool, ready.sources, recipe, frozen).values()
    printed = {"checkpoint": checkpoint, "task": task.name, "seed": seed} | table.to_dict()
    if output:
        put_text(output, json.dumps(printed, indent=2))
    if as_json:
        print(json.dumps(printed, indent=2))
    else:
        console.print(table.table(f"{checkpoint} on {task.name}").to_rich())
    for line in unread_tables({task.name: table}):
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
    return table
