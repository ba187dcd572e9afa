"""Losses against float64 loops written from the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from learner.batch import Tokens, TrainBatch, TrainSequence
from learner.losses import (
    PERCEPTION,
    BalancedLoss,
    Loss,
    TokenMeanLoss,
    token_statistics,
)
from learner.policy_loss import PolicyLoss

N = 400
LOW, HIGH, BETA = 0.2, 0.28, 0.01


def draw(seed: int) -> tuple[np.ndarray, np.ndarray, Tokens]:
    """Log-probs and entropies float64 [N], and tokens; ratios fall on all sides of the clip."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, N)
    tokens = Tokens(
        ids=torch.zeros(N, dtype=torch.long),
        segments=torch.from_numpy(rng.integers(-1, 3, N).astype(np.int8)),
        sampler_logprobs=torch.from_numpy(logprobs - rng.normal(0, 0.4, N)),
        advantages=torch.from_numpy(rng.normal(0, 1, N)),
        sequences=torch.zeros(N, dtype=torch.long),
    )
    return logprobs, rng.exponential(1.0, N), tokens


def batch_of(tokens: Tokens) -> TrainBatch:
    """The tokens as one sequence, for the denominators."""
    zeros = np.zeros(len(tokens.ids), np.float32)
    ids = zeros.astype(np.int32)
    return TrainBatch((TrainSequence(ids[:1], ids, None, tokens.segments.numpy(), zeros, zeros),))


def total(
    loss: Loss, logprobs: torch.Tensor, entropy: torch.Tensor, tokens: Tokens
) -> torch.Tensor:
    counts = loss.denominators(batch_of(tokens))
    parts = [s / counts[name] for name, s in loss.sums(logprobs, entropy, tokens).items()]
    return torch.stack(parts).sum()


def policy_reference(logprobs: np.ndarray, entropy: np.ndarray, tokens: Tokens) -> float:
    found = 0.0
    for lp, old, a, h in zip(
        logprobs, tokens.sampler_logprobs.tolist(), tokens.advantages.tolist(), entropy, strict=True
    ):
        ratio = math.exp(lp - old)
        # A positive advantage earns nothing above 1 + high, a negative one nothing below 1 - low.
        gain = min(ratio, 1 + HIGH) * a if a > 0 else max(ratio, 1 - LOW) * a
        found -= gain + BETA * h
    return found / N


def mean_reference(logprobs: np.ndarray, entropy: np.ndarray, tokens: Tokens) -> float:
    return -sum(logprobs) / N


def balanced_reference(logprobs: np.ndarray, entropy: np.ndarray, tokens: Tokens) -> float:
    perception = [lp for lp, s in zip(logprobs, tokens.segments.tolist(), strict=True) if s == 0]
    rest = [lp for lp, s in zip(logprobs, tokens.segments.tolist(), strict=True) if s != 0]
    return -0.3 * sum(perception) / len(perception) - 0.7 * sum(rest) / len(rest)


CASES = {
    "policy": (PolicyLoss(LOW, HIGH, BETA), policy_reference),
    "token_mean": (TokenMeanLoss(), mean_reference),
    "balanced": (BalancedLoss(0.3), balanced_reference),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(name: str) -> None:
    loss, reference = CASES[name]
    for seed in range(3):
        logprobs, entropy, tokens = draw(seed)
        x = torch.from_numpy(logprobs).requires_grad_()
        h = torch.from_numpy(entropy).requires_grad_()
        value = total(loss, x, h, tokens)
        assert float(value.detach()) == pytest.approx(
            reference(logprobs, entropy, tokens), rel=1e-12
        )
        value.backward()
        assert x.grad is not None
        assert (h.grad is not None) == loss.uses_entropy
        for i in range(0, N, 7):
            for array, gradient in ((logprobs, x.grad), (entropy, h.grad)):
                step = np.zeros(N)
                step[i] = 1e-6
                arguments = [logprobs, entropy]
                place = 0 if array is logprobs else 1
                sides = []
                for sign in (1, -1):
                    arguments[place] = array + sign * step
                    sides.append(reference(arguments[0], arguments[1], tokens))
                slope = (sides[0] - sides[1]) / 2e-6
                found = 0.0 if gradient is None else float(gradient[i])
                assert found == pytest.approx(slope, abs=1e-8)


def test_every_side_of_the_clip_is_in_the_draw() -> None:
    logprobs, _, tokens = draw(0)
    ratio = np.exp(logprobs - tokens.sampler_logprobs.numpy())
    for positive in (True, False):
        chosen = ratio[(tokens.advantages.numpy() > 0) == positive]
        assert min((chosen < 1 - LOW).sum(), (chosen > 1 + HIGH).sum()) > 10


def test_a_weight_equal_to_the_token_share_is_the_token_mean() -> None:
    logprobs, entropy, tokens = draw(5)
    share = float((tokens.segments == PERCEPTION).double().mean())
    x, h = torch.from_numpy(logprobs), torch.from_numpy(entropy)
    balanced = total(BalancedLoss(share), x, h, tokens)
    torch.testing.assert_close(balanced, total(TokenMeanLoss(), x, h, tokens), rtol=1e-12, atol=0)


def test_statistics_count_what_the_loss_clips() -> None:
    logprobs, entropy, tokens = draw(6)
    x, h = torch.from_numpy(logprobs).requires_grad_(), torch.from_numpy(entropy)
    loss = PolicyLoss(LOW, HIGH)
    total(loss, x, h, tokens).backward()
    found = token_statistics(x.detach(), h, tokens, loss)
    assert x.grad is not None
    assert found["sum/clipped"] == int((x.grad == 0).sum())
    segments = tokens.segments.numpy()
    for index, name in enumerate(["perception", "reasoning", "answer"]):
        assert found[f"sum/tokens/{name}"] == (segments == index).sum()
        assert found[f"sum/nll/{name}"] == pytest.approx(-logprobs[segments == index].sum())
    gap = logprobs - tokens.sampler_logprobs.numpy()
    assert found["sum/kl"] == pytest.approx((np.exp(gap) - 1 - gap).sum())
    assert found["max/logprob_gap"] == pytest.approx(np.abs(gap).max())
