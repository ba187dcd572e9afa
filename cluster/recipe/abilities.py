"""Whether the tasks of a recipe can do what its other sections ask of them; if not, a line says so.

`ask_tasks` looks at classes alone, in milliseconds; `ask_labels` at the problems too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.recipe.placement import Command
from cluster.recipe.problems import ProblemSource, held_out
from cluster.recipe.recipe import Recipe, Say
from rewards.leaks import WITHOUT
from rewards.settings import OF_CALLS, RewardTermConfig
from rewards.terms import TermFacts, facts_of
from tasks.core import (
    CanLeak,
    DataError,
    Demonstrates,
    DemonstratesCalls,
    Generates,
    HasVisionLabels,
    ScoresPerception,
    labelled,
    lacking,
    need,
    perceives,
)
from tasks.load import load_task

ORACLE = ("oracle", "oracle_blank", "oracle_tool")
"""Passes of an evaluation that force `p*`."""


def ask_tasks(recipe: Recipe, command: Command) -> None:
    """Raise DataError for a task that lacks what the recipe or the command asks of it."""
    tasks = [load_task(config.task_name) for config in recipe.tasks]
    for index, (config, task) in enumerate(zip(recipe.tasks, tasks, strict=True)):
        at = f"tasks[{index}]"
        if config.data is None:
            need(task, Generates, f"{at}.data: without a data set it", "name one")
            if command == "sft":
                remedy = "name a data set with a column `response`"
                need(task, Demonstrates, f"{at}.data: SFT without a data set", remedy)
        if command == "sft" and recipe.sft and recipe.sft.vision_warmup_steps:
            need(task, HasVisionLabels, "sft.vision_warmup_steps", "set it to 0")
        if command == "sft" and recipe.sft and recipe.sft.call_share:
            need(task, DemonstratesCalls, "sft.call_share", "set it to 0")
    for where, entry, facts in _terms(recipe) if command in ("train", "sample") else ():
        if facts.one_turn and recipe.environment is not None:
            raise DataError(
                f"{where} cannot be had on responses of several turns; remove the term, or "
                "[environment]"
            )
        if entry.name in OF_CALLS and recipe.environment is None:
            raise DataError(
                f"{where} is paid for calls, and there is no [environment] to call; remove the "
                "term, or add that section"
            )
        for task in tasks if facts.reads else ():
            if not perceives(task):
                raise DataError(
                    f'{where} is paid for perceptions, and responses to task "{task.name}" have '
                    'none; remove the term, or let them have one (of vqa: form = "segments")'
                )
        for ability in facts.needs:
            without = [task for task in tasks if not isinstance(task, ability)]
            if without and (_of_all(recipe, entry) or len(without) == len(tasks)):
                missing = ", ".join(lacking(without[0], ability))
                raise DataError(
                    f'{where} needs {missing}, which task "{without[0].name}" lacks; '
                    f"{_remedy(entry, len(without) < len(tasks))}"
                )


def ask_labels(
    recipe: Recipe,
    command: Command,
    sources: Sequence[ProblemSource],
    say: Say,
    draw: bool = True,
) -> None:
    """Ask whether there are perception labels where they are needed, and say where there are none.

    Said too: which tasks a `leakage_check` must do without the word of.

    `draw`: the problems of an evaluation may be drawn; stored ones are looked at anyway.
    """
    for where, entry, facts in _terms(recipe) if command in ("train", "sample") else ():
        for task in {source.task.name: source.task for source in sources}.values():
            if facts.leak_checked and not isinstance(task, CanLeak):
                say(f'{where}: task "{task.name}" {WITHOUT}')
        if ScoresPerception not in facts.needs or not _of_all(recipe, entry):
            continue
        for index, source in enumerate(sources):
            rows = source.train
            unlabelled = (at for at in range(len(rows)) if not rows.fact(at).labelled)
            if (bare := next((rows.id(at) for at in unlabelled), None)) is not None:
                raise DataError(
                    f"{where} needs a perception label of every problem, and problem {bare} of "
                    f"tasks[{index}].data has none; {_remedy(entry, True)}"
                )
    if command not in ("train", "sft", "eval"):
        return
    known = 0
    for source in sources:
        able = isinstance(source.task, ScoresPerception)
        problems = (
            held_out(source, recipe.eval.seed, recipe.eval.problems)
            if source.spec is None or draw
            else []
        )
        count = sum(labelled(source.task, problem) for problem in problems)
        known += count or (able and not problems)
        if not able or (problems and not count):
            none = "no perception labels, so no a_p, a_r, leak or reliability"
            if not perceives(source.task):
                none = (
                    "responses have no perception, so no a_p, a_r, leak, sufficiency, reliability"
                )
            say(f"{source.label}: {none}")
        elif count < len(problems):
            say(
                f"{source.label}: {count} of {len(problems)} held-out problems have a perception "
                "label; a_p, a_r and leak are of these"
            )
    oracles = [name for name in recipe.eval.passes or () if name in ORACLE]
    if oracles and not known and command != "eval":  # which always asks for all
        raise DataError(
            f'eval.passes: "{oracles[0]}" begins with the true perception, and no problem has a '
            "perception label; leave it out"
        )


def _terms(recipe: Recipe) -> Iterator[tuple[str, RewardTermConfig, TermFacts]]:
    """(where it stands in the recipe, the entry, what is known of its term)."""
    entries = recipe.reward.effective_terms()
    for index, (entry, facts) in enumerate(zip(entries, facts_of(entries).values(), strict=True)):
        short = recipe.reward.alpha is not None
        at = "reward.alpha" if short else f"reward.terms[{index}]"
        yield f'{at}: "{entry.name}"', entry, facts


def _of_all(recipe: Recipe, entry: RewardTermConfig) -> bool:
    """Whether a term must be able to tell of every problem; as a gate, 0 would shut it."""
    gates = [other.gate for other in recipe.reward.effective_terms()]
    return entry.on_failure == "abort" or (entry.on_failure == "zero" and entry.entry in gates)


def _remedy(entry: RewardTermConfig, has_labelled: bool) -> str:
    """`has_labelled`: of other problems it can tell."""
    leave = "remove the term, or take another (docs/rewards.md lists what needs no labels)"
    if has_labelled and entry.on_failure == "abort":
        return f'{leave}; on_failure = "zero" leaves it to the others'
    return f"{leave}; as a gate it would be shut for these problems" if has_labelled else leave
