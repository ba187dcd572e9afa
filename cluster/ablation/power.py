"""What an ablation can show before it is run: power from the spread that a pilot had.

Pure functions, for the test of `ablation.statistics.crossed_interval` on paired differences [S, P].
Power is the chance that its interval leaves out 0 when the true difference is δ. With more than
one arm p-values are Holm-adjusted; the smallest then has to pass `alpha` / arms, and that is what
is counted here: no arm needs more.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

ALPHA = 0.05
POWER = 0.8
"""The chance of showing a difference at which it counts as one that can be shown."""
MOST_SEEDS = 200


@dataclass(frozen=True)
class Spread:
    """Variances of a paired difference: of seeds, of problems, and of single answers.

    `df`: degrees of freedom that the first rests on, (seeds − 1) a compared arm.
    """

    seeds: float
    problems: float
    answers: float
    df: int


def spread_of(differences: Sequence[np.ndarray]) -> Spread | None:
    """Mean variance components over paired differences, float [S, P] each.

    Two-way random effects by the method of moments, none below 0. None where no array has two
    seeds and two problems.
    """
    parts: list[tuple[float, float, float]] = []
    df = 0
    for values in differences:
        seeds, problems = values.shape
        if seeds < 2 or problems < 2:
            continue
        by_seed, by_problem = values.mean(axis=1), values.mean(axis=0)
        residual = values - by_seed[:, None] - by_problem[None, :] + values.mean()
        answers = float((residual**2).sum()) / ((seeds - 1) * (problems - 1))
        parts.append(
            (
                max(0.0, float(by_seed.var(ddof=1)) - answers / problems),
                max(0.0, float(by_problem.var(ddof=1)) - answers / seeds),
                answers,
            )
        )
        df += seeds - 1
    if not parts:
        return None
    of_seeds, of_problems, of_answers = np.mean(parts, axis=0)
    return Spread(float(of_seeds), float(of_problems), float(of_answers), df)


def power(spread: Spread, seeds: int, problems: int, difference: float, arms: int = 1) -> float:
    """The chance that `seeds` × `problems` show a true `difference` of one of `arms` arms.

    The variance that the test estimates from S seeds is averaged over its χ² distribution.
    Raises ValueError below two seeds: one says nothing of others.
    """
    if seeds < 2:
        raise ValueError(f"{seeds} seeds: power over seeds needs at least 2")
    of_seeds = (spread.seeds + spread.answers / problems) / seeds
    of_problems = spread.problems / problems
    error = math.sqrt(of_seeds + of_problems)
    if error == 0:
        return 1.0
    level, df = ALPHA / arms, seeds - 1
    shares = special.chdtri(df, (np.arange(400) + 0.5) / 400) / df
    t, z = special.stdtrit(df, level / 2), special.ndtri(level / 2)
    half = np.sqrt(t**2 * of_seeds * shares + z**2 * of_problems)
    significant = special.ndtr((difference - half) / error) + special.ndtr(
        (-difference - half) / error
    )
    return float(significant.mean())


def smallest_difference(spread: Spread, seeds: int, problems: int, arms: int = 1) -> float:
    """The smallest true difference that is shown with probability `POWER`."""

    def lacking(difference: float) -> float:
        return power(spread, seeds, problems, difference, arms) - POWER

    top = 1e-6
    while lacking(top) < 0:
        top *= 2
    return float(optimize.brentq(lacking, 0.0, top, xtol=1e-5))


def seeds_needed(spread: Spread, problems: int, difference: float, arms: int = 1) -> int | None:
    """The fewest seeds with which `difference` is shown with probability `POWER`.

    None where `MOST_SEEDS` do not do it: problems are then what is missing.
    """
    counts = range(2, MOST_SEEDS + 1)
    index = bisect_left(
        counts, POWER, key=lambda seeds: power(spread, seeds, problems, difference, arms)
    )
    return counts[index] if index < len(counts) else None


def power_words(
    pilot: Mapping[str, Sequence[np.ndarray]],
    arms: int,
    seeds: int,
    problems: int,
    difference: float,
    unit: str = "problems",
) -> list[str]:
    """What the planned seeds and problems can show of `a`, and what `difference` would need.

    `pilot`: arm -> paired differences [S, P] to the reference, one a difficulty. `arms` are those
    that the plan compares; `unit` says what P counts.
    """
    spread = spread_of([values for arrays in pilot.values() for values in arrays])
    if spread is None:
        return ["power: unknown, for the pilot has no arm and reference with two seeds in common"]
    of_arms = ", ".join(
        f"{arm} {math.sqrt(of_seeds.seeds):.3f}"
        for arm, arrays in pilot.items()
        if (of_seeds := spread_of(arrays))
    )
    lines = [
        f"power: from the pilot's paired differences of a, s.d. over seeds "
        f"{math.sqrt(spread.seeds):.3f} ({of_arms}; {spread.df} degrees of freedom), over {unit} "
        f"{math.sqrt(spread.problems):.3f}, of single answers {math.sqrt(spread.answers):.3f}"
    ]
    if seeds > 1:
        one = smallest_difference(spread, seeds, problems)
        of_all = smallest_difference(spread, seeds, problems, arms)
        lines.append(
            f"power: {seeds} seeds × {problems} {unit}, as planned, show a difference of "
            f"{one:.3f} with {POWER:.0%} power, of {of_all:.3f} where Holm adjusts over {arms} arms"
        )
    else:
        lines.append("power: none is planned, for one seed says nothing about other seeds")
    for count in (problems, 4 * problems):
        least = seeds_needed(spread, count, difference, arms)
        needed = f"{least} seeds" if least else f"more than {MOST_SEEDS} seeds"
        lines.append(f"power: {difference:g} needs {needed} × {count} {unit}, Holm-adjusted")
    return lines
