"""What `equipoise diagnose --reader` tells: sufficiency, its use, and the reader's own bounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.record.stored import StoredScores
from cluster.record.table import Table
from cluster.report.words import interval_cell, number_cell
from rewards.hacking import PHASES, thirds
from rewards.intervals import UNDEFINED, Interval
from rewards.reader import Reading, believed
from rewards.sufficiency import Sufficiency, asymmetry_change, sufficiency

Readings = Mapping[tuple[int, str], Reading]
"""By step and group id, of one reader."""


@dataclass(frozen=True)
class ReadingReport:
    """One task as a reader sees it: all steps first, then by thirds.

    Attributes:
        phases: of each the name, the first and last step, and the numbers.
        change: of the asymmetry, from the first to the last third (`asymmetry_change`).
        unread: groups that the reader could not be asked about, or that have no diagnosis.
    """

    task: str
    reader: str
    phases: tuple[tuple[str, tuple[int, int], Sufficiency], ...]
    change: Interval
    unread: int


def with_sufficiency(
    scores: Sequence[StoredScores], readings: Readings, label: str
) -> list[StoredScores]:
    """Scores with sufficiency as a term beside the others, so that it is judged as they are."""
    return [
        replace(s, terms={**s.terms, label: reading.sufficient.astype(np.float64)})
        if (reading := readings.get((s.step, s.group_id))) is not None
        else s
        for s in scores
    ]


def reading_reports(
    scores: Sequence[StoredScores], readings: Readings, reader: str
) -> list[ReadingReport]:
    """One report a task, in the order the tasks occur."""
    return [
        _report(task, reader, [s for s in scores if s.task == task], readings)
        for task in dict.fromkeys(s.task for s in scores)
    ]


def reading_sheets(report: ReadingReport) -> list[Table]:
    """The tables of one task."""
    bounds, skills = [], []
    for phase, steps, result in report.phases:
        head = (phase, "{}–{}".format(*steps), str(result.rollouts))
        bounds.append(
            (
                *head,
                *(interval_cell(e) for e in (result.blind, result.sufficiency, result.ceiling)),
                *(str(result.labelled), interval_cell(result.gain, signed=True)),
                interval_cell(result.stated),
            )
        )
        skills.append(
            (
                *head,
                *(interval_cell(e) for e in (result.sufficiency, result.used, result.unused)),
                interval_cell(result.asymmetry, signed=True),
                *(interval_cell(e) for e in (result.outcome.pooled, result.outcome.within)),
                number_cell(result.outcome.zero_variance),
            )
        )
    refusal, unread = report.phases[0][2].refusal, report.unread
    notes = [
        f"{report.reader} is refused for {refusal}." if refusal else "",
        f"{unread} groups are left out: it could not be asked, or the task's code failed."
        if unread
        else "",
    ]
    change = interval_cell(report.change, signed=True)
    return [
        Table(
            f"{report.task}: what {report.reader} answers right without the images, given ...",
            (
                *("phase", "steps", "rollouts", "nothing (blind)", "own perception (sufficiency)"),
                *("p* (ceiling)", "groups with p*", "own − nothing", "states the answer"),
            ),
            tuple(bounds),
            " ".join(["Sufficiency lies between this reader's own bounds.", *notes]).strip(),
        ),
        Table(
            f"{report.task}: seeing (sufficiency) against thinking (used)",
            (
                *("phase", "steps", "rollouts", "sufficiency", "used", "right if not sufficient"),
                *("used − sufficiency", "outcome with it, pooled", "within group"),
                "constant groups",
            ),
            tuple(skills),
            "Used: the policy's answer is right where its perception suffices for the reader. From "
            f"the first to the last third used − sufficiency changed by {change}: above 0, "
            "training taught more thinking than seeing.",
        ),
    ]


def _report(
    task: str, reader: str, scores: Sequence[StoredScores], readings: Readings
) -> ReadingReport:
    readings_of_steps = [
        (s, s.diagnosis.a, readings[s.step, s.group_id])
        for s in scores
        if s.diagnosis is not None and (s.step, s.group_id) in readings
    ]
    trusted = {readings_of_steps[k][2].kind for k in believed([r for *_, r in readings_of_steps])}

    def lot(
        steps: frozenset[int], kinds: Collection[str] = trusted
    ) -> tuple[list[np.ndarray], list[Reading], list[str]]:
        inside = [
            (s.symmetry_key, a, r)
            for s, a, r in readings_of_steps
            if s.step in steps and (r.kind in kinds or not kinds)
        ]
        return [a for _, a, _ in inside], [r for *_, r in inside], [key for key, *_ in inside]

    every = frozenset(s.step for s in scores)
    parts = thirds([s.step for s in scores])
    named = [("all", every), *zip(PHASES, parts, strict=True)]
    phases = [(name, steps) for name, steps in named if steps and (name == "all" or steps < every)]
    whole = sufficiency(*lot(every, ()))
    withheld = not trusted or len(every) < len(parts)
    return ReadingReport(
        task,
        reader,
        tuple(
            (name, (min(steps), max(steps)), whole if steps == every else sufficiency(*lot(steps)))
            for name, steps in phases
        ),
        UNDEFINED if withheld else asymmetry_change(lot(parts[0]), lot(parts[-1])),
        len(scores) - len(readings_of_steps),
    )
