"""Which problems of a source fit the policy: all stored rows measured, a few drawn ones tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat

from cluster.recipe.context import Context, Fault, Size, TokenCounts
from cluster.recipe.placement import Command
from cluster.recipe.problems import ProblemSource
from cluster.recipe.recipe import Recipe, Say
from cluster.recipe.rows import row_takes
from learner.settings import SftConfig
from tasks.core import DataError, Demonstrates, Task, labelled
from tasks.datasets import Example
from tasks.responses import TAG
from tasks.splits import SPLITS, Split
from tasks.turns import read_turns

FRESH = 3
"""Problems a split that are drawn of a task without data, to be measured."""
SHOWN = 5
"""Bad rows that are listed; the others are counted."""


def fitting_draws(
    recipe: Recipe, command: Command, index: int, source: ProblemSource, context: Context
) -> ProblemSource:
    """A source of generated problems that will fit; a few are drawn and measured here."""
    config = recipe.tasks[index]
    source = replace(source, context=context, redraws=config.too_long == "drop")
    for draw in range(FRESH):
        if command != "sample":
            source.problem("test", recipe.eval.seed, draw)
        if command == "eval":
            continue
        problem = source.problem("train", recipe.seed, draw)
        if command == "sft":
            assert isinstance(source.task, Demonstrates)  # `ask_tasks` asked
            example = Example(problem, source.task.demonstrate(problem, config.style))
            counts = context.token_counts_of(problem)
            fault = _response_fault(recipe.sft, source.task, example, context, counts)
            if fault is not None:
                raise DataError(
                    f"tasks[{index}]: demonstration of problem {problem.id}: {fault.reason}"
                )
            if recipe.environment:
                _ask_episode(recipe, index, source.task, example, context)
    return source


def _ask_episode(
    recipe: Recipe, index: int, task: Task, example: Example, context: Context
) -> None:
    """Raise DataError where a demonstration cannot be shown to what answers its turns."""
    from learner.sft import Demonstrator  # imports torch, which takes seconds

    calls = recipe.sft is not None and recipe.sft.call_share > 0
    try:
        writer = Demonstrator(context.processor, environment=recipe.environment)
        found = writer.of(task, example, blind=False, calls=calls)
    except DataError as error:
        raise DataError(f"tasks[{index}]: demonstration of {error}") from error
    if len(found) > context.length:
        raise DataError(
            f"tasks[{index}]: demonstration of problem {example.problem.id}: {len(found):,} tokens "
            "with what answers it do not fit in model.max_model_len = "
            f"{context.length:,}; raise that"
        )


def fitting_rows(
    recipe: Recipe, command: Command, index: int, source: ProblemSource, context: Context, say: Say
) -> ProblemSource:
    """The source with the stored rows that fit; raises DataError where some must not be left out.

    Both splits are measured whole, so that no row ends a run when its turn comes.
    """
    config, task = recipe.tasks[index], source.task
    fitting: dict[Split, list[int]] = {"train": [], "test": []}
    taking: list[TokenCounts] = []
    bad: list[tuple[Split, str, bool]] = []
    for split in SPLITS:
        rows = source.rows(split)
        learns = command == "sft" and split == "train"
        if learns and not any(rows.fact(at).responds for at in range(len(rows))):
            raise DataError(
                f"tasks[{index}].data: {config.data_named}: no row of split train has a response "
                "to learn from; SFT needs demonstrations (column `response`)"
            )
        examples = (
            rows.without_images() if learns or (split == "test" and rows.labelled) else repeat(None)
        )
        for row, (counts, example) in enumerate(
            zip(row_takes(rows, context), examples, strict=False)
        ):
            if not learns:
                prefix = ""
                if example and split == "test" and labelled(task, example.problem):
                    prefix = task.oracle_prefix(example.problem)
                fault = context.lack(counts, prefix)
            elif example and example.response:
                later = rows.fact(row).later
                fault = _response_fault(recipe.sft, task, example, context, counts, later)
            else:
                continue
            if fault is not None:
                line = f"{rows.where(row, fault.field)}: {fault.reason}"
                bad.append((split, line, fault.damaged))
                continue
            fitting[split].append(row)
            if split == "train":
                taking.append(counts)
    if command in ("train", "sample"):
        _ask_swapped(recipe, taking, context)
    if not bad:
        return source
    lines = [line for _, line, _ in bad]
    notices = lines[:SHOWN]
    if len(lines) > SHOWN:
        notices.append(f"... and {len(lines) - SHOWN:,} more")
    count = f"{len(lines):,} row{'s' * (len(lines) > 1)} of"
    where = f"tasks[{index}].data: {count} {config.data_named}"
    empty = next((split for split, chosen in fitting.items() if not chosen), None)
    wrong = ""
    if any(damaged for _, _, damaged in bad):
        wrong = "cannot be used; mend or remove them"
    elif config.too_long == "error":
        wrong = (
            "do not fit the policy; raise model.max_model_len, or leave them out by "
            f'tasks[{index}].too_long = "drop"'
        )
    elif empty:
        wrong = f"do not fit, and none of {empty} is left"
    if wrong:
        raise DataError("\n".join([*notices, f"{where} {wrong}"]))
    for line in (*notices, f"{where} do not fit the policy and are left out"):
        say(line)
    left_out = Counter(split for split, _, _ in bad)
    train, test = (
        source.train.chosen(fitting["train"]),
        source.test.chosen(fitting["test"]),
    )
    return replace(source, train=train, test=test, left_out=left_out)


def _ask_swapped(recipe: Recipe, taking: Sequence[TokenCounts], context: Context) -> None:
    """Raise DataError where one row's image behind another's query would not fit."""
    if not any(term.args.get("view") == "swapped" for term in recipe.reward.effective_terms()):
        return
    query = max((counts.prompt - counts.image for counts in taking), default=0)
    image = max((counts.image for counts in taking), default=0)
    if query + image + context.answer > context.length:
        raise DataError(
            f"reward.terms: view = \"swapped\" shows one row's image behind another's query: "
            f"{image:,} and {query:,} tokens and sampler.max_tokens = {context.answer:,} do not "
            f"fit in model.max_model_len = {context.length:,}; raise it, or choose another view"
        )


def _response_fault(
    sft: SftConfig | None,
    task: Task,
    example: Example,
    context: Context,
    counts: TokenCounts,
    later: Sequence[Size] = (),
) -> Fault | None:
    """Why a response cannot be learnt from behind its prompt, where it cannot."""
    if counts.fault:
        return counts.fault
    turns = [*(exchange.turn for exchange in example.earlier), example.response]
    parsed = read_turns(task, turns)
    whole = sft and sft.untagged == "whole" and not TAG.search("".join(turns))
    if parsed.defects and not whole:
        defect = parsed.defects[0]
        reason = f"has defect {defect!r}; demonstrations must parse without defects"
        return Fault("response", reason, damaged=True)
    if sft and "perception" not in parsed.spans and (sft.blind_share or sft.part == "perception"):
        use = "be given (sft.blind_share)" if sft.blind_share else "be learnt alone (sft.part)"
        return Fault("response", f"has no perception to {use}", damaged=True)
    return context.response_lack(counts, example, later)
