"""Losses of SFT against float64 loops written from the formulas, and what losses tell of tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from learner.losses import PERCEPTION, BalancedLoss, Loss, TokenMeanLoss
from learner.metrics import EffectiveShare, Largest, Mean, Total, combined, values
from tasks.core import SEGMENTS
from tests.support.equations import N, assert_gradient, draw, loss_of, total

SEEN = draw(0).tokens.segments.numpy() == PERCEPTION


def mean_reference(logprobs: np.ndarray) -> float:
    return -sum(logprobs) / N


def balanced_reference(logprobs: np.ndarray) -> float:
    perception = [lp for lp, seen in zip(logprobs, SEEN, strict=True) if seen]
    rest = [lp for lp, seen in zip(logprobs, SEEN, strict=True) if not seen]
    return -0.3 * sum(perception) / len(perception) - 0.7 * sum(rest) / len(rest)


@pytest.mark.parametrize(
    ("loss", "reference"),
    ((TokenMeanLoss(), mean_reference), (BalancedLoss(0.3), balanced_reference)),
    ids=("token_mean", "balanced"),
)
def test_values_and_gradients_are_those_of_the_formula(
    loss: Loss, reference: Callable[[np.ndarray], float]
) -> None:
    drawn = draw(0)
    x = torch.from_numpy(drawn.logprobs).requires_grad_()
    h = torch.from_numpy(drawn.entropy).requires_grad_()
    value = total(loss, x, h, drawn)
    assert float(value.detach()) == pytest.approx(reference(drawn.logprobs), rel=1e-12)
    value.backward()
    assert_gradient(x.grad, reference, drawn.logprobs)
    assert h.grad is None and not loss.uses_entropy


def test_a_weight_equal_to_the_token_share_is_the_token_mean() -> None:
    drawn, share = draw(0), float(SEEN.mean())
    x, h = torch.from_numpy(drawn.logprobs), torch.from_numpy(drawn.entropy)
    balanced = total(BalancedLoss(share), x, h, drawn)
    torch.testing.assert_close(balanced, total(TokenMeanLoss(), x, h, drawn), rtol=1e-12, atol=0)


def test_metrics_are_means_over_the_tokens_they_name() -> None:
    drawn = draw(6)
    x, h = torch.from_numpy(drawn.logprobs), torch.from_numpy(drawn.entropy)
    found = values(loss_of().metrics((x, h), drawn.tokens))
    segments = drawn.tokens.segments.numpy()
    for index, name in (*enumerate(SEGMENTS), (-1, "other")):
        chosen = segments == index
        if name == "act" and not chosen.any():
            assert not [metric for metric in found if metric.endswith("/act")]
            continue
        assert found[f"tokens/{name}"] == chosen.sum()
        assert found[f"nll/{name}"] == pytest.approx(-drawn.logprobs[chosen].mean())
        assert found[f"entropy/{name}"] == pytest.approx(drawn.entropy[chosen].mean())
    gap = drawn.logprobs - drawn.tokens.sampler_logprobs.numpy()
    assert found["kl"] == pytest.approx((np.exp(gap) - 1 - gap).mean())
    assert found["ratio_mean"] == pytest.approx(np.exp(gap).mean())
    assert found["ratio_gap"] == pytest.approx(np.abs(np.exp(gap) - 1).max())
    assert found["logprob_gap"] == pytest.approx(np.abs(gap).max())
    assert found.keys() >= TokenMeanLoss().metrics((x, h), drawn.tokens).keys()


def test_metrics_of_parts_are_those_of_the_whole() -> None:
    parts = (
        {"sum": Total(1), "mean": Mean(6.0, 2), "max": Largest(-3.0), "w": EffectiveShare(2, 2, 2)},
        {"sum": Total(2), "mean": Mean(0.0, 1), "max": Largest(-5.0), "w": EffectiveShare(2, 4, 1)},
        {"mean": Mean(0.0, 0), "none": Mean(0.0, 0)},
    )  # fmt: skip
    expected = {"sum": 3, "mean": 2.0, "max": -3.0, "w": 16 / (3 * 6)}
    assert values(combined(parts)) == expected == values(combined(reversed(parts)))
