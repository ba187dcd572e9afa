"""`equipoise tasks check RECIPE`: what a recipe's data sets hold, and what of them would not do."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from cluster.recipe.context import Context
from cluster.recipe.preflight import is_here
from cluster.recipe.problems import opened_rows
from cluster.recipe.recipe import Recipe, Say
from cluster.recipe.rows import row_takes
from tasks.checkers import CHECKERS
from tasks.core import Problem, ScoresPerception, perceives
from tasks.load import load_task
from tasks.rows import Rows
from tasks.settings import TaskConfig
from tasks.splits import SPLITS
from tasks.vqa.opening import SHOWN, Opened
from tasks.vqa.task import gold_of


def check_data(recipe: Recipe, say: Say) -> list[str]:
    """Tell of each data set of a recipe; returns what a run would refuse, a line each."""
    context = Context.of(recipe) if is_here(recipe.model.path) else None
    wrong: list[str] = []
    for index, config in enumerate(recipe.tasks):
        if config.data is None:
            say(f"tasks[{index}]: {config.name} draws its problems; `tasks check {config.name}`")
            continue
        opened = opened_rows(config, index)
        say(f"tasks[{index}]: {config.name}, {config.data_named}")
        lines = [*_rows(opened, config), *_images(opened)]
        if context is None:
            lines.append(f"tokens     not measured: {recipe.model.path} is not on this machine")
        else:
            lines += _tokens(opened, context, config)
        if config.name == "vqa":
            lines += _golds(opened)
        for line in lines:
            say(f"  {line.removeprefix('!')}")
        wrong += [f"tasks[{index}]: {line[1:]}" for line in lines if line.startswith("!")]
    return wrong


def _rows(opened: Opened, config: TaskConfig) -> Iterator[str]:
    """Rows and splits, reasons for bad rows, repeats. What begins with ! is refused by a run."""
    yield "splits     " + ", ".join(f"{name} {rows:,}" for name, rows in opened.splits.items())
    sides = {side: len(opened.rows[side]) for side in SPLITS}
    yield f"rows       {sides['train']:,} to train on, {sides['test']:,} held out"
    yield from (f"           {note}" for note in opened.notes)
    for side, rows in sides.items():
        if not rows:
            yield f"!rows       none in split {side}, which training needs"
    for side in SPLITS:
        keys = Counter(opened.rows[side].fact(at).key for at in range(sides[side]))
        repeated = sum(count - 1 for count in keys.values())
        if repeated:
            yield f"repeats    {repeated:,} rows of {side} repeat images and question of another"
    kinds = Counter(bad.kind for bad in opened.bad)
    first = {bad.kind: bad for bad in reversed(opened.bad)}
    refused = "!" if config.bad_rows == "error" else ""
    for kind, count in kinds.most_common(2 * SHOWN):
        bad = first[kind]
        yield f"{refused}bad rows   {count:,}: {bad.reason} (first: {bad.where})"
    if opened.bad and refused:
        yield '           mend them, or leave them out by bad_rows = "skip"'
    labels = sum(rows.fact(at).labelled for rows in opened.rows.values() for at in range(len(rows)))
    task = load_task(config.task_name)
    if isinstance(task, ScoresPerception):
        yield f"labels     {labels:,} rows say what is to be seen; of these a_p and a_r are known"
    elif not perceives(task):
        yield f'labels     form = "{config.form}" has no perception: no a_p, a_r, leak, sufficiency'


def _images(opened: Opened) -> Iterator[str]:
    facts = [rows.fact(at) for rows in opened.rows.values() for at in range(len(rows))]
    counts = Counter(len(fact.sizes) for fact in facts)
    counted = ", ".join(f"{rows:,} rows with {n or 'none'}" for n, rows in sorted(counts.items()))
    yield f"images     {counted or 'none'}"
    sizes = sorted({s for fact in facts for s in fact.sizes}, key=lambda size: size[0] * size[1])
    if sizes:
        small, middle, large = (sizes[at] for at in (0, len(sizes) // 2, -1))
        named = {"smallest": small, "middle": middle, "largest": large}
        yield "           " + ", ".join(f"{label} {w}x{h}" for label, (w, h) in named.items())


def _tokens(opened: Opened, context: Context, config: TaskConfig) -> Iterator[str]:
    """Image tokens, prompt lengths, and the rows that do not fit."""
    unfit: list[tuple[Rows, int, str]] = []
    images, prompts = list[int](), list[int]()
    for rows in opened.rows.values():
        for at, counts in enumerate(row_takes(rows, context)):
            if fault := context.lack(counts):
                unfit.append((rows, at, f"{rows.where(at, fault.field)}: {fault.reason}"))
            if not counts.fault:
                images.append(counts.image)
                prompts.append(counts.prompt)
    yield f"tokens     of images {_spread(images)}"
    yield f"           of prompts {_spread(prompts)}, room for {context.length - context.answer:,}"
    refused = "!" if config.too_long == "error" else ""
    if unfit:
        yield f"{refused}too long   {len(unfit):,} rows do not fit the policy"
        yield from (f"           {line}" for _, _, line in unfit[:SHOWN])


def _golds(opened: Opened) -> Iterator[str]:
    """How the checkers judge the golds against themselves."""
    used: Counter[str] = Counter()
    wrong: list[str] = []
    for rows in opened.rows.values():
        for at, example in enumerate(rows.without_images()):
            problem = example.problem
            used[problem.truth["checker"]] += 1
            if not judges_itself(problem):
                example_text = f"{rows.where(at)}: {problem.truth['answers'][0]!r:.80}"
                wrong.append(f"{example_text} by {problem.truth['checker']}")
    used_checkers = ", ".join(f"{name} {rows:,}" for name, rows in used.most_common())
    yield f"checkers   {used_checkers or 'none'}"
    yield f"golds      {used.total() - len(wrong):,} of {used.total():,} are right by their checker"
    yield from (f"           wrong: {line}" for line in wrong[:SHOWN])


def judges_itself(problem: Problem) -> bool:
    """Whether a gold, given as the answer, is right; of a point the middle of its box."""
    checker, gold = CHECKERS[problem.truth["checker"]], gold_of(problem)
    answer = gold.answers[0]
    if checker.name == "point":
        left, top, right, bottom = json.loads(answer)
        answer = f"[{(left + right) / 2:.6g}, {(top + bottom) / 2:.6g}]"
    return checker.right(answer, gold)


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "none"
    return f"{min(values):,}–{max(values):,} (median {statistics.median(values):,.0f})"
