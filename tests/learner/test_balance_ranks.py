"""Gradient norms by segment on real DeepSpeed ranks: any stage, any number, and nothing changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learner.batch import TrainBatch
from learner.losses import BalancedLoss
from learner.policy import load_policy
from learner.trainer import LearnerSettings
from tests.support.ranks import Job, Outcome, run_ranks
from tests.support.samples import mixed_batch

LOSS = BalancedLoss(0.3)


@pytest.fixture(scope="module")
def outcomes(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> object:
    """Two updates each, measured before every one and (`plain`) never."""
    model = str(tiny_models["qwen3_vl"])
    mixed = mixed_batch(load_policy(model)[1])
    # In the first update one rank sees an image while the other reads blind.
    updates = tuple((b, LOSS) for b in (TrainBatch(mixed.sequences[1:3]), mixed))
    base = Job(LearnerSettings(model=model), updates, 1e-3, measure=("all", "head"))

    def job(stage: int, budget: int, plain: bool = False) -> Job:
        settings = replace(base.settings, zero_stage=stage, micro_batch_tokens=budget)
        return replace(base, settings=settings, measure=() if plain else base.measure)

    found: dict[str, Outcome] = {}
    for ranks, jobs in (
        (1, {"1/0": job(0, 10_000), "plain": job(0, 10_000, plain=True)}),
        (2, {"2/2": job(2, 1), "2/3": job(3, 1)}),
    ):
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        found |= run_ranks(ranks, jobs, folder, seconds=240)
    return found


def test_norms_are_the_same_for_every_stage_split_and_number_of_ranks(
    outcomes: dict[str, Outcome],
) -> None:
    expected = outcomes["1/0"].measured
    assert len(expected) == 4
    for name in ("2/2", "2/3"):
        for place, (a, b) in enumerate(zip(expected, outcomes[name].measured, strict=True)):
            # After the first, sign-like step of AdamW rounding shows more.
            rel = 2e-5 if place < 2 else 2e-3
            assert b.perception == pytest.approx(a.perception, rel=rel), (name, place)
            assert b.reasoning == pytest.approx(a.reasoning, rel=rel), (name, place)
            assert b.cosine == pytest.approx(a.cosine, abs=5 * rel), (name, place)


def test_measuring_changes_no_update(outcomes: dict[str, Outcome]) -> None:
    measured, plain = outcomes["1/0"], outcomes["plain"]
    assert plain.measured == []
    assert measured.weights.keys() == plain.weights.keys()
    assert all(torch.equal(measured.weights[n], plain.weights[n]) for n in plain.weights)
    names = measured.metrics[0].keys() - {"seconds"}
    for a, b in zip(measured.metrics, plain.metrics, strict=True):
        assert [a[n] for n in names] == [b[n] for n in names]


def test_the_whole_gradient_is_the_weighted_sum_of_the_parts(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        for update, told in enumerate(outcome.measured[::2]):
            p, r = 0.3 * told.perception, 0.7 * told.reasoning
            whole = (p * p + r * r + 2 * p * r * told.cosine) ** 0.5
            assert outcome.metrics[update]["grad_norm"] == pytest.approx(whole, rel=1e-4), name
