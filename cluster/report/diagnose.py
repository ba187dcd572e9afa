"""`equipoise diagnose RUN`: what a stored run's rewards rewarded, and which terms can be trusted.

By task: how the outcome couples with seeing and thinking, how well each reward term tells a right
perception from a wrong one, and whether a reward rose while perception fell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from cluster.record.stored import StoredScores, not_kept
from cluster.record.table import Table, print_sheets
from cluster.report.reading import (
    ReadingReport,
    Readings,
    reading_reports,
    reading_sheets,
    with_sufficiency,
)
from cluster.report.rescore import load_scores
from cluster.report.words import interval_cell, number_cell
from rewards.coupling import Correlations, coupling, independent_reference
from rewards.hacking import PHASES, Drift, drift, thirds
from rewards.intervals import RESAMPLES
from rewards.reliability import Reliability, reliability
from rewards.scored import DIAGNOSIS

Judged = tuple[StoredScores, np.ndarray, np.ndarray]
"""A group with a perception label, what a term gave it, and its `a_p`."""


@dataclass(frozen=True)
class TermReport:
    """One term in one phase; `failures` counts the groups on which it failed."""

    reliability: Reliability
    failures: int


@dataclass(frozen=True)
class PhaseReport:
    """One task in some of a run's steps.

    Attributes:
        phase: `all`, or a third of the steps.
        steps: the first and the last of them.
        groups, rollouts: with a diagnosis; the figures are theirs.
        labelled: of the groups, those with a perception label: `a_p`, `leak`, `perception`,
            `terms` and drifts are of these alone.
        undiagnosed: groups on which the task's own code failed.
        a, a_p: shares of right answers and of right perceptions; None without rollouts.
        leak: share of right answers on wrong perceptions. `independent` knows none: where it is
            large, the outcome follows perception less than that.
        q: share of answers that are right for the rollout's *own* perception, whether or not that
            is the true one: how often thinking succeeds on what was seen. None, as `reasoning`,
            where the task cannot tell (`tasks.core.Solves`).
        perception: the outcome with `a_p`.
        reasoning: the outcome with self-consistency, whose mean is `q`.
        independent: what the two pooled correlations were if seeing and thinking succeeded
            independently at rates `a_p` and `q` (`coupling.independent_reference`).
        terms: by name.
    """

    phase: str
    steps: tuple[int, int]
    groups: int
    rollouts: int
    labelled: int
    undiagnosed: int
    a: float | None
    a_p: float | None
    q: float | None
    leak: float | None
    perception: Correlations
    reasoning: Correlations
    independent: tuple[float | None, float | None]
    terms: Mapping[str, TermReport]


@dataclass(frozen=True)
class TaskReport:
    """One task: all steps first, then by thirds, and the drift of each term and of the total.

    `reading`: what a text-only reader makes of it, where one was asked.
    """

    task: str
    phases: tuple[PhaseReport, ...]
    drifts: Mapping[str, Drift | None]
    reading: ReadingReport | None = None


def run_diagnose(
    run: Path,
    rescore: Sequence[str] = (),
    as_json: bool = False,
    as_markdown: bool = False,
    reader: str = "",
    readings: Readings | None = None,
) -> list[TaskReport]:
    """`equipoise diagnose`: print the tables of a stored run, as rich tables unless asked else.

    `readings`: what the checkpoint `reader` made of the run's groups, if it was asked.

    Raises DataError for a folder that holds no readable run and UserError for a term that cannot
    be rescored.
    """
    reports = read_reports(load_scores(run, rescore), readings, reader)
    if lacking := not_kept(run):
        print(f"note: {lacking}", file=sys.stderr)
    if as_json:
        print(json.dumps({"run": run.name, "tasks": [asdict(r) for r in reports]}, indent=1))
        return reports
    print_sheets([sheet for report in reports for sheet in sheets(report)], as_markdown)
    return reports


def read_reports(
    scores: Sequence[StoredScores], readings: Readings | None, reader: str
) -> list[TaskReport]:
    """`task_reports` with sufficiency among the terms, and the reader's own report of each task."""
    if readings is None:
        return task_reports(scores)
    reports = task_reports(with_sufficiency(scores, readings, f"sufficiency ({reader})"))
    own = reading_reports(scores, readings, reader)
    return [replace(r, reading=o) for r, o in zip(reports, own, strict=True)]


def task_reports(scores: Sequence[StoredScores]) -> list[TaskReport]:
    """One report a task, in the order the tasks occur."""
    return [
        _task_report(task, [s for s in scores if s.task == task])
        for task in dict.fromkeys(s.task for s in scores)
    ]


def sheets(report: TaskReport) -> list[Table]:
    """The tables of one task."""
    read = reading_sheets(report.reading) if report.reading else []
    return [_coupling_sheet(report), *read, *_term_sheets(report), _drift_sheet(report)]


def _task_report(task: str, scores: Sequence[StoredScores]) -> TaskReport:
    names = list(dict.fromkeys(n for s in scores for n in (*s.terms, *_failed(s))))
    phases = [_phase("all", scores, names)]
    parts = thirds([s.step for s in scores])
    for phase, steps in zip(PHASES, parts, strict=True):
        inside = [s for s in scores if s.step in steps]
        if inside and len(inside) < len(scores):
            phases.append(_phase(phase, inside, names))
    drifts = {name: _drift(_judged(scores, name)) for name in names}
    undropped = [s for s in scores if not s.dropped]
    drifts["total"] = _drift([(s, s.totals, a_p) for s, a_p in _known(undropped, "a_p")])
    return TaskReport(task, tuple(phases), drifts)


def _phase(phase: str, scores: Sequence[StoredScores], names: Sequence[str]) -> PhaseReport:
    outcome = _known(scores, "a")
    labelled = _known(scores, "a_p")
    both = [s for s, _ in _known([s for s, _ in labelled], "self_consistency")]

    def rate(name: str, of: Sequence[StoredScores] = scores) -> float | None:
        arrays = [truth for _, truth in _known(of, name)]
        return float(np.concatenate(arrays).mean()) if arrays else None

    def coupled(name: str) -> Correlations:
        known = _known(scores, name)
        groups = [s for s, _ in known]
        outcomes = [a for _, a in _known(groups, "a")]
        return coupling(outcomes, [truth for _, truth in known], _puzzles(groups), RESAMPLES)

    terms = {}
    for name in names:
        judged = _judged(scores, name)
        measured = reliability(
            [v for _, v, _ in judged],
            [a_p for _, _, a_p in judged],
            _puzzles([s for s, _, _ in judged]),
            graded=[graded for _, graded in _known([s for s, _, _ in judged], "a_p_graded")],
        )
        terms[name] = TermReport(measured, sum(name in _failed(s) for s in scores))
    p, q = rate("a_p", both), rate("self_consistency", both)
    return PhaseReport(
        phase=phase,
        steps=(min(s.step for s in scores), max(s.step for s in scores)),
        groups=len(outcome),
        rollouts=sum(len(a) for _, a in outcome),
        labelled=len(labelled),
        undiagnosed=len(scores) - len(outcome),
        a=rate("a"),
        a_p=rate("a_p"),
        q=rate("self_consistency"),
        leak=rate("leak"),
        perception=coupled("a_p"),
        reasoning=coupled("self_consistency"),
        independent=(None, None) if p is None or q is None else independent_reference(p, q),
        terms=terms,
    )


def _failed(scores: StoredScores) -> list[str]:
    """Terms that failed on a group; a failed diagnosis is the task's, and no term."""
    return [f.term for f in scores.failures if f.term != DIAGNOSIS]


def _judged(scores: Sequence[StoredScores], term: str) -> list[Judged]:
    """The groups on which a term gave values and `a_p` is known."""
    return [
        (s, values, a_p)
        for s, a_p in _known(scores, "a_p")
        if (values := s.measured().get(term)) is not None
    ]


def _known(scores: Sequence[StoredScores], name: str) -> list[tuple[StoredScores, np.ndarray]]:
    """The groups of which a truth of a `Diagnosis` is known, with it."""
    truths = [(s, getattr(s.diagnosis, name, None)) for s in scores]
    return [(s, truth) for s, truth in truths if truth is not None]


def _puzzles(scores: Sequence[StoredScores]) -> list[str]:
    """What may be resampled: problems of one task and symmetry key are one puzzle."""
    return [s.symmetry_key for s in scores]


def _drift(judged: Sequence[Judged]) -> Drift | None:
    return drift(
        [s.step for s, _, _ in judged],
        [v for _, v, _ in judged],
        [a_p for _, _, a_p in judged],
        _puzzles([s for s, _, _ in judged]),
    )


def _coupling_sheet(report: TaskReport) -> Table:
    rows = []
    for phase in report.phases:
        head = (
            *(phase.phase, "{}–{}".format(*phase.steps), str(phase.groups)),
            *(number_cell(value) for value in (phase.a, phase.a_p, phase.q, phase.leak)),
        )
        pairs = (
            ("perception", phase.perception, phase.independent[0]),
            ("reasoning", phase.reasoning, phase.independent[1]),
        )
        for index, (skill, estimate, reference) in enumerate(pairs):
            rows.append(
                (
                    *(head if index == 0 else ("",) * len(head)),
                    skill,
                    interval_cell(estimate.pooled),
                    number_cell(reference),
                    interval_cell(estimate.within),
                    number_cell(estimate.zero_variance),
                )
            )
    whole = report.phases[0]
    return Table(
        f"{report.task}: what the outcome is coupled with",
        (
            *("phase", "steps", "groups", "a", "a_p", "q", "leak", "outcome with", "pooled"),
            *("if independent", "within group", "constant groups"),
        ),
        tuple(rows),
        "Pearson correlations with 95% intervals from resampling puzzles. q: share of answers "
        "right for the rollout's own perception. Leak: perception wrong, answer right. If "
        "independent: "
        "the pooled correlation if seeing and thinking succeeded independently at a_p and q, "
        "without leaks." + _unknown(whole),
    )


def _unknown(whole: PhaseReport) -> str:
    """Why figures are missing, or are of some groups only."""
    said = ""
    if whole.undiagnosed:
        said += f" {whole.undiagnosed} groups are left out: the task's code failed."
    if whole.groups and not whole.labelled:
        said += (
            " No problem has a perception label, so nothing can be said of a_p, of leaks, or of "
            "whether a reward follows perception."
        )
    elif whole.labelled < whole.groups:
        said += (
            f" {whole.labelled} of {whole.groups} groups have a perception label: all that is said "
            "of a_p, leaks and terms is of these."
        )
    if whole.a is not None and whole.q is None:
        said += " The task cannot tell whether an answer is right for a perception, so no q."
    return said


def _term_sheets(report: TaskReport) -> list[Table]:
    whole = report.phases[0]
    if whole.groups and not whole.labelled:
        return []
    table, phased, bins = [], [], []
    for name, term in whole.terms.items():
        measured = term.reliability
        table.append(
            (
                name,
                *(str(measured.n), number_cell(measured.mean)),
                *(interval_cell(e) for e in (measured.pooled, measured.within, measured.graded)),
                *(interval_cell(e) for e in (measured.auc, measured.auc_within)),
                *(number_cell(measured.brier.value), number_cell(measured.zero_variance.value)),
                str(term.failures),
            )
        )
        for label, pick in (
            ("pooled", "pooled"),
            ("within group", "within"),
            ("within group, graded", "graded"),
            ("AUC within", "auc_within"),
        ):
            cells = [
                interval_cell(getattr(p.terms[name].reliability, pick)) for p in report.phases[1:]
            ]
            phased.append((name if pick == "pooled" else "", label, *cells))
        for index, b in enumerate(measured.calibration):
            value = f"{b.low:.3g}" if b.low == b.high else f"{b.low:.3g} to {b.high:.3g}"
            bins.append(
                ("" if index else name, value, str(b.n), number_cell(b.mean), interval_cell(b.a_p))
            )
    result = [
        Table(
            f"{report.task}: can a term tell who saw right? Against true a_p, all steps",
            (
                *("term", "n", "mean", "pooled", "within group", "within, graded", "AUC"),
                *("AUC within", "Brier", "constant groups", "failed groups"),
            ),
            tuple(table),
            "Graded: with how near a perception is, which varies where few are exactly right. "
            "AUC: chance that a right perception earns more than a wrong one, ties half; 0.5 is "
            "chance. Brier: mean (value − a_p)², where values lie in [0, 1].",
        )
    ]
    if len(report.phases) > 1:
        headings = ("term", "figure", *(p.phase for p in report.phases[1:]))
        title = f"{report.task}: the same by phase of training"
        result.append(Table(title, headings, tuple(phased)))
    headings = ("term", "value", "n", "mean value", "a_p")
    title = f"{report.task}: calibration, all steps"
    note = "Wilson's intervals at the effective sample size that rollouts of one puzzle leave."
    return [*result, Table(title, headings, tuple(bins), note)]


def _drift_sheet(report: TaskReport) -> Table:
    rows = [
        (name, "-", "-", "too few steps" if report.phases[0].labelled else "no labels")
        if drift is None
        else (
            name,
            interval_cell(drift.reward, signed=True),
            interval_cell(drift.a_p, signed=True),
            "REWARD UP, a_p DOWN" if drift.flagged else "no",
        )
        for name, drift in report.drifts.items()
    ]
    return Table(
        f"{report.task}: from the first to the last third of the steps",
        ("term", "change of its mean", "change of a_p", "reward hacking"),
        tuple(rows),
        "Flagged where the interval of the term lies above 0 and that of a_p below 0.",
    )
