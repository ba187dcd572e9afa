"""What SFT says of its balance, and the recipes that ask for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.recipe.recipe import RecipeError, load_recipe
from cluster.run.sft import balance_metrics, perception_shares
from learner.balance import Balance, SegmentGradients, ngdiff_weight
from learner.batch import TrainBatch
from tasks.core import SEGMENTS

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
BASE = RECIPES / "tiny" / "sft_balance.toml"
NAMES = (*SEGMENTS, "other")
counts = st.tuples(*[st.integers(1, 500)] * len(NAMES))
losses = st.tuples(*[st.floats(0.01, 20)] * len(NAMES))


@given(n=counts, nll=losses, weight=st.floats(0, 1), p=st.floats(0.01, 99), r=st.floats(0.01, 99))
@settings(max_examples=80)
def test_shares_add_up_and_follow_the_weight(
    n: tuple[int, ...], nll: tuple[float, ...], weight: float, p: float, r: float
) -> None:
    metrics = {f"tokens/{s}": float(k) for s, k in zip(NAMES, n, strict=True)}
    metrics |= {f"nll/{s}": x for s, x in zip(NAMES, nll, strict=True)}
    found = balance_metrics(metrics, weight, SegmentGradients(p, r, 0.1))
    for kind in ("tokens", "loss", "grad_norm"):
        shares = [x for name, x in found.items() if name.startswith(f"sft/share/{kind}/")]
        assert sum(shares) == pytest.approx(1)
        assert all(0 <= x <= 1 for x in shares)
    rest = sum(k * x for k, x in zip(n[1:], nll[1:], strict=True)) / sum(n[1:])
    expected = weight * nll[0] / (weight * nll[0] + (1 - weight) * rest)
    assert found["sft/share/loss/perception"] == pytest.approx(expected)
    # The token mean is the weight that is perception's share of the tokens.
    plain = balance_metrics(metrics, n[0] / sum(n), None)
    told = perception_shares(metrics)
    assert plain["sft/share/loss/perception"] == pytest.approx(told.perception_loss)
    assert plain["sft/share/tokens/perception"] == pytest.approx(told.perception_tokens)
    assert not [name for name in plain if "grad" in name]
    even = balance_metrics(metrics, ngdiff_weight(p, r), SegmentGradients(p, r, 0.1))
    assert even["sft/share/grad_norm/perception"] == pytest.approx(0.5)


def test_a_segment_that_is_missing_has_no_share() -> None:
    metrics = {f"tokens/{s}": 0.0 for s in NAMES} | {"tokens/other": 3.0, "nll/other": 2.0}
    found = balance_metrics(metrics, 0.5, SegmentGradients(0.0, 1.0, 0.0))
    assert found["sft/share/loss/other"] == found["sft/share/tokens/other"] == 1
    assert found["sft/share/grad_norm/perception"] == 0


def test_ngdiff_without_measurements_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"sft_balance.toml: sft.norm_every: got 0, and balance"):
        load_recipe(BASE, ["sft.balance=ngdiff", "sft.norm_every=0"])


def test_the_curriculum_is_a_share_of_the_updates() -> None:
    staged = ["sft.curriculum=perception_first", "sft.curriculum_share=0.1", "sft.steps=50"]
    sft = load_recipe(BASE, [*staged, "sft.curriculum_weight=0.8"]).sft
    plain = load_recipe(BASE, staged[1:]).sft
    assert sft is not None and plain is not None
    empty = TrainBatch(())
    assert Balance(sft).weight_at(5, empty) == 0.8 != Balance(sft).weight_at(6, empty)
    assert Balance(sft).first_steps == 5 and Balance(plain).first_steps == 0
