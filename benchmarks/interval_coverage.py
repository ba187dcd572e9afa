"""How often the 95 % intervals of an ablation hold the truth, on simulated answers.

    python -m benchmarks.interval_coverage [--runs 1000]

Right-or-wrong accuracies of one arm, graded scores, and differences of two equal arms; problems
differ in difficulty (logit s.d. 1.5), seeds not at all or by .5 logits; and arms of which a seed in
seven collapses to nothing. A share of 1,000 intervals has a standard error of .007.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from scipy import optimize, special

from cluster.ablation.statistics import accuracy_interval, crossed_interval

HARDNESS = 1.5
COLLAPSE = 0.15
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""Chances [S, P] -> values [S, P]."""


def center(accuracy: float, variance: float) -> float:
    """The logit at which normal logits of that variance have this mean chance."""

    def excess(logit: float) -> float:
        chances = special.expit(logit + math.sqrt(variance) * NODES)
        return float((WEIGHTS * chances).sum() / math.sqrt(2 * math.pi)) - accuracy

    return float(optimize.brentq(excess, -30, 30))


def right(rng: np.random.Generator, chances: np.ndarray) -> np.ndarray:
    """One answer a seed and problem, right or wrong."""
    return (rng.random(chances.shape) < chances).astype(float)


def graded(rng: np.random.Generator, chances: np.ndarray) -> np.ndarray:
    """The share of 16 cells that are right."""
    return rng.binomial(16, chances) / 16


def difference(rng: np.random.Generator, chances: np.ndarray) -> np.ndarray:
    """Two arms without a difference."""
    return right(rng, chances) - right(rng, chances)


def collapsing(rng: np.random.Generator, chances: np.ndarray) -> np.ndarray:
    """Some seeds never answer right."""
    return right(rng, chances) * (rng.random((len(chances), 1)) >= COLLAPSE)


def simulated(
    draw: Draw, accuracy: float, shape: tuple[int, int], spread: float, runs: int, seed: int
) -> Iterator[np.ndarray]:
    """`runs` data sets [S, P] = `shape` of seeds that differ by `spread` logits."""
    rng = np.random.default_rng(seed)
    logit = center(accuracy, HARDNESS**2 + spread**2)
    for _ in range(runs):
        hard = rng.normal(0, HARDNESS, (1, shape[1])) + rng.normal(0, spread, (shape[0], 1))
        yield draw(rng, special.expit(logit + hard))


def coverage(data: Iterable[np.ndarray], true: float, signed: bool = False) -> float:
    """The share of data sets whose interval holds the truth; `signed`: they are differences."""
    interval = crossed_interval if signed else accuracy_interval
    intervals = [interval(values) for values in data]
    return float(np.mean([e.low <= true <= e.high for e in intervals]))  # type: ignore[operator]


def main() -> None:
    """Print a table a kind of value."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    seeds = (1, 2, 3, 5, 8, 12)
    for draw in (right, graded, difference, collapsing):
        print(f"\n{(draw.__doc__ or '').splitlines()[0]}")
        print("problems  spread  accuracy  " + "".join(f"{s:>3} seeds" for s in seeds))
        for problems, spread in ((64, 0.0), (64, 0.5), (512, 0.5)):
            for accuracy in (0.01, 0.02, 0.1, 0.5, 0.9, 0.98, 0.99):
                true = {difference: 0.0, collapsing: accuracy * (1 - COLLAPSE)}.get(draw, accuracy)
                shares = ""
                for s in seeds:
                    data = simulated(draw, accuracy, (s, problems), spread, runs, s)
                    shares += f"{coverage(data, true, draw is difference):>9.3f}"
                print(f"{problems:>8}  {spread:>6}  {accuracy:>8}  {shares}", flush=True)


if __name__ == "__main__":
    main()
