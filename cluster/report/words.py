"""What reports of runs and of ablations say alike: names, numbers, what was learnt. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from cluster.ablation.statistics import Estimate
from cluster.record.table import Table
from rewards.intervals import Interval

METRIC_NAMES = {
    "a": "a: end to end",
    "a_p": "a_p: seeing",
    "a_p_graded": "a_p_graded: seeing, graded",
    "a_r": "a_r: thinking, given p*",
    "a_r_blank": "a_r_blank: the same, image blank",
    "blind": "blind: no image",
    "called": "called: used the tool",
    "looked": "looked: was shown a picture by it",
    "a_alone": "a_alone: without the tool",
    "a_p_alone": "a_p_alone: the same",
    "a_r_tool": "a_r_tool: thinking, given p*, with the tool",
    "sufficiency": "sufficiency: enough seen for a text-only reader",
    "used": "used: right where that is so",
    "text_loss": "text_loss: nats a token of a text of ours",
    "text_right": "text_right: questions without a picture",
    "reader_blind": "reader_blind: that reader, given nothing",
    "reader_ceiling": "reader_ceiling: that reader, given p*",
    "leak": "leak: seen wrong, answered right",
    "self_consistency": "self-consistency: answer fits own perception",
    "reread_gain": "reread_gain: seen wrong at first, right after a look",
    "reread_loss": "reread_loss: seen right at first, wrong after a look",
}
LEAST_P = 0.05
"""A difference is called shown below this."""
DASH = "–"
"""Stands in a table for a number that is not there."""


def learnt(
    who: str, moves: Mapping[str, float], aside: str, index: Estimate | None, always: bool = False
) -> str:
    """Whether seeing, thinking, both or neither was learnt, and which gained more.

    `moves`: of "see" and "think", above 0 where it was shown to rise, below where to fall; `index`
    is the asymmetry index, told where something moved or `always`.
    """
    up = [word for word, move in moves.items() if move > 0]
    down = [word for word, move in moves.items() if move < 0]
    worse = f"got worse at {' and at '.join(f'{word}ing' for word in down)}"
    if up:
        text = f"{who} learnt to {' and to '.join(up)}" + (f", and {worse}" if down else "")
    else:
        text = f"{who} {worse}" if down else f"{who} learnt nothing that is beyond chance"
    text += aside
    if index is None or not (up or down or always):
        return f"{text}."
    which = {1: "thinking gained more", -1: "seeing gained more"}.get(
        side(index), "neither clearly gained more than the other"
    )
    return f"{text}; {which} (Δa_r − Δa_p = {show(index, '+')})."


def side(estimate: Estimate) -> int:
    """1 where the interval lies above 0, -1 where below, else 0."""
    if estimate.low is None or estimate.high is None:
        return 0
    return (estimate.low > 0) - (estimate.high < 0)


def reward_words(recipe: Mapping[str, Any]) -> str:
    """The reward as a weighted sum, such as `0.5 perception + 0.5 outcome`."""
    reward = recipe.get("reward", {})
    alpha, terms = reward.get("alpha"), reward.get("terms", ())
    if alpha is not None:
        return f"{alpha:g} · perception (a_p) + {1 - alpha:g} · outcome (a)"
    return " + ".join(f"{t.get('weight', 1):g} · {t.get('name')}" for t in terms) or "outcome (a)"


def settings_table(recipe: Mapping[str, Any], versions: Mapping[str, Any]) -> Table:
    """The recipe's values by dotted name (paths cut to their last part) and the versions."""
    rows = [(name, short_path(value)) for name, value in _flat(recipe, "")]
    packages = versions.get("packages", {})
    rows += [(f"version of {name}", str(version)) for name, version in packages.items()]
    if git := versions.get("git") or {}:
        rows.append(("commit", f"{git.get('commit')}{', modified' * bool(git.get('modified'))}"))
    machine = versions.get("machine", {})
    rows += [(f"machine {name}", str(value)) for name, value in machine.items()]
    title = "Recipe, versions and machine"
    return Table(title, ("setting", "value"), tuple(rows), align="ll", folded=True)


def _flat(value: Any, at: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [p for k, v in value.items() for p in _flat(v, f"{at}.{k}" if at else str(k))]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [p for i, v in enumerate(value) for p in _flat(v, f"{at}[{i}]")]
    return [(at, value)]


def reliability_table(
    rows: Iterable[tuple[str, ...]], named: tuple[str, ...], suffix: str
) -> Table:
    """How well each reward term tells true perception; `named`: the columns before the numbers."""
    return Table(
        "Reliability of reward terms",
        (*named, "over all", "within groups", "AUC", "graded, within groups"),
        tuple(rows),
        "Correlation of the term with true perception over all rollouts and within groups, "
        "the chance that a right perception gets more than a wrong one, and the correlation with "
        f"how near a perception is; means over steps{suffix}.",
        "l" * len(named) + "rrrr",
    )


RELIABILITY = ("pooled", "within", "auc", "graded")
"""What is logged of each term, in the order of `reliability_table`."""


def reliability_terms(metrics: Iterable[str]) -> list[str]:
    """The terms whose reliability is among the metrics."""
    parts = [name.split("/") for name in metrics]
    named = ["/".join(p[1:-1]) for p in parts if p[0] == "reliability" and len(p) > 2]
    return list(dict.fromkeys(named))


def short_path(value: Any) -> str:
    """The value as text; of an absolute path the last part, since reports are handed on."""
    text = str(value)
    return PurePath(text).name if text.startswith(("/", "~")) else text


def duration(seconds: float) -> str:
    """Such as `42 s`, `3 min 5 s`, `2 h 10 min`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60} min"


def count(n: int, noun: str) -> str:
    """Such as `1 seed`, `3 seeds`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def signed(value: float) -> str:
    """Three digits with a sign."""
    return f"{value:+.3f}".replace("-", "−")


def interval(row: Mapping[str, Any]) -> str:
    """A measured row's value with its interval."""
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def number_cell(value: float | None) -> str:
    """`0.25`, or `-`."""
    return "-" if value is None else f"{value:.2f}"


def interval_cell(estimate: Interval, signed: bool = False, digits: int = 2) -> str:
    """`0.25 [0.10, 0.40]`, or `-`."""
    if estimate.value is None:
        return "-"
    form = f"{'+' if signed else ''}.{digits}f"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}} [too few]"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def show(estimate: Estimate | None, sign: str = "", form: str = ".3f") -> str:
    """A value with its interval, or with a word on why it has none."""
    if estimate is None:
        return DASH
    value = f"{estimate.value:{sign}{form}}"
    if estimate.low is None or estimate.high is None:
        value += f" ({'one seed' if estimate.seeds < 2 else 'in every seed'})"
    else:
        value += f" [{estimate.low:{sign}{form}}, {estimate.high:{sign}{form}}]"
    return value.replace("-", "−")


def show_p(value: float | None) -> str:
    """A p-value, or a dash where there is none."""
    return DASH if value is None else f"{value:.2g}"


def overlaps(one: Estimate, other: Estimate) -> bool:
    """Whether two intervals overlap; what has none overlaps with all."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return True
    return one.low <= other.high and other.low <= one.high
