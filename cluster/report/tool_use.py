"""What `equipoise diagnose --tool` tells: what a tool gives and takes, and if it is looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.recipe.sections import EvalPass
from cluster.record.evaluation import EvalTable, pooled
from cluster.record.table import Table, finite, print_sheets
from cluster.record.tool_values import COMPARED, FREE, compared, shared_by
from cluster.report.charts import NOTHING, SHARE, Metrics, curves
from cluster.report.plots import OTHER_ROLES, Chart, Dash
from cluster.report.words import interval_cell
from rewards.tool_use import TERMS, Returned, ToolUse, returned, tool_use

RETURNS: Mapping[EvalPass, str] = {
    "returns_blank": "a blank of its size",
    "returns_other": "another problem's picture",
    "returns_elsewhere": "a wrong place of it",
}
SKILLS = {
    "a": "a, end to end",
    "a_p": "a_p, seeing",
    "a_r": "a_r, thinking given p*",
}
TITLES = {
    "call_gain": "call gain",
    "prompt_gain": "prompt gain",
    "call_harm": "call harm",
    "prompt_harm": "prompt harm",
}


@dataclass(frozen=True)
class ToolReport:
    """One task: each skill split; the pass of other returns -> skill -> what these were worth."""

    task: str
    skills: Mapping[str, ToolUse]
    returns: Mapping[str, Mapping[str, Returned]]


def read_tables(file: Path) -> dict[str, EvalTable]:
    """What `diagnose --tool` kept, by task; raises OSError and ValueError."""
    try:
        tables = json.loads(file.read_text(encoding="utf-8"))
        return {task: EvalTable.from_dict(table) for task, table in tables.items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"no tables of an evaluation: {error}") from error


def tool_reports(tables: Mapping[str, EvalTable]) -> list[ToolReport]:
    """A report a task, and of several one of all together first."""
    whole = {"all tasks": pooled(tables)} if len(tables) > 1 else {}
    return [tool_report(task, table) for task, table in {**whole, **tables}.items()]


def tool_report(task: str, table: EvalTable) -> ToolReport:
    """What the passes of one task tell; what was not asked, or has no label, is left out."""
    skills = {}
    for skill in COMPARED:
        shared, (alone, tool, called) = compared(table.per_problem, skill)
        if shared:
            skills[skill] = tool_use(alone, tool, called, _puzzles(table, shared))
    returns: dict[str, dict[str, Returned]] = {}
    for name in RETURNS:
        for skill in ("a", "a_p"):
            columns = (skill, f"{skill}{FREE[name]}", "looked")
            shared, (original, replaced, looked) = shared_by(table.per_problem, columns)
            if shared:
                return_effects = returned(original, replaced, looked, _puzzles(table, shared))
                returns.setdefault(name, {})[skill] = return_effects
    return ToolReport(task, skills, returns)


def tool_sheets(report: ToolReport) -> list[Table]:
    """The tables of one task."""
    both, terms, worth = [], [], []
    for skill, use in report.skills.items():
        cells = (interval_cell(e, digits=3) for e in (use.tool, use.alone))
        difference = interval_cell(use.difference, signed=True, digits=3)
        called = interval_cell(use.called, digits=3)
        both.append((SKILLS[skill], str(use.n), *cells, difference, called))
        for index, term in enumerate(use.terms):
            parts = (term.share, term.of_problems, term.rate, term.success)
            head = ("" if index else SKILLS[skill], TITLES[term.name], str(term.count))
            terms.append((*head, *(interval_cell(e, digits=3) for e in parts)))
    for skill in ("a", "a_p"):
        for name, words in RETURNS.items():
            if (returns := report.returns.get(name, {}).get(skill)) is not None:
                lost = (returns.lost, returns.lost_where_looked)
                worth.append(
                    (
                        *(SKILLS[skill], words, str(returns.n)),
                        interval_cell(returns.value, digits=3),
                        interval_cell(lost[0], signed=True, digits=3),
                        str(returns.looked),
                        interval_cell(lost[1], signed=True, digits=3),
                    )
                )
    return [
        Table(
            f"{report.task}: with the tool and without",
            ("skill", "problems", "with", "without", "with − without", "called"),
            tuple(both),
            "The same policy and problems, greedy. With − without is paired by problem.",
        ),
        Table(
            f"{report.task}: what the tool gives and takes",
            (
                *("skill", "term", "count", "share", "= of problems", "× calling, or not"),
                "× success",
            ),
            tuple(terms),
            "With − without is call gain + prompt gain − call harm − prompt harm, exactly. Gains "
            "are of problems that are wrong without the tool, harms of those that are right; call: "
            "it called; prompt: it did not, though the tool was offered.",
            "llrrrrr",
        ),
        Table(
            f"{report.task}: what is returned in place of the picture asked for",
            (
                *("skill", "returned", "problems", "accuracy", "true return − this"),
                *("problems with a look", "of these"),
            ),
            tuple(worth),
            "Paired by problem. Near 0: the policy does not use what it is shown.",
            "llrrrrr",
        ),
    ]


def tool_curves(metrics: Metrics) -> list[Chart]:
    """The four terms over the evaluations of a run, a chart a task and skill."""
    charts = []
    dashes: tuple[Dash, ...] = ("solid", "solid", "dashed", "dashed")
    ending = f"_{TERMS[0]}"
    for index, name in enumerate(
        n for n in metrics if n.startswith("eval/") and n.endswith(ending)
    ):
        stem = name.removesuffix(ending)
        task, _, skill = stem.removeprefix("eval/").rpartition("/")
        if len(metrics.get(name, NOTHING).steps) < 2:
            continue
        looks = zip(TERMS, OTHER_ROLES, dashes, strict=True)
        charts.append(
            curves(
                metrics, f"tool-{index}", f"What the tool gives and takes: {task}, {skill}",
                "Share of the held-out problems, greedy. Solid: wrong without the tool and right "
                "with it; dashed: right without and wrong with it; after a call, or (prompt) "
                "without one though the tool was offered.",
                {f"{stem}_{term}": (TITLES[term], role, dash) for term, role, dash in looks},
                (SHARE[0], None),
                smooth=False,
            )
        )  # fmt: skip
    return charts


def print_tool(
    run: str, tables: Mapping[str, EvalTable], as_json: bool = False, as_markdown: bool = False
) -> None:
    """The tables to a terminal, or JSON or Markdown and nothing else."""
    reports = tool_reports(tables)
    if as_json:
        document = {"run": run, "tasks": [asdict(report) for report in reports]}
        print(json.dumps(finite(document), indent=1))
        return
    sheets = [sheet for report in reports for sheet in tool_sheets(report) if sheet.rows]
    print_sheets(sheets, as_markdown)


def _puzzles(table: EvalTable, problems: list[str]) -> list[str]:
    return [table.puzzles.get(problem, problem) for problem in problems]
