"""An ablation in words: who won, how sure, what was learnt, what to be wary of. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.ablation.grid import CellName
from cluster.ablation.settings import AblationConfig
from cluster.ablation.summary import Asymmetry, Comparison, Cost, Level, Summary, at
from cluster.report.document import Finding
from cluster.report.words import (
    LEAST_P,
    count,
    duration,
    learnt,
    overlaps,
    short_path,
    show,
    show_p,
    side,
)

FEWEST_SEEDS = 3
"""With fewer the report warns: intervals over seeds are very wide or absent."""


def lead(
    config: AblationConfig, base: Mapping[str, Any], finished: int, cells: int, reference: str
) -> str:
    """What was compared, on what, how often, and how the numbers are made."""
    tasks = " and ".join(str(t.get("name")) for t in base.get("tasks") or ()) or "unknown tasks"
    model = short_path((base.get("model") or {}).get("path", "?"))
    harder = ", ".join(d.name for d in config.difficulties)
    harder = f" × difficulties {harder}" if harder else ""
    against = f" Arms are compared with {reference}." if reference else ""
    trained, see = "trained by RL on", "problems"
    if config.command == "sft":
        trained, see = "fine-tuned on demonstrations of", "demonstrations"
    return (
        f"{count(len(config.arms), 'arm')}{harder} × {count(len(config.seeds), 'seed')} of "
        f"{model} {trained} {tasks}, {config.budget.in_words()} each; "
        f"{finished} of {cells} cells finished.{against} Arms of one seed are to start from "
        f"the same weights and see the same {see} (hashes under Pairing). Intervals are 95 %, "
        "over seeds and test problems; differences are paired by both, their p is Holm-adjusted "
        "over arms."
    )


def findings(summary: Summary, arms: Sequence[str]) -> tuple[Finding, ...]:
    """For each difficulty: which arm ended best and how sure, and what each learnt."""
    results = []
    for difficulty, task in summary.headlines():
        where = f"{at(difficulty, task)}: " if len(summary.headlines()) > 1 else f"On {task}, "
        of_arms = {arm: summary.of(difficulty, task, arm) for arm in arms}
        ranked = sorted((of["a"] for of in of_arms.values() if "a" in of), key=_last_first)
        if ranked:
            results += _winner(summary, where, ranked)
        last = {
            v.arm: v
            for v in summary.asymmetries
            if (v.difficulty, v.task) == (difficulty, task)
            and v.step == max(w.step for w in summary.asymmetries if w.arm == v.arm)
        }
        # The best arm first.
        order = dict.fromkeys([*(level.arm for level in ranked[:1]), *arms])
        sentences = [
            text for arm in order if (text := learnt_words(arm, of_arms[arm], last.get(arm)))
        ]
        if sentences:
            results.append(Finding(where + sentences[0], tuple(sentences[1:])))
    return (*results, *_cheapest(summary))


def _last_first(level: Level) -> float:
    return -level.after.value


def _winner(summary: Summary, where: str, ranked: Sequence[Level]) -> list[Finding]:
    """Who ended best on `a`, against the reference, and whose intervals overlap."""
    best, *others = ranked
    compared = {
        c.arm: c
        for c in summary.comparisons
        if (c.difficulty, c.task, c.metric) == (best.difficulty, best.task, "a")
    }
    headline = f"{where}{best.arm} ended best on a: {show(best.after)}"
    if best.arm == summary.reference:
        headline += ", and it is the reference"
    elif best.arm in compared:
        c = compared[best.arm]
        headline += f", {show(c.difference, '+')} against {c.reference} ({_sure(c)}): {_verdict(c)}"
    ties = [v.arm for v in others if v.after.value == best.after.value]
    headline += f". {', '.join(ties)} ended at the same value" if ties else ""
    details = tuple(
        f"{c.arm} against {c.reference}: {show(c.difference, '+')} ({_sure(c)}): {_verdict(c)}"
        for c in compared.values()
        if c.arm != best.arm
    )
    results = [Finding(f"{headline}.", details)]
    if not others:
        return results
    equal_arms = [v.arm for v in others if overlaps(v.after, best.after)]
    apart = [v.arm for v in others if v.arm not in equal_arms]
    text = f"The interval of {best.arm}'s a overlaps "
    text += f"that of {', '.join(equal_arms)}" if equal_arms else "no other arm's"
    text += f"; it is apart from that of {', '.join(apart)}." if equal_arms and apart else "."
    if equal_arms:
        text += " Levels alone do not say which of these is best; paired differences say more."
    significant = [c.arm for c in compared.values() if c.p_holm is not None and c.p_holm < LEAST_P]
    if compared and not significant:
        text += f" No arm is shown to differ from {summary.reference} on a."
    return [*results, Finding(text.strip())]


def learnt_words(arm: str, of: Mapping[str, Level], index: Asymmetry | None) -> str:
    """Whether an arm learnt to see or to think: changes whose interval leaves 0 out, and which
    gained more by the asymmetry index. "" where neither was measured."""
    changes = {
        word: (metric, of[metric].change)
        for metric, word in (("a_p", "see"), ("a_r", "think"))
        if metric in of
    }
    if not changes:
        return ""
    parts = [f"Δ{metric} {show(change, '+')}" for metric, change in changes.values()]
    moves = {word: side(change) for word, (_, change) in changes.items()}
    asymmetry_index = None if index is None else index.index
    return learnt(arm, moves, f" ({', '.join(parts)})", asymmetry_index, always=True)


def _cheapest(summary: Summary) -> list[Finding]:
    results = []
    for difficulty in dict.fromkeys(c.difficulty for c in summary.costs):
        tokens = [c for c in summary.costs if (c.difficulty, c.unit) == (difficulty, "tokens")]
        reached = [c for c in tokens if c.reach.median is not None]
        if not tokens:
            continue
        where = f" ({difficulty})" if difficulty else ""
        goal = f"training accuracy {tokens[0].target:.3f}{where}"
        if reached:
            first = min(reached, key=lambda c: c.reach.median or 0)
            text = f"{first.arm} reached {goal} with the fewest tokens: {spent(first)}."
        else:
            text = f"No arm reached {goal} in at least half of its seeds."
        rest = tuple(f"{c.arm}: {spent(c)}" for c in tokens if not reached or c.arm != first.arm)
        results.append(Finding(text, rest))
    return results


def warnings(
    config: AblationConfig, cells: Sequence[CellName], finished: Sequence[str],
    failed: Mapping[str, str], faults: Sequence[str],
) -> list[str]:  # fmt: skip
    """What a reader must know before believing the rest."""
    sentences = [f"Not paired: {fault}." for fault in faults]
    sentences += [
        f"{cell} failed: {' '.join(error.split())[:300]}" for cell, error in failed.items()
    ]
    open_ = [c.id for c in cells if c.id not in finished and c.id not in failed]
    if open_:
        sentences.append(
            f"{len(open_)} of {len(cells)} cells have neither ended nor failed; `equipoise ablate` "
            "goes on with them. Comparisons use the seeds that both arms have."
        )
    per_arm = {
        arm.name: len({c.seed for c in cells if c.arm == arm.name and c.id in finished})
        for arm in config.arms
    }
    least = min(per_arm.values())
    if finished and least < FEWEST_SEEDS:
        reason = (
            "Arms without a finished seed are in no table"
            if least == 0
            else "With one seed nothing is said about other seeds, however narrow an interval "
            "over problems is"
            if least == 1
            else "Intervals over two seeds are very wide"
        )
        counts = ", ".join(f"{arm} {n}" for arm, n in per_arm.items())
        sentences.append(f"Few seeds (finished: {counts}). {reason}.")
    if len(config.arms) < 2:
        sentences.append("There is one arm only, so nothing is compared.")
    return sentences


def _verdict(c: Comparison) -> str:
    """Whether an arm is shown to differ from the reference, as the end of a sentence."""
    if c.p_holm is None:
        verdict = "one seed decides nothing about others"
    elif c.p_holm < LEAST_P:
        direction = "more" if c.difference.value > 0 else "less"
        others = "problems" if c.difference.seeds == 1 else "seeds and problems"
        verdict = f"{direction} than other {others} explain"
    else:
        verdict = "no difference shown: 0 lies in the interval, or the adjusted p is not below 0.05"
    if c.difference.seeds == 1:
        return f"one seed only, so this says nothing about other seeds; {verdict}"
    return verdict


def spent(c: Cost) -> str:
    """What an arm spent until it got there; where it did not, that it was more than it had."""
    median = c.reach.median
    known = c.reach.spent_at_least if median is None else median
    if known is None:
        return "not known"
    amount = duration(known) if c.unit == "seconds" else f"{known:,.0f} {c.unit}"
    return amount if median is not None else f"not within {amount}"


def _sure(c: Comparison) -> str:
    return f"Holm-adjusted p {show_p(c.p_holm)}, {count(c.difference.seeds, 'seed')}"
