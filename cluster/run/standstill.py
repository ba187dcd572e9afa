"""Why a policy cannot learn: responses in a form that nobody reads, steps without an update.

What is said is a pure function of counts; `Standstill` says it while a run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.recipe.recipe import Say
from cluster.record.evaluation import TRUNCATED, EvalTable
from rewards.reader import refusal

LEAST_SHARE = 0.9
"""Of responses with one defect: from there on it is the form that is measured, and no skill."""
HARMLESS = ("text_before_perception", "text_between_segments")
"""Defects that spoil nothing (`tasks.responses`)."""
CEILING = "reader_ceiling"
"""A metric, and with `/<kind>` behind it that of a kind of question."""
PATIENCE = 3
"""Steps in a row without an update that are told; told again at each doubling."""


def unread(
    where: str, responses: int, a: float, a_p: float, defects: Mapping[str, float]
) -> str | None:
    """The defect for which no answer, or no perception, is right, and what helps; None without one.

    `defects`: defect -> share of responses.
    """
    widespread = {
        n: share for n, share in defects.items() if share >= LEAST_SHARE and n not in HARMLESS
    }
    if not widespread or (a > 0 and a_p > 0):
        return None
    # What was cut off has other defects for that reason; without an answer nothing is earned.
    worst = max(
        widespread, key=lambda name: (name == TRUNCATED, name == "missing_answer", widespread[name])
    )
    helps = (
        "raise sampler.max_tokens"
        if worst == TRUNCATED
        else "teach the form first (`equipoise sft`, section [sft]) or let the prompt ask for it "
        '(built-in tasks: knobs.prompt = "full")'
    )
    return (
        f"{where}: {worst} in {round(widespread[worst] * responses)} of {responses} responses, and "
        f"no {'answer' if a == 0 else 'perception'} is right; {helps}"
    )


def unread_tables(tables: Mapping[str, EvalTable]) -> list[str]:
    """`unread` for each task of an evaluation; nothing for those without the pass `greedy`."""
    warnings = []
    for task, table in tables.items():
        values = {row.metric: row.value for row in table.rows}
        if "a" in values:
            shares = {
                n.removeprefix("defect/"): v for n, v in values.items() if n.startswith("defect/")
            }
            warnings.append(unread(task, table["a"].n, values["a"], values.get("a_p", 1.0), shares))
        bounds = [m for m in values if m.startswith(CEILING)]
        for metric in [m for m in bounds if m != CEILING] or bounds:
            kind = metric.removeprefix(CEILING)
            floor = table.per_problem[f"reader_blind{kind}"]
            pairs = [(c, floor[problem]) for problem, c in table.per_problem[metric].items()]
            where = f" on questions of kind {kind[1:]}" if kind else ""
            if why := refusal(pairs):
                warnings.append(f"{task}: eval.reader: no sufficiency and no used{where}: {why}")
    return [line for line in warnings if line]


def unread_step(metrics: Mapping[str, float]) -> str | None:
    """`unread` for the responses of a step, by its metrics."""
    if "acc/a" not in metrics or not metrics.get("response/tokens_mean"):
        return None
    responses = round(metrics["response/tokens"] / metrics["response/tokens_mean"])
    counts = {n.removeprefix("defects/"): v for n, v in metrics.items() if n.startswith("defects/")}
    shares = {name: count / responses for name, count in counts.items()}
    shares[TRUNCATED] = metrics["response/truncated"]
    return unread("training", responses, metrics["acc/a"], metrics.get("acc/a_p", 1.0), shares)


def why_no_update(metrics: Mapping[str, float]) -> str:
    """Why a step, by its metrics, gave the learner nothing."""
    groups = metrics["group/count"]
    failed = ", ".join(
        f"{name.split('/')[1]} failed on {count:.0f} of {groups:.0f} groups"
        for name, count in sorted(metrics.items())
        if name.startswith("reward/") and name.endswith("/failures") and count
    )
    if metrics["group/dropped"] == groups:
        return f"every group was dropped: {failed}"
    cause = f"; {failed}" if failed else ""
    if metrics.get("reward/total/std", 1.0) < 1e-9:
        return f"every reward was {metrics['reward/total/mean']:.3g}{cause}"
    if metrics.get("group/zero_variance") == 1.0:
        return f"in every group all rewards were equal{cause}"
    return f"no group had a gradient{cause}"


class Standstill:
    """Counts the steps of a run that made no update, and says what must be said of it."""

    def __init__(self, say: Say) -> None:
        """`say` shows a line."""
        self._say = say
        self._form_is_known = False
        self._steps = self._without = self._in_a_row = 0
        self._why = ""

    def measured(self, tables: Mapping[str, EvalTable]) -> None:
        """The first evaluation, before any step."""
        self._form_is_known = any("a" in table.per_problem for table in tables.values())
        for line in unread_tables(tables):
            self._say(f"warning: {line}")

    def step(self, metrics: Mapping[str, float], updates: int | None) -> None:
        """A step is over; `updates`: None where there is no learner."""
        if not self._form_is_known and (line := unread_step(metrics)):
            self._say(f"warning: {line}")
        self._form_is_known = True
        if updates is None:
            return
        self._steps += 1
        self._in_a_row = 0 if updates else self._in_a_row + 1
        if updates:
            return
        self._without += 1
        self._why = why_no_update(metrics)
        times, rest = divmod(self._in_a_row, PATIENCE)
        if not rest and not times & (times - 1):
            self._say(f"warning: no update in {self._in_a_row} steps in a row: {self._why}")

    def end(self) -> None:
        """The run is over; nothing is said where most steps made an update."""
        if 2 * self._without > self._steps:
            unchanged = "the policy is unchanged: " if self._without == self._steps else ""
            count = f"no update in {self._without} of {self._steps} steps"
            self._say(f"warning: {unchanged}{count}; in the last of them {self._why}")
