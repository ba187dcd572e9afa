"""The policy loss against float64 loops written from the papers' equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batch import Tokens, TrainBatch, TrainSequence
from learner.losses import Loss, token_statistics
from learner.policy import Policy, make_collator
from learner.policy_loss import (
    KL_ESTIMATORS,
    Aggregation,
    KLEstimator,
    Objective,
    Papo,
    PolicyLoss,
    k3,
)
from tasks.core import SEGMENTS
from tasks.images import mask_patches
from tests.learner.test_policy import plain_logprobs
from tests.support.samples import mixed_batch, sequence

LENGTHS = (1, 37, 8, 20, 3, 12, 30, 5)
MAX_TOKENS = 40
ENDS = np.cumsum(LENGTHS)
SPANS = [range(end - length, end) for end, length in zip(ENDS, LENGTHS, strict=True)]
N = int(ENDS[-1])
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
ESTIMATORS: tuple[KLEstimator, ...] = get_args(KLEstimator)
CLIP = {"clip": (0.2, 0.28), "gspo": (0.05, 0.08), "cispo": (0.3, 0.4)}


@dataclass(frozen=True)
class Draw:
    """A batch of sequences of `LENGTHS`; float64 [N] each, and [N] under a masked image."""

    logprobs: np.ndarray
    entropy: np.ndarray
    masked: np.ndarray
    masked_entropy: np.ndarray
    tokens: Tokens


def draw(seed: int, one_advantage: bool = False) -> Draw:
    """Ratios fall on all sides of every clip; `one_advantage`: the same over a sequence."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, N)
    rows = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    drift = rng.normal(0, 0.1, len(LENGTHS))[rows]  # so that a sequence's mean is off 1 as well
    advantages = rng.normal(0, 1, N)
    tokens = Tokens(
        ids=torch.zeros(N, dtype=torch.long),
        segments=torch.from_numpy(rng.integers(-1, 3, N).astype(np.int8)),
        sampler_logprobs=torch.from_numpy(logprobs - drift - rng.normal(0, 0.3, N)),
        advantages=torch.from_numpy(advantages[rows] if one_advantage else advantages),
        sequences=torch.from_numpy(rows),
    )
    entropies = rng.exponential(1.0, (2, N))
    return Draw(logprobs, entropies[0], logprobs - rng.normal(0.5, 1, N), entropies[1], tokens)


def sequences_of(drawn: Draw) -> tuple[TrainSequence, ...]:
    """The draw as training sequences, for the denominators."""
    prompt = np.zeros(1, np.int32)
    found = []
    for span in SPANS:
        segments = drawn.tokens.segments.numpy()[span.start : span.stop]
        zeros = np.zeros(len(span), np.float32)
        found.append(TrainSequence(prompt, zeros.astype(np.int32), None, segments, zeros, zeros))
    return tuple(found)


def total(loss: Loss, logprobs: torch.Tensor, entropy: torch.Tensor, drawn: Draw) -> torch.Tensor:
    counts = loss.denominators(TrainBatch(sequences_of(drawn)))
    parts = loss.sums(logprobs, entropy, drawn.tokens)
    assert parts.keys() == counts.keys()
    return torch.stack([value / counts[name] for name, value in parts.items()]).sum()


# --- the equations ---------------------------------------------------------------------------


def aggregated(values: list[float], aggregation: Aggregation) -> float:
    per_sequence = [[values[t] for t in span] for span in SPANS]
    if aggregation == "token_mean":
        return sum(map(sum, per_sequence)) / sum(map(len, per_sequence))
    if aggregation == "sequence_mean":
        return sum(sum(s) / len(s) for s in per_sequence) / len(per_sequence)
    return sum(sum(s) / MAX_TOKENS for s in per_sequence) / len(per_sequence)


def clipped_gain(ratio: float, a: float, low: float, high: float) -> float:
    # A positive advantage earns nothing above 1 + high, a negative one nothing below 1 - low.
    return min(ratio, 1 + high) * a if a > 0 else max(ratio, 1 - low) * a


def gains(objective: Objective, logprobs: np.ndarray, at: np.ndarray, drawn: Draw) -> list[float]:
    """Each token's gain at `logprobs`; what the papers stop the gradient of is taken at `at`."""
    low, high = CLIP[objective]
    old, advantages = drawn.tokens.sampler_logprobs.tolist(), drawn.tokens.advantages.tolist()
    found = []
    for span in SPANS:
        for t in span:
            if objective == "clip":
                ratio = math.exp(logprobs[t] - old[t])
                found.append(clipped_gain(ratio, advantages[t], low, high))
            elif objective == "cispo":
                weight = min(max(math.exp(at[t] - old[t]), 1 - low), 1 + high)
                found.append(weight * advantages[t] * logprobs[t])
            else:
                mean = sum(at[u] - old[u] for u in span) / len(span)
                ratio = math.exp(mean) * math.exp(logprobs[t]) / math.exp(at[t])
                found.append(clipped_gain(ratio, advantages[t], low, high))
    return found


def whole_sequence_gspo(logprobs: np.ndarray, drawn: Draw) -> float:
    """2507.18071, eq. 5 and 7: one clipped ratio and one advantage a sequence."""
    old, advantages = drawn.tokens.sampler_logprobs.tolist(), drawn.tokens.advantages.tolist()
    found = 0.0
    for span in SPANS:
        ratio = math.exp(sum(logprobs[t] - old[t] for t in span) / len(span))
        found -= clipped_gain(ratio, advantages[span.start], *CLIP["gspo"])
    return found / len(SPANS)


def assert_gradient(
    gradient: torch.Tensor | None, reference: Callable[[np.ndarray], float], at: np.ndarray
) -> None:
    """Central differences of `reference` at every fifth token."""
    assert gradient is not None
    for i in range(0, N, 5):
        step = np.zeros(N)
        step[i] = 1e-6
        slope = (reference(at + step) - reference(at - step)) / 2e-6
        assert float(gradient[i]) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_values_and_gradients_are_those_of_the_papers(
    objective: Objective, aggregation: Aggregation
) -> None:
    low, high = CLIP[objective]
    loss = PolicyLoss(low, high, 0, objective, aggregation, MAX_TOKENS)
    for seed in range(2):
        drawn = draw(seed)
        x = torch.from_numpy(drawn.logprobs).requires_grad_()

        def reference(logprobs: np.ndarray, drawn: Draw = drawn) -> float:
            return -aggregated(gains(objective, logprobs, drawn.logprobs, drawn), aggregation)

        value = total(loss, x, torch.from_numpy(drawn.entropy), drawn)
        assert float(value.detach()) == pytest.approx(reference(drawn.logprobs), rel=1e-12)
        value.backward()
        assert_gradient(x.grad, reference, drawn.logprobs)


def test_gspo_with_one_advantage_a_sequence_is_the_sequence_objective() -> None:
    loss = PolicyLoss(*CLIP["gspo"], objective="gspo", aggregation="sequence_mean")
    cut = 0
    for seed in range(4):
        drawn = draw(seed, one_advantage=True)
        x = torch.from_numpy(drawn.logprobs).requires_grad_()
        value = total(loss, x, torch.from_numpy(drawn.entropy), drawn)

        def reference(logprobs: np.ndarray, drawn: Draw = drawn) -> float:
            return whole_sequence_gspo(logprobs, drawn)

        assert float(value.detach()) == pytest.approx(reference(drawn.logprobs), rel=1e-12)
        value.backward()
        assert_gradient(x.grad, reference, drawn.logprobs)
        assert x.grad is not None
        silent = [not x.grad[list(span)].any() for span in SPANS]
        assert all(x.grad[list(s)].all() for s, off in zip(SPANS, silent, strict=True) if not off)
        cut += sum(silent)
    assert 0 < cut < 4 * len(SPANS)


def test_cispo_leaves_every_token_its_gradient() -> None:
    drawn = draw(0)
    x = torch.from_numpy(drawn.logprobs).requires_grad_()
    loss = PolicyLoss(*CLIP["cispo"], objective="cispo")
    total(loss, x, torch.from_numpy(drawn.entropy), drawn).backward()
    assert x.grad is not None and x.grad.all()
    low, high = CLIP["cispo"]
    weight = x.grad / (-drawn.tokens.advantages / N)
    assert float(weight.min()) == pytest.approx(1 - low)
    assert float(weight.max()) == pytest.approx(1 + high)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_statistics_count_what_the_loss_clips(objective: Objective) -> None:
    low, high = CLIP[objective]
    drawn = draw(6)
    advantages = drawn.tokens.advantages
    ratio = np.exp(drawn.logprobs - drawn.tokens.sampler_logprobs.numpy())
    for positive in (True, False):  # every side of the clip is in the draw
        chosen = ratio[(advantages.numpy() > 0) == positive]
        assert min((chosen < 1 - low).sum(), (chosen > 1 + high).sum()) > 3
    x = torch.from_numpy(drawn.logprobs).requires_grad_()
    loss = PolicyLoss(low, high, objective=objective)
    total(loss, x, torch.from_numpy(drawn.entropy), drawn).backward()
    found = token_statistics(x.detach(), torch.from_numpy(drawn.entropy), drawn.tokens, loss)
    assert x.grad is not None
    cut = (ratio > 1 + high) | (ratio < 1 - low) if objective == "cispo" else (x.grad == 0).numpy()
    assert found["sum/clipped"] == int(cut.sum()) > 0


# --- KL and entropy --------------------------------------------------------------------------


def log_tables(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float64 [V] of two policies over one token."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 7, dtype=torch.float64, generator=generator))  # type: ignore[return-value]


def kl(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """KL(q ‖ p) of two logits, summed over the whole vocabulary."""
    q, p = q.log_softmax(0), p.log_softmax(0)
    return (q.exp() * (q - p)).sum()


def gradient(value: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, of)[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_kl_estimator_follows_the_gradient_its_docstring_names(
    estimator: KLEstimator,
) -> None:
    for seed in range(5):
        q, p = log_tables(seed)
        estimate = KL_ESTIMATORS[estimator]
        if estimator != "k2":
            value = (q.softmax(0) * estimate(q.log_softmax(0), p.log_softmax(0))).sum()
            torch.testing.assert_close(value, kl(q, p))
        # p is trained, tokens are drawn from q: the penalty to the sampler.
        p.requires_grad_()
        values = estimate(q.log_softmax(0), p.log_softmax(0))
        if estimator == "k2":
            drawn_from_p = gradient((p.softmax(0).detach() * values).sum(), p)
            torch.testing.assert_close(drawn_from_p, gradient(kl(p, q), p))
        else:
            found = gradient((q.softmax(0) * values).sum(), p)
            torch.testing.assert_close(found, gradient(kl(q, p), p))
        # q is trained, tokens are drawn from q: a penalty to a fixed policy.
        p, q = p.detach(), q.clone().requires_grad_()
        values = estimate(q.log_softmax(0), p.log_softmax(0))
        found = gradient((q.softmax(0).detach() * values).sum(), q)
        expected = {
            "k1": torch.zeros_like(q),
            "k2": gradient(kl(q, p), q),
            "k3": gradient(kl(p, q), q),
        }
        torch.testing.assert_close(found, expected[estimator])


def test_where_the_policies_are_equal_only_k1_pulls() -> None:
    equal = torch.tensor([-1.0, -2.0], requires_grad=True)
    for name, estimate in KL_ESTIMATORS.items():
        found = gradient(estimate(equal.detach(), equal).sum(), equal)
        assert found.any() == (name == "k1")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_kl_term_is_aggregated_like_the_policy_term(
    estimator: KLEstimator, aggregation: Aggregation
) -> None:
    drawn = draw(3)
    old = drawn.tokens.sampler_logprobs.tolist()

    def reference(logprobs: np.ndarray) -> float:
        values = []
        for lp, lq in zip(logprobs, old, strict=True):
            r = math.exp(lp) / math.exp(lq)
            values.append(
                {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - 1 - math.log(r)}[
                    estimator
                ]
            )
        return 0.3 * aggregated(values, aggregation)

    loss = PolicyLoss(
        aggregation=aggregation, max_tokens=MAX_TOKENS, kl_weight=0.3, kl_estimator=estimator
    )
    x = torch.from_numpy(drawn.logprobs).requires_grad_()
    batch = TrainBatch(sequences_of(drawn))
    value = loss.sums(x, x, drawn.tokens)["kl"] / loss.denominators(batch)["kl"]
    assert float(value.detach()) == pytest.approx(reference(drawn.logprobs), rel=1e-12)
    assert_gradient(gradient(value, x), reference, drawn.logprobs)


def test_entropies_are_means_over_their_own_tokens() -> None:
    drawn = draw(4)
    segments = drawn.tokens.segments.tolist()
    weights = {"perception": 0.5, "reasoning": 0.0, "answer": -0.25}

    def reference(entropy: np.ndarray) -> float:
        found = -0.01 * sum(entropy) / N
        for index, weight in ((0, 0.5), (2, -0.25)):
            own = [h for h, s in zip(entropy, segments, strict=True) if s == index]
            found -= weight * sum(own) / len(own)
        return found

    loss = PolicyLoss(entropy_weight=0.01, entropy_weights=weights)  # type: ignore[arg-type]
    assert loss.uses_entropy and not PolicyLoss(entropy_weights={"answer": 0.0}).uses_entropy
    h = torch.from_numpy(drawn.entropy).requires_grad_()
    counts = loss.denominators(TrainBatch(sequences_of(drawn)))
    sums = loss.sums(torch.from_numpy(drawn.logprobs), h, drawn.tokens)
    assert list(sums) == ["policy", "entropy", "entropy_perception", "entropy_answer"]
    value = torch.stack([sums[name] / counts[name] for name in list(sums)[1:]]).sum()
    assert float(value.detach()) == pytest.approx(reference(drawn.entropy), rel=1e-12)
    assert_gradient(gradient(value, h), reference, drawn.entropy)


# --- splits ----------------------------------------------------------------------------------


@given(
    order=st.permutations(range(len(LENGTHS))),
    cuts=st.sets(st.integers(1, len(LENGTHS) - 1)),
    objective=st.sampled_from(OBJECTIVES),
    aggregation=st.sampled_from(AGGREGATIONS),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_split_into_micro_batches_changes_a_term(
    order: list[int], cuts: set[int], objective: Objective, aggregation: Aggregation
) -> None:
    drawn = draw(8)
    loss = PolicyLoss(
        *CLIP[objective], 0.1, objective, aggregation, MAX_TOKENS, kl_weight=0.1,
        entropy_weights=dict.fromkeys(SEGMENTS, 0.2), papo=Papo(0.5, 0.3),
    )  # fmt: skip
    views = [drawn.logprobs, drawn.entropy, drawn.masked, drawn.masked_entropy]

    def terms(part: list[int]) -> dict[str, float]:
        at = np.concatenate([np.arange(SPANS[i].start, SPANS[i].stop) for i in part])
        counts = torch.tensor([LENGTHS[i] for i in part])
        tokens = replace(
            drawn.tokens.map(lambda value: value[torch.from_numpy(at)]),
            sequences=torch.arange(len(part)).repeat_interleave(counts),
        )
        plain, entropy, masked, masked_entropy = (torch.from_numpy(v[at]) for v in views)
        found = loss.sums(plain, entropy, tokens)
        found |= loss.masked_sums(plain, entropy, masked, masked_entropy)
        return {name: float(value) for name, value in found.items()}

    whole = terms(list(range(len(LENGTHS))))
    bounds = [0, *sorted(cuts), len(LENGTHS)]
    parts = [terms(list(order[a:b])) for a, b in pairwise(bounds)]
    assert whole.keys() == loss.denominators(TrainBatch(sequences_of(drawn))).keys()
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-10)


# --- PAPO ------------------------------------------------------------------------------------


def test_the_image_terms_are_papos() -> None:
    drawn, loss = draw(5), PolicyLoss(papo=Papo(0.02, 0.03))
    expected = {"papo_kl": 0.0, "papo_entropy": 0.0, "papo_masked_entropy": 0.0}
    for lp, lm, h, hm in zip(
        drawn.logprobs, drawn.masked, drawn.entropy, drawn.masked_entropy, strict=True
    ):
        r = math.exp(lm) / math.exp(lp)
        expected["papo_kl"] -= 0.02 * (r - 1 - math.log(r))
        expected["papo_entropy"] += 0.03 * h
        expected["papo_masked_entropy"] += 0.03 * hm
    views = (drawn.logprobs, drawn.entropy, drawn.masked, drawn.masked_entropy)
    found = loss.masked_sums(*map(torch.from_numpy, views))
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected)
    assert loss.uses_entropy and not PolicyLoss(papo=Papo(0.02)).uses_entropy
    assert PolicyLoss().masked_sums(*map(torch.from_numpy, views)) == {}


def test_the_masked_view_has_the_gradient_of_its_own_entropy_and_kl(
    loaded: tuple[Policy, Any],
) -> None:
    policy, processor = loaded
    policy.eval()
    seen = sequence(processor, 0, (64, 64), 20)
    assert seen.image is not None
    masked = replace(seen, image=mask_patches(seen.image, 14, 0.6))
    parameters = list(policy.parameters())

    def gradients(value: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    loss = PolicyLoss(papo=Papo(0.02, 0.03))

    def term(name: str) -> torch.Tensor:
        """A term's gradient through the masked view alone."""
        both = make_collator(policy, processor)([seen, masked])
        logprobs, entropy = policy(both, entropy_gradient=True)
        plain, hidden = logprobs.chunk(2)
        views = (plain.detach(), entropy.chunk(2)[0].detach(), hidden, entropy.chunk(2)[1])
        return gradients(loss.masked_sums(*views)[name])

    with torch.no_grad():
        fixed = plain_logprobs(policy, processor, seen)[0].float()
    hidden, entropies = plain_logprobs(policy, processor, masked)
    expected = gradients(0.03 * entropies.sum())
    assert expected.norm() > 1e-3
    assert (term("papo_masked_entropy") - expected).norm() < 1e-4 * expected.norm()

    hidden, _ = plain_logprobs(policy, processor, masked)
    expected = gradients(-0.02 * k3(fixed, hidden.float()).sum())
    assert expected.norm() > 1e-5
    assert (term("papo_kl") - expected).norm() < 1e-3 * expected.norm()


def test_a_sequence_without_an_image_depends_on_none(loaded: tuple[Policy, Any]) -> None:
    policy, processor = loaded
    blind = mixed_batch(processor).sequences[2]
    with torch.no_grad():
        logprobs, _ = policy.eval().run(make_collator(policy, processor)([blind, blind]))
    plain, masked = logprobs.chunk(2)
    found = PolicyLoss(papo=Papo()).masked_sums(plain, plain, masked, masked)
    assert abs(float(found["papo_kl"])) < 1e-9
