"""Off-policy correction against float64 loops written from the definitions, and against TRL's."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batch import Tokens, TrainBatch
from learner.collate import Collator
from learner.correction import (
    correction_weights,
    mismatch_metrics,
    touched,
    with_old_logprobs,
)
from learner.loss_settings import CorrectionConfig
from learner.metrics import Metric, Total, combined, values
from tests.support.equations import (
    AGGREGATIONS,
    LENGTHS,
    OBJECTIVES,
    SPANS,
    Draw,
    N,
    aggregated,
    assert_gradient,
    draw,
    gains,
    loss_of,
    of_part,
    total,
)
from tests.support.samples import Loaded, episode, mixed_batch

BOUNDS = {
    "token_tis": (0.0, 1.3),
    "sequence_tis": (0.0, 1.5),
    "token_mask": (0.0, 1.4),
    "sequence_mask": (0.3, 2.0),
    "icepop": (0.7, 1.5),
    "geometric_mask": (0.93, 1.1),
}
KINDS = tuple(BOUNDS)


def correction(kind: str, low: float | None = None, high: float | None = None) -> CorrectionConfig:
    """With the bounds of `BOUNDS`, or others."""
    own = BOUNDS[kind]
    bounds = {"low": own[0] if low is None else low, "high": high or own[1]}
    return CorrectionConfig.model_validate({"kind": kind, **bounds})


def stale(seed: int, one_advantage: bool = False) -> Draw:
    """A draw that knows π_old, which is neither the sampler's policy nor the present one."""
    drawn = draw(seed, one_advantage)
    rng = np.random.default_rng([seed, 7])
    old = torch.from_numpy(drawn.logprobs - rng.normal(0, 0.15, N))
    return replace(drawn, tokens=replace(drawn.tokens, old_logprobs=old))


def weights(kind: str, old: list[float], sampler: list[float]) -> list[float]:
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
    kind: str, objective: str, aggregation: str
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

    loss = loss_of(objective, aggregation=aggregation, correction=correction(kind))
    x = torch.from_numpy(drawn.logprobs).requires_grad_()
    value = total(loss, x, torch.from_numpy(drawn.entropy), drawn)
    assert float(value.detach()) == pytest.approx(reference(drawn.logprobs), rel=1e-12)
    value.backward()
    assert_gradient(x.grad, reference, drawn.logprobs)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_it_is_the_identity_in_value_and_gradient(kind: str, objective: str) -> None:
    """Also of a second update, whose policy has moved on from the one that sampled."""
    for seed, moved in ((0, False), (1, True)):
        drawn = draw(seed)
        sampler = drawn.tokens.sampler_logprobs
        start = drawn.logprobs if moved else sampler.numpy()
        old = sampler if moved else None  # the first update has π_old from its own pass
        drawn = replace(drawn, tokens=replace(drawn.tokens, old_logprobs=old))
        found = []
        for chosen in (CorrectionConfig(), correction(kind), correction(kind, low=0.0, high=1.0)):
            x = torch.from_numpy(start.copy()).requires_grad_()
            value = total(
                loss_of(objective, correction=chosen), x, torch.from_numpy(drawn.entropy), drawn
            )
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
    weight = correction_weights(correction("token_tis", high=1e6), gap, tokens)
    weighed = weight * torch.from_numpy(f)[draws]
    error = float(weighed.std()) / math.sqrt(len(draws))
    assert abs(float(weighed.mean()) - float(old @ f)) < 4 * error
    assert abs(float(sampler @ f) - float(old @ f)) > 10 * error


def test_a_long_sequence_far_off_neither_overflows_nor_trains() -> None:
    far = torch.full((N,), 60.0)
    tokens = draw(0).tokens
    for kind in KINDS:
        for sign in (1, -1):
            found = correction_weights(correction(kind), sign * far, tokens)
            assert torch.isfinite(found).all() and (found <= BOUNDS[kind][1] + 1e-6).all()
            if ("mask" in kind and sign > 0) or kind == "icepop":
                assert not found.any()
            assert touched(correction(kind), far, tokens).all()


@given(
    order=st.permutations(range(len(LENGTHS))),
    cuts=st.sets(st.integers(1, len(LENGTHS) - 1)),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=30)
def test_no_split_into_micro_batches_changes_loss_or_metrics(
    order: list[int], cuts: set[int], kind: str
) -> None:
    drawn = stale(8)
    loss = loss_of(correction=correction(kind))

    def told(part: list[int]) -> dict[str, Metric]:
        at, tokens = of_part(drawn.tokens, part)
        x = torch.from_numpy(drawn.logprobs[at])
        return loss.metrics((x, x), tokens) | {
            "policy": Total(float(loss.sums((x, x), tokens)["policy"]))
        }

    whole = told(list(range(len(LENGTHS))))
    bounds = [0, *sorted(cuts), len(LENGTHS)]
    parts = combined(told(list(order[a:b])) for a, b in pairwise(bounds))
    assert values(parts) == pytest.approx(values(whole), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_tell_what_was_touched_and_what_the_sample_is_worth(kind: str) -> None:
    drawn = stale(3)
    assert drawn.tokens.old_logprobs is not None
    old, sampler = drawn.tokens.old_logprobs.tolist(), drawn.tokens.sampler_logprobs.tolist()
    x = torch.from_numpy(drawn.logprobs)
    metrics = values(mismatch_metrics(x, drawn.tokens, correction(kind)))
    segments = drawn.tokens.segments.numpy()
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


def test_log_probs_of_the_old_policy_reach_the_loss_in_their_places(loaded: Loaded) -> None:
    policy, processor = loaded
    turns = episode(processor, 6, [(64, 64)], [(64, 96)], [])
    batch = TrainBatch((turns, *mixed_batch(processor).sequences))
    old = [np.arange(s.targets.sum(), dtype=np.float32) + 100 * i
           for i, s in enumerate(batch.sequences)]  # fmt: skip
    collate = Collator(policy, processor)
    assert collate(batch.sequences).tokens.old_logprobs is None
    micro = collate(with_old_logprobs(batch, old).sequences)
    assert micro.tokens.old_logprobs is not None
    np.testing.assert_array_equal(micro.tokens.old_logprobs.numpy(), np.concatenate(old))
    first = micro.tokens.first(7)
    assert first.old_logprobs is not None and len(first.old_logprobs) == 7
