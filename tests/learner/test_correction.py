"""Off-policy correction against float64 loops written from the definitions, and against TRL's."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batch import Tokens
from learner.correction import (
    Correction,
    CorrectionKind,
    mismatch_statistics,
    mismatch_summary,
    with_old_logprobs,
)
from learner.policy import Policy, make_collator
from learner.policy_loss import Aggregation, Objective, PolicyLoss
from tasks.core import SEGMENTS
from tests.learner.test_policy_loss import (
    AGGREGATIONS,
    CLIP,
    LENGTHS,
    MAX_TOKENS,
    OBJECTIVES,
    SPANS,
    Draw,
    N,
    aggregated,
    assert_gradient,
    draw,
    gains,
    total,
)
from tests.support.samples import mixed_batch

KINDS: tuple[CorrectionKind, ...] = get_args(CorrectionKind)
BOUNDS = {
    "token_tis": (0.0, 1.3),
    "sequence_tis": (0.0, 1.5),
    "token_mask": (0.0, 1.4),
    "sequence_mask": (0.3, 2.0),
    "icepop": (0.7, 1.5),
    "geometric_mask": (0.93, 1.1),
}


def correction(kind: CorrectionKind) -> Correction:
    low, high = BOUNDS[kind]
    return Correction(kind, high, low)


def stale(seed: int, one_advantage: bool = False) -> Draw:
    """A draw that knows π_old, which is neither the sampler's policy nor the present one."""
    drawn = draw(seed, one_advantage)
    rng = np.random.default_rng([seed, 7])
    old = torch.from_numpy(drawn.logprobs - rng.normal(0, 0.15, N))
    return replace(drawn, tokens=replace(drawn.tokens, old_logprobs=old))


def weights(kind: CorrectionKind, old: list[float], sampler: list[float]) -> list[float]:
    """The definitions of the six kinds, a sequence and a token at a time."""
    low, high = BOUNDS[kind]
    found = []
    for span in SPANS:
        ratios = [math.exp(old[t]) / math.exp(sampler[t]) for t in span]
        product = math.prod(ratios)
        mean = product ** (1 / len(ratios))
        for ratio in ratios:
            found.append(
                {
                    "token_tis": min(ratio, high),
                    "sequence_tis": min(product, high),
                    "token_mask": ratio if ratio <= high else 0.0,
                    "sequence_mask": product if low <= product <= high else 0.0,
                    "icepop": ratio if low <= ratio <= high else 0.0,
                    "geometric_mask": 1.0 if low <= mean <= high else 0.0,
                }[kind]
            )
    return found


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_definitions(
    kind: CorrectionKind, objective: Objective, aggregation: Aggregation
) -> None:
    drawn = stale(OBJECTIVES.index(objective))
    assert drawn.tokens.old_logprobs is not None
    old, sampler = drawn.tokens.old_logprobs, drawn.tokens.sampler_logprobs
    expected = weights(kind, old.tolist(), sampler.tolist())
    # The objective's own ratio is against π_old: the reference sees it as the sampler.
    proximal = replace(drawn, tokens=replace(drawn.tokens, sampler_logprobs=old))

    def reference(logprobs: np.ndarray) -> float:
        values = gains(objective, logprobs, drawn.logprobs, proximal)
        return -aggregated([w * g for w, g in zip(expected, values, strict=True)], aggregation)

    loss = PolicyLoss(
        *CLIP[objective], 0, objective, aggregation, MAX_TOKENS, correction=correction(kind)
    )
    x = torch.from_numpy(drawn.logprobs).requires_grad_()
    value = total(loss, x, torch.from_numpy(drawn.entropy), drawn)
    assert float(value.detach()) == pytest.approx(reference(drawn.logprobs), rel=1e-12)
    value.backward()
    assert_gradient(x.grad, reference, drawn.logprobs)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_it_is_the_identity_in_value_and_gradient(
    kind: CorrectionKind, objective: Objective
) -> None:
    """Also of a second update, whose policy has moved on from the one that sampled."""
    for seed, moved in ((0, False), (1, True)):
        drawn = draw(seed)
        sampler = drawn.tokens.sampler_logprobs
        start = drawn.logprobs if moved else sampler.numpy()
        old = sampler if moved else None  # the first update has π_old from its own pass
        drawn = replace(drawn, tokens=replace(drawn.tokens, old_logprobs=old))
        found = []
        for chosen in (None, correction(kind), Correction(kind, 1.0, 0.0)):
            x = torch.from_numpy(start.copy()).requires_grad_()
            loss = PolicyLoss(*CLIP[objective], objective=objective, correction=chosen)
            value = total(loss, x, torch.from_numpy(drawn.entropy), drawn)
            value.backward()
            found.append((value.detach(), x.grad))
        for value, gradient in found[1:]:
            assert torch.equal(value, found[0][0])
            assert torch.equal(gradient, found[0][1])


def test_weights_change_who_drew_the_token_into_the_old_policy() -> None:
    """On average, over tokens drawn from the sampler, ρ_t f(t) is what π_old would have given."""
    rng = np.random.default_rng(0)
    sampler, old = rng.dirichlet(np.full(6, 5.0), 2)
    f = rng.normal(size=6)
    draws = torch.from_numpy(rng.choice(6, 200_000, p=sampler))
    gap = torch.log(torch.from_numpy(old / sampler))[draws]
    none = torch.zeros(len(draws))
    tokens = Tokens(draws, none, none, none, torch.arange(len(draws)))
    values = Correction("token_tis", 1e6).weights(gap, tokens) * torch.from_numpy(f)[draws]
    error = float(values.std()) / math.sqrt(len(draws))
    assert abs(float(values.mean()) - float(old @ f)) < 4 * error
    assert abs(float(sampler @ f) - float(old @ f)) > 10 * error


def test_a_long_sequence_far_off_neither_overflows_nor_trains() -> None:
    far = torch.full((N,), 60.0)
    tokens = draw(0).tokens
    for kind in KINDS:
        for sign in (1, -1):
            found = correction(kind).weights(sign * far, tokens)
            assert torch.isfinite(found).all() and (found <= BOUNDS[kind][1] + 1e-6).all()
            if ("mask" in kind and sign > 0) or kind == "icepop":
                assert not found.any()
            assert correction(kind).touched(far, tokens).all()
    with pytest.raises(ValueError, match="hold 1"):
        Correction("icepop", 0.9, 0.5)


@given(
    order=st.permutations(range(len(LENGTHS))),
    cuts=st.sets(st.integers(1, len(LENGTHS) - 1)),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_no_split_into_micro_batches_changes_loss_or_metrics(
    order: list[int], cuts: set[int], kind: CorrectionKind
) -> None:
    drawn = stale(8)
    loss = PolicyLoss(*CLIP["clip"], correction=correction(kind))

    def sums(part: list[int]) -> dict[str, float]:
        at = np.concatenate([np.arange(SPANS[i].start, SPANS[i].stop) for i in part])
        counts = torch.tensor([LENGTHS[i] for i in part])
        tokens = replace(
            drawn.tokens.map(lambda value: value[torch.from_numpy(at)]),
            sequences=torch.arange(len(part)).repeat_interleave(counts),
        )
        x = torch.from_numpy(drawn.logprobs[at])
        found = mismatch_statistics(x, tokens, loss.correction, SEGMENTS)
        return found | {"policy": float(loss.sums(x, x, tokens)["policy"])}

    whole = sums(list(range(len(LENGTHS))))
    bounds = [0, *sorted(cuts), len(LENGTHS)]
    parts = [sums(list(order[a:b])) for a, b in pairwise(bounds)]
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_tell_what_was_touched_and_what_the_sample_is_worth(kind: CorrectionKind) -> None:
    drawn = stale(3)
    assert drawn.tokens.old_logprobs is not None
    old, sampler = drawn.tokens.old_logprobs.tolist(), drawn.tokens.sampler_logprobs.tolist()
    x = torch.from_numpy(drawn.logprobs)
    found = mismatch_statistics(x, drawn.tokens, correction(kind), SEGMENTS)
    segments = drawn.tokens.segments.numpy()
    counts = {f"sum/tokens/{s}": float((segments == i).sum()) for i, s in enumerate(SEGMENTS)}
    metrics = mismatch_summary(found | counts, N, SEGMENTS)
    ratio = np.exp(np.array(old) - np.array(sampler))
    assert metrics["mismatch/k1"] == pytest.approx(np.mean(np.array(sampler) - np.array(old)))
    assert metrics["mismatch/k3"] == pytest.approx(np.mean(ratio - 1 - np.log(ratio)))
    answer = ratio[segments == 2]
    assert metrics["mismatch/k3/answer"] == pytest.approx(np.mean(answer - 1 - np.log(answer)))
    w = np.array(weights(kind, old, sampler))
    assert metrics["mismatch/effective_share"] == pytest.approx(
        ratio.mean() ** 2 / (ratio**2).mean()
    )
    assert metrics["correction/weight_mean"] == pytest.approx(w.mean())
    assert metrics["correction/effective_share"] == pytest.approx(w.mean() ** 2 / (w**2).mean())
    untruncated = np.array(
        ratio
        if kind in ("token_tis", "token_mask", "icepop")
        else [math.prod(ratio[list(span)]) for span in SPANS for _ in span]
    )
    changed = np.abs(w - untruncated) > 1e-9 if "tis" in kind else w == 0
    assert metrics["correction/touched_share"] == pytest.approx(changed.mean())
    assert 0 < changed.mean() < 1


def test_log_probs_of_the_old_policy_reach_the_loss_in_their_places(
    loaded: tuple[Policy, Any],
) -> None:
    policy, processor = loaded
    batch = mixed_batch(processor)
    old = [np.arange(len(s.response_ids), dtype=np.float32) + 100 * i
           for i, s in enumerate(batch.sequences)]  # fmt: skip
    collate = make_collator(policy, processor)
    assert collate(batch.sequences).tokens.old_logprobs is None
    micro = collate(with_old_logprobs(batch, old).sequences)
    assert micro.tokens.old_logprobs is not None
    np.testing.assert_array_equal(micro.tokens.old_logprobs.numpy(), np.concatenate(old))
    first = micro.tokens.first(7)
    assert first.old_logprobs is not None and len(first.old_logprobs) == 7
