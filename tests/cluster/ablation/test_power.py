"""Power against simulation with the very test it is about, and against SciPy's t-test."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cluster.ablate_cli import ablate_to_the_end
from cluster.ablation.grid import load_ablation
from cluster.ablation.power import (
    POWER,
    Spread,
    power,
    power_words,
    seeds_needed,
    smallest_difference,
    spread_of,
)
from cluster.ablation.statistics import crossed_interval
from cluster.recipe.recipe import UserError

SPREAD = Spread(seeds=0.02**2, problems=0.013, answers=0.2, df=6)


def drawn(
    rng: np.random.Generator, spread: Spread, seeds: int, problems: int, difference: float
) -> np.ndarray:
    """Differences [S, P] with these variances."""
    return (
        difference
        + rng.normal(0, math.sqrt(spread.seeds), (seeds, 1))
        + rng.normal(0, math.sqrt(spread.problems), (1, problems))
        + rng.normal(0, math.sqrt(spread.answers), (seeds, problems))
    )


@pytest.mark.parametrize(("seeds", "problems", "difference"), [(3, 512, 0.09), (8, 256, 0.05)])
def test_power_is_how_often_the_test_shows_a_difference(
    seeds: int, problems: int, difference: float
) -> None:
    rng = np.random.default_rng([1, seeds])
    shown = [
        (crossed_interval(drawn(rng, SPREAD, seeds, problems, difference)).p or 1.0) < 0.05
        for _ in range(800)
    ]
    # 800 tests: the share itself has a standard error of at most 1.8 points.
    assert power(SPREAD, seeds, problems, difference) == pytest.approx(np.mean(shown), abs=0.05)


def test_without_spread_over_problems_power_is_that_of_a_t_test() -> None:
    for seeds, difference, arms in ((3, 0.1, 1), (6, 0.04, 1), (6, 0.04, 4)):
        spread = Spread(seeds=0.001, problems=0.0, answers=0.2, df=5)
        error = math.sqrt((spread.seeds + spread.answers / 512) / seeds)
        t = stats.t.ppf(1 - 0.025 / arms, seeds - 1)
        reference = stats.nct(seeds - 1, difference / error)
        expected = reference.sf(t) + reference.cdf(-t)
        assert power(spread, seeds, 512, difference, arms) == pytest.approx(expected, abs=2e-3)


def test_components_are_found_again() -> None:
    rng = np.random.default_rng(5)
    found = spread_of([drawn(rng, SPREAD, 12, 400, 0.05) for _ in range(60)])
    assert found is not None and found.df == 60 * 11
    assert found.seeds == pytest.approx(SPREAD.seeds, rel=0.3)
    assert found.problems == pytest.approx(SPREAD.problems, rel=0.1)
    assert found.answers == pytest.approx(SPREAD.answers, rel=0.05)
    assert spread_of([np.zeros((1, 400))]) is None


def test_what_is_needed_is_just_enough() -> None:
    for arms in (1, 4):
        least = smallest_difference(SPREAD, 6, 512, arms)
        assert power(SPREAD, 6, 512, least, arms) == pytest.approx(POWER, abs=1e-3)
        seeds = seeds_needed(SPREAD, 512, 0.03, arms)
        assert seeds is not None
        enough = [power(SPREAD, s, 512, 0.03, arms) >= POWER for s in (seeds - 1, seeds)]
        assert enough == [False, True]
    assert seeds_needed(SPREAD, 8, 0.001) is None
    with pytest.raises(ValueError, match="at least 2"):
        power(SPREAD, 1, 512, 0.1)


def test_a_dry_run_tells_the_power_from_a_published_pilot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation = load_ablation(Path("recipes/ablations/perception_signal.toml"))
    pilot = Path("docs/results/perception_signal")
    assert ablate_to_the_end(ablation, tmp_path, dry_run=True, pilot=pilot) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("power: ")]
    assert len(lines) == 4
    assert "group_agreement 0.103" in lines[0] and "8 degrees of freedom" in lines[0]
    assert "3 seeds × 512 problems" in lines[1] and "Holm adjusts over 4 arms" in lines[1]


def test_holm_counts_the_arms_of_the_plan_and_not_of_the_pilot() -> None:
    pilot = {"other": [drawn(np.random.default_rng(7), SPREAD, 6, 512, 0.05)]}
    spread = spread_of(pilot["other"])
    assert spread is not None
    words = power_words(pilot, 3, 8, 512, 0.03)
    assert (
        f"{smallest_difference(spread, 8, 512, 3):.3f} where Holm adjusts over 3 arms" in words[1]
    )


def test_what_only_a_dry_run_reads_is_refused_without_one(tmp_path: Path) -> None:
    ablation = load_ablation(Path("recipes/ablations/perception_signal.toml"))
    with pytest.raises(UserError, match=r"--pilot docs: .*--dry-run"):
        ablate_to_the_end(ablation, tmp_path, pilot=Path("docs"))
    with pytest.raises(UserError, match=r"--difference 0: expected"):
        ablate_to_the_end(ablation, tmp_path, dry_run=True, difference=0)
