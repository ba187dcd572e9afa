"""What the scored groups of one step tell, as metrics. Pure.

Shapes: G rollouts in a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from cluster.record.folder import TRUTH_COLUMNS
from rewards.advantages import is_constant
from rewards.coupling import Correlations, coupling, outcome_couplings
from rewards.reliability import roc_auc
from rewards.scored import ScoredGroup, known
from rollout.record import Group, Rollout
from tasks.core import NO_SEGMENT, READ, SEGMENTS, Segment
from tasks.turns import readings


def step_metrics(groups: Sequence[ScoredGroup], policy_version: int) -> dict[str, float]:
    """Every always-logged number that the scored groups of one step can tell, by name.

    A number that is undefined in this step (a correlation with a constant side, rewards when
    every group was dropped) is left out. `policy_version` is the learner's now, for the lag.
    """
    metrics: dict[str, float] = {}
    metrics |= _reward_metrics(groups)
    metrics |= _truth_metrics(groups)
    metrics |= _reliability_metrics(groups)
    metrics |= _response_metrics(groups, policy_version)
    metrics |= _episode_metrics([r for g in groups for r in g.group.rollouts if r.turns])
    return metrics


def _reward_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    retained = [g for g in groups if not g.dropped]
    failures = Counter(f.term for g in groups for f in g.failures)
    kinds = Counter((f.term, f.kind) for g in groups for f in g.failures)
    for term in sorted({name for g in groups for name in g.terms} | set(failures)):
        values = [of[term] for g in retained if term in (of := g.measured())]
        if values:
            everything = np.concatenate(values)
            metrics[f"reward/{term}/mean"] = float(everything.mean())
            metrics[f"reward/{term}/std"] = float(everything.std())
            constant = sum(is_constant(v) for v in values)
            metrics[f"reward/{term}/zero_variance"] = constant / len(values)
        seconds = [g.seconds[term] for g in groups if term in g.seconds]
        if seconds:
            metrics[f"reward/{term}/seconds_mean"] = float(np.mean(seconds))
            metrics[f"reward/{term}/seconds_max"] = max(seconds)
        metrics[f"reward/{term}/failures"] = float(failures[term])
    for (term, kind), count in sorted(kinds.items()):
        metrics[f"reward/{term}/failures/{kind}"] = float(count)
    if retained:
        totals = np.concatenate([g.totals for g in retained])
        metrics["reward/total/mean"] = float(totals.mean())
        metrics["reward/total/std"] = float(totals.std())
        metrics["group/zero_variance"] = sum(g.zero_variance for g in retained) / len(retained)
        for column, segment in enumerate(_segments(g.group for g in retained)):
            silent = sum(not g.advantages[:, column].any() for g in retained)
            metrics[f"group/zero_variance/{segment}"] = silent / len(retained)
    metrics["group/count"] = float(len(groups))
    metrics["group/dropped"] = float(len(groups) - len(retained))
    return metrics


def _truth_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    diagnoses = [g.diagnosis for g in groups if g.diagnosis is not None]
    if not diagnoses:
        return {}
    metrics = {
        f"acc/{name}": float(np.concatenate([truth for _, truth in pairs]).mean())
        for name in TRUTH_COLUMNS
        if (pairs := known(diagnoses, name))
    }
    labels = np.concatenate([np.full(len(d.a), d.a_p is not None) for d in diagnoses])
    if not labels.all():
        metrics["acc/labelled"] = float(labels.mean())
    perception, reasoning = outcome_couplings(diagnoses)
    metrics |= _coupling_metrics("outcome_perception", perception)
    metrics |= _coupling_metrics("outcome_reasoning", reasoning)
    for defect, count in sorted(
        Counter(n for d in diagnoses for r in d.defects for n in r).items()
    ):
        metrics[f"defects/{defect}"] = float(count)
    return metrics


def _coupling_metrics(name: str, correlations: Correlations) -> dict[str, float]:
    if not correlations.n:
        return {}
    values = {
        "pooled": correlations.pooled.value,
        "within": correlations.within.value,
        "n": correlations.n,
    }
    values |= {"n_within": correlations.n_within, "zero_variance": correlations.zero_variance}
    return {f"coupling/{name}/{k}": float(v) for k, v in values.items() if v is not None}


def _reliability_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Every term against true `a_p`; zeros that stand for a failed term are left out."""
    metrics: dict[str, float] = {}
    for term in sorted({name for g in groups for name in g.terms}):
        judged = [
            (of[term], g.diagnosis.a_p, g.diagnosis.a_p_graded)
            for g in groups
            if term in (of := g.measured())
            and g.diagnosis is not None
            and g.diagnosis.a_p is not None
            and g.diagnosis.a_p_graded is not None
        ]
        if not judged:
            continue
        values, truth, graded = (list(column) for column in zip(*judged, strict=True))
        correlations = coupling(values, truth)
        figures = {
            "pooled": correlations.pooled.value,
            "within": correlations.within.value,
            "auc": roc_auc(np.concatenate(values), np.concatenate(truth)),
            "graded": coupling(values, graded).within.value,
        }
        for name, value in figures.items():
            if value is not None:
                metrics[f"reliability/{term}/{name}"] = value
    return metrics


def _segments(groups: Iterable[Group]) -> tuple[Segment, ...]:
    """The segments of a step's responses: `act` is one where there is an environment."""
    return SEGMENTS if any(r.turns for g in groups for r in g.rollouts) else READ


def _response_metrics(groups: Sequence[ScoredGroup], policy_version: int) -> dict[str, float]:
    rollouts = [rollout for g in groups for rollout in g.group.rollouts]
    if not rollouts:
        return {}
    lengths = np.array([r.sampled.sum() for r in rollouts])
    segments = np.concatenate([r.segments[r.sampled] for r in rollouts])
    versions = np.concatenate([r.versions for r in rollouts])
    metrics = {
        "response/tokens_mean": float(lengths.mean()),
        "response/tokens_max": float(lengths.max()),
        "response/tokens": float(lengths.sum()),
        "response/truncated": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }
    if len(segments):
        names = _segments(g.group for g in groups)
        for i, name in [*enumerate(names), (NO_SEGMENT, "none")]:
            metrics[f"response/share/{name}"] = float((segments == i).mean())
        metrics["policy/lag_mean"] = float(policy_version - versions.mean())
        metrics["policy/lag_max"] = float(policy_version - versions.min())
        mixed = [len(r.versions) > 0 and r.versions.min() < r.versions.max() for r in rollouts]
        metrics["policy/mixed"] = sum(mixed) / len(mixed)
    return metrics


def _episode_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of responses that had an environment."""
    if not rollouts:
        return {}
    count = len(rollouts)
    calls = [sum(turn.called for turn in rollout.turns) for rollout in rollouts]
    images = sum(turn.images for rollout in rollouts for turn in rollout.turns)
    metrics = {
        "episode/turns_mean": sum(len(rollout.turns) for rollout in rollouts) / count,
        "episode/calls_mean": sum(calls) / count,
        "episode/called": sum(map(bool, calls)) / count,
        "episode/images_mean": images / count,
        "episode/reread": sum(len(readings(r.parsed)) > 1 for r in rollouts) / count,
    }
    defects = Counter(d for r in rollouts for turn in r.turns for d in turn.defects)
    failures = Counter(r.failure.partition(":")[0] for r in rollouts if r.failure)
    ends = Counter(rollout.finish_reason for rollout in rollouts)
    metrics |= {f"episode/finish/{end}": n / count for end, n in sorted(ends.items())}
    metrics |= {f"episode/defects/{name}": float(n) for name, n in sorted(defects.items())}
    metrics |= {f"episode/failures/{kind}": float(n) for kind, n in sorted(failures.items())}
    return metrics
