"""The policy loss against float64 loops written from the papers' equations."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from learner.batch import TrainBatch
from learner.collate import Collator
from learner.metrics import Mean
from learner.policy_loss import KL_ESTIMATORS, k3
from tasks.core import SEGMENTS
from tasks.images import mask_patches
from tests.support.equations import (
    AGGREGATIONS,
    CLIP,
    ESTIMATORS,
    LENGTHS,
    OBJECTIVES,
    PAPO,
    SPANS,
    Draw,
    N,
    aggregated,
    assert_gradient,
    clipped_gain,
    draw,
    gains,
    loss_of,
    of_part,
    sequences_of,
    total,
)
from tests.support.plain import plain_logprobs
from tests.support.samples import Loaded, mixed_batch, sequence


def whole_sequence_gspo(logprobs: np.ndarray, drawn: Draw) -> float:
    """2507.18071, eq. 5 and 7: one clipped ratio and one advantage a sequence."""
    old, advantages = drawn.tokens.sampler_logprobs.tolist(), drawn.tokens.advantages.tolist()
    found = 0.0
    for span in SPANS:
        ratio = math.exp(sum(logprobs[t] - old[t] for t in span) / len(span))
        found -= clipped_gain(ratio, advantages[span.start], *CLIP["gspo"])
    return found / len(SPANS)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_values_and_gradients_are_those_of_the_papers(objective: str, aggregation: str) -> None:
    loss = loss_of(objective, aggregation=aggregation)
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
    loss = loss_of("gspo", aggregation="sequence_mean")
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
    loss = loss_of("cispo")
    total(loss, x, torch.from_numpy(drawn.entropy), drawn).backward()
    assert x.grad is not None and x.grad.all()
    low, high = CLIP["cispo"]
    weight = x.grad / (-drawn.tokens.advantages / N)
    assert float(weight.min()) == pytest.approx(1 - low)
    assert float(weight.max()) == pytest.approx(1 + high)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_statistics_count_what_the_loss_clips(objective: str) -> None:
    low, high = CLIP[objective]
    drawn = draw(6)
    advantages = drawn.tokens.advantages
    ratio = np.exp(drawn.logprobs - drawn.tokens.sampler_logprobs.numpy())
    for positive in (True, False):  # every side of the clip is in the draw
        chosen = ratio[(advantages.numpy() > 0) == positive]
        assert min((chosen < 1 - low).sum(), (chosen > 1 + high).sum()) > 3
    x = torch.from_numpy(drawn.logprobs).requires_grad_()
    loss = loss_of(objective)
    total(loss, x, torch.from_numpy(drawn.entropy), drawn).backward()
    found = loss.metrics((x.detach(), torch.from_numpy(drawn.entropy)), drawn.tokens)
    assert x.grad is not None
    cut = (ratio > 1 + high) | (ratio < 1 - low) if objective == "cispo" else (x.grad == 0).numpy()
    assert found["clip_fraction"] == Mean(int(cut.sum()), N) and cut.any()


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
def test_each_kl_estimator_follows_the_gradient_its_docstring_names(estimator: str) -> None:
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
@pytest.mark.parametrize("name", ["kl", "reference_kl"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_kl_term_is_aggregated_like_the_policy_term(
    estimator: str, name: str, aggregation: str
) -> None:
    drawn = draw(3)
    tokens = drawn.tokens
    other = tokens.sampler_logprobs if name == "kl" else tokens.reference_logprobs
    assert other is not None

    def reference(logprobs: np.ndarray) -> float:
        values = []
        for learner, fixed in zip(logprobs, other.tolist(), strict=True):
            # Drawn from q: the sampler's tokens, or (nearly) those of the policy that is trained.
            q, p = (fixed, learner) if name == "kl" else (learner, fixed)
            r = math.exp(p) / math.exp(q)
            values.append(
                {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - 1 - math.log(r)}[
                    estimator
                ]
            )
        return 0.3 * aggregated(values, aggregation)

    kind = {f"{name}_weight": 0.3, f"{name}_estimator": estimator}
    if name == "reference_kl" and estimator == "k1":
        with pytest.raises(ValidationError, match="k2"):  # its gradient is 0 on average
            loss_of(aggregation=aggregation, **kind)
        return
    loss = loss_of(aggregation=aggregation, **kind)
    x = torch.from_numpy(drawn.logprobs).requires_grad_()
    batch = TrainBatch(sequences_of(drawn))
    value = loss.sums((x, x), tokens)[name] / loss.denominators(batch)[name]
    assert float(value.detach()) == pytest.approx(reference(drawn.logprobs), rel=1e-12)
    assert_gradient(gradient(value, x), reference, drawn.logprobs)
    assert loss.uses_reference == (name == "reference_kl")
    assert loss_of(reference_kl_weight=0.0).sums((x, x), tokens).keys() == {"policy"}


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

    loss = loss_of(entropy_weight=0.01, entropy_weights=weights)
    assert loss.uses_entropy and not loss_of(entropy_weights={"answer": 0.0}).uses_entropy
    h = torch.from_numpy(drawn.entropy).requires_grad_()
    counts = loss.denominators(TrainBatch(sequences_of(drawn)))
    sums = loss.sums((torch.from_numpy(drawn.logprobs), h), drawn.tokens)
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
@settings(max_examples=40)
def test_no_split_into_micro_batches_changes_a_term(
    order: list[int], cuts: set[int], objective: str, aggregation: str
) -> None:
    drawn = draw(8)
    loss = loss_of(
        objective, aggregation=aggregation, entropy_weight=0.1, kl_weight=0.1,
        reference_kl_weight=0.2,
        entropy_weights=dict.fromkeys(SEGMENTS, 0.2), papo={"weight": 0.5, "entropy_weight": 0.3},
    )  # fmt: skip
    views = [drawn.logprobs, drawn.entropy, drawn.masked, drawn.masked_entropy]

    def terms(part: list[int]) -> dict[str, float]:
        at, tokens = of_part(drawn.tokens, part)
        plain, entropy, masked, masked_entropy = (torch.from_numpy(v[at]) for v in views)
        found = loss.sums((plain, entropy), tokens, (masked, masked_entropy))
        return {name: float(value) for name, value in found.items()}

    whole = terms(list(range(len(LENGTHS))))
    bounds = [0, *sorted(cuts), len(LENGTHS)]
    parts = [terms(list(order[a:b])) for a, b in pairwise(bounds)]
    assert whole.keys() == loss.denominators(TrainBatch(sequences_of(drawn))).keys()
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-10)


# --- PAPO ------------------------------------------------------------------------------------


def test_the_image_terms_are_papos() -> None:
    drawn, loss = draw(5), loss_of(papo=PAPO)
    expected = {"papo_kl": 0.0, "papo_entropy": 0.0, "papo_masked_entropy": 0.0}
    for lp, lm, h, hm in zip(
        drawn.logprobs, drawn.masked, drawn.entropy, drawn.masked_entropy, strict=True
    ):
        r = math.exp(lm) / math.exp(lp)
        expected["papo_kl"] -= 0.02 * (r - 1 - math.log(r))
        expected["papo_entropy"] += 0.03 * h
        expected["papo_masked_entropy"] += 0.03 * hm
    views = (drawn.logprobs, drawn.entropy, drawn.masked, drawn.masked_entropy)
    plain, entropy, *masked = map(torch.from_numpy, views)
    found = loss.sums((plain, entropy), drawn.tokens, (masked[0], masked[1]))
    assert {k: float(found.pop(k)) for k in expected} == pytest.approx(expected)
    assert found.keys() == loss_of().sums((plain, entropy), drawn.tokens).keys()
    assert loss.uses_entropy and not loss_of(papo={"weight": 0.02}).uses_entropy


def test_the_masked_view_has_the_gradient_of_its_own_entropy_and_kl(loaded: Loaded) -> None:
    policy, processor = loaded
    policy.eval()
    seen = sequence(processor, 0, (64, 64), 20)
    assert seen.images
    masked = replace(seen, images=tuple(mask_patches(i, 14, 0.6) for i in seen.images))
    parameters = list(policy.parameters())

    def gradients(value: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    loss = loss_of(papo=PAPO)

    def term(name: str) -> torch.Tensor:
        """A term's gradient through the masked view alone."""
        both = Collator(policy, processor)([seen, masked])
        logprobs, entropy = policy(both, entropy_gradient=True)
        plain, hidden = logprobs.chunk(2)
        seen_entropy, hidden_entropy = entropy.chunk(2)
        tokens = both.tokens.first(len(plain))
        first = (plain.detach(), seen_entropy.detach())
        terms = loss.sums(first, tokens, (hidden, hidden_entropy))
        return gradients(terms[name])

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


def test_a_sequence_without_an_image_depends_on_none(loaded: Loaded) -> None:
    policy, processor = loaded
    blind = mixed_batch(processor).sequences[2]
    micro = Collator(policy, processor)([blind, blind])
    with torch.no_grad():
        plain, masked = policy.eval().run(micro)[0].chunk(2)
    tokens = micro.tokens.first(len(plain))
    found = loss_of(papo={}).sums((plain, plain), tokens, (masked, masked))
    assert abs(float(found["papo_kl"])) < 1e-9
