"""λ of SFT and the gradient norms behind it, against plain autograd and across splits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.balance import Balance, SegmentGradients, ngdiff_weight, segment_gradients
from learner.batch import MicroBatch, TrainBatch
from learner.collate import Collator
from learner.losses import PERCEPTION, BalancedLoss, TokenMeanLoss
from learner.settings import SftConfig
from tests.support.plain import plain_logprobs
from tests.support.samples import Loaded, mixed_batch

POSITIVE = st.floats(1e-6, 1e6)


def sft(balance: str, **fields: Any) -> SftConfig:
    """A section that measures before every update and does not smooth, if nothing else is said."""
    plain = {"steps": 40, "balance": balance, "norm_every": 1, "norm_smoothing": 0.0}
    return SftConfig.model_validate(plain | fields)


def micro_batches(loaded: Loaded, batch: TrainBatch, cut: list[list[int]]) -> Any:
    collate = Collator(*loaded)

    def made() -> Iterator[MicroBatch]:
        for indices in cut:
            yield collate([batch.sequences[i] for i in indices])
        yield collate([batch.sequences[0]], weight=0.0)  # a filler

    return made()


def reference(
    loaded: Loaded, batch: TrainBatch
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """g_p and g_r by parameter, float64: the plain Hugging Face model, one sequence at a time."""
    policy, processor = loaded
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
    counts = [0, 0]
    for sequence in batch.sequences:
        logprobs = plain_logprobs(policy, processor, sequence)[0]
        seen = torch.from_numpy(sequence.segments == PERCEPTION)
        for part, chosen in enumerate((seen, ~seen)):
            losses[part] = losses[part] - logprobs[chosen].sum()
            counts[part] += int(chosen.sum())
    named = dict(policy.named_parameters())
    found = []
    for loss, count in zip(losses, counts, strict=True):
        parts = torch.autograd.grad(
            loss / count, list(named.values()), retain_graph=True, allow_unused=True
        )
        found.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(named.items(), parts, strict=True)
            }
        )
    return found[0], found[1]


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.flatten().double() for g in gradients.values()])


def test_norms_are_those_of_plain_autograd_whatever_the_split(loaded: Loaded) -> None:
    policy, processor = loaded
    batch = mixed_batch(processor)
    by_name = reference(loaded, batch)
    p, r = flat(by_name[0]), flat(by_name[1])
    cosine = float(p @ r / (p.norm() * r.norm()))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    random = torch.get_rng_state()
    whole, odd = [[0, 1, 2, 3, 4]], [[4, 2], [0], [3, 1]]
    for cut, keep_graph in ((whole, True), (odd, True), (odd, False)):
        micros = micro_batches(loaded, batch, cut)
        found = segment_gradients(policy, micros, batch, keep_graph=keep_graph)
        assert found.perception == pytest.approx(float(p.norm()), rel=1e-5)
        assert found.reasoning == pytest.approx(float(r.norm()), rel=1e-5)
        assert found.cosine == pytest.approx(cosine, abs=1e-5)
    assert all(q.grad is None for q in policy.parameters())
    assert all(torch.equal(tensor, before[n]) for n, tensor in policy.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    # A micro-batch's own norms would not do: they do not add up to the batch's.
    single = [
        segment_gradients(policy, micro_batches(loaded, batch, [[i]]), batch).perception
        for i in range(len(batch.sequences))
    ]
    assert sum(single) > 1.05 * float(p.norm())


def test_the_proxy_is_the_exact_gradient_of_the_heads_weight(loaded: Loaded) -> None:
    policy, processor = loaded
    batch = mixed_batch(processor)
    micros = micro_batches(loaded, batch, [[0, 1], [2, 3], [4]])
    found = segment_gradients(policy, micros, batch, of="head")
    model: Any = policy.model
    # A tied weight also gets a gradient as the embedding: give the head a weight of its own.
    head, tied = model.lm_head, model.lm_head.weight
    head.weight = torch.nn.Parameter(tied.detach().clone())
    try:
        exact = reference(loaded, batch)
        again = segment_gradients(policy, micro_batches(loaded, batch, [[0, 1, 2, 3, 4]]), batch)
    finally:
        head.weight = tied
    name = next(n for n in exact[0] if n.endswith("lm_head.weight"))
    assert found.perception == pytest.approx(float(exact[0][name].double().norm()), rel=1e-5)
    assert found.reasoning == pytest.approx(float(exact[1][name].double().norm()), rel=1e-5)
    # A proxy: a part of the whole gradient, and only a part.
    assert found.perception < 0.9 * again.perception
    assert found.reasoning < 0.9 * again.reasoning
    assert torch.is_grad_enabled() and not head._forward_pre_hooks


def test_the_gradient_of_the_balanced_loss_is_the_weighted_sum(loaded: Loaded) -> None:
    policy, processor = loaded
    batch = mixed_batch(processor)
    found = segment_gradients(policy, micro_batches(loaded, batch, [[0, 1, 2, 3, 4]]), batch)
    weight = ngdiff_weight(found.perception, found.reasoning)
    whole = Collator(*loaded)(batch.sequences)
    logprobs, entropy = policy.run(whole)
    loss = BalancedLoss(weight)
    counts = loss.denominators(batch)
    parts = loss.sums((logprobs, entropy), whole.tokens)
    total = torch.stack([value / counts[name] for name, value in parts.items()]).sum()
    gradients = torch.autograd.grad(total, list(policy.parameters()), allow_unused=True)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    # Both parts pull with equal norm e, at the angle that was measured.
    e = weight * found.perception
    assert norm == pytest.approx(e * math.sqrt(2 + 2 * found.cosine), rel=1e-4)


def test_the_normalised_sum_is_the_sum_of_unit_gradients(loaded: Loaded) -> None:
    policy, processor = loaded
    batch = mixed_batch(processor)
    found = segment_gradients(policy, micro_batches(loaded, batch, [[0, 1, 2, 3, 4]]), batch)
    balance = Balance(sft("ngdiff_sum"))
    balance.observe(1, found)
    loss = balance.loss(1, batch)
    logprobs, entropy = policy.run(whole := Collator(*loaded)(batch.sequences))
    counts = loss.denominators(batch)
    parts = loss.sums((logprobs, entropy), whole.tokens)
    total = torch.stack([value / counts[name] for name, value in parts.items()]).sum()
    names, parameters = zip(*policy.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    p, r = reference(loaded, batch)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            units = p[name] / found.perception + r[name] / found.reasoning
            assert torch.allclose(gradient, units.to(gradient.dtype), atol=1e-4), name


def test_only_the_normalised_sum_goes_on_once_a_part_is_solved() -> None:
    """Two quadratic losses on one vector each, one of them solved long before the other."""
    left = {}
    for rule in ("ngdiff", "ngdiff_sum"):
        balance = Balance(sft(rule))
        p, r = torch.tensor([1e-4, 0.0]), torch.tensor([3.0, 4.0])
        for step in range(1, 401):
            balance.observe(step, SegmentGradients(float(p.norm()), float(r.norm()), 0.0))
            loss = balance.loss(step, TrainBatch(()))
            assert isinstance(loss, BalancedLoss)
            rate = 0.01 * loss.scale
            p = p - rate * loss.perception_weight * p
            r = r - rate * (1 - loss.perception_weight) * r
        left[rule] = float(r.norm())
    assert left["ngdiff"] > 4.9 and left["ngdiff_sum"] == pytest.approx(1.0, abs=0.02)


def test_frozen_parameters_do_not_count(loaded: Loaded) -> None:
    policy, processor = loaded
    batch = mixed_batch(processor)
    p, r = reference(loaded, batch)
    kept = {n for n in p if "language_model" in n or "text_model" in n}
    assert 0 < len(kept) < len(p)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in kept)
    try:
        found = segment_gradients(policy, micro_batches(loaded, batch, [[0, 1, 2, 3, 4]]), batch)
    finally:
        policy.requires_grad_(True)
    for norm, by_name in ((found.perception, p), (found.reasoning, r)):
        expected = float(flat({n: by_name[n] for n in kept}).norm())
        assert norm == pytest.approx(expected, rel=1e-5)


@given(p=POSITIVE, r=POSITIVE, scale=st.floats(1e-3, 1e3))
@settings(max_examples=60)
def test_the_weight_gives_both_parts_equal_pull(p: float, r: float, scale: float) -> None:
    weight = ngdiff_weight(p, r)
    assert 0 <= weight <= 1
    assert weight * p == pytest.approx((1 - weight) * r, rel=1e-6, abs=1e-9 * r)
    assert weight == pytest.approx(ngdiff_weight(scale * p, scale * r))
    assert ngdiff_weight(r, p) == pytest.approx(1 - weight)
    assert ngdiff_weight(p, p) == 0.5


@given(
    norms=st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=8),
    smoothing=st.floats(0, 0.95),
)
@settings(max_examples=60)
def test_ngdiff_is_smoothed_and_the_last_measurement_alone_without(
    norms: list[tuple[float, float]], smoothing: float
) -> None:
    smooth = Balance(sft("ngdiff", norm_smoothing=smoothing))
    exact = Balance(sft("ngdiff"))
    batch = TrainBatch(())
    weights = [ngdiff_weight(p, r) for p, r in norms]
    average = weights[0]
    for step, (p, r) in enumerate(norms, 1):
        for balance in (smooth, exact):
            assert balance.measures(step)
            balance.observe(step, SegmentGradients(p, r, 0.0))
        if step > 1:
            average += (1 - smoothing) * (weights[step - 1] - average)
        assert smooth.weight_at(step, batch) == pytest.approx(average)
        assert exact.loss(step, batch) == BalancedLoss(weights[step - 1])
        # A batch without one of the parts says nothing about either.
        smooth.observe(step, SegmentGradients(0.0, r, 0.0))
        assert smooth.weight_at(step, batch) == pytest.approx(average)


@given(first=st.integers(0, 12), every=st.integers(1, 7))
@settings(max_examples=40)
def test_perception_first_and_then_the_rule(first: int, every: int) -> None:
    how = {"curriculum_share": first / 40, "curriculum_weight": 0.9, "norm_every": every}
    balance = Balance(sft("ngdiff", curriculum="perception_first", norm_smoothing=0.0, **how))
    measured = [step for step in range(1, 40) if balance.measures(step)]
    assert first + 1 in measured
    assert {b - a for a, b in pairwise(measured)} <= {every}
    for step in range(1, first + 1):
        balance.observe(step, SegmentGradients(1.0, 99.0, 0.0))
        assert balance.loss(step, TrainBatch(())) == BalancedLoss(0.9)
    balance.observe(first + 1, SegmentGradients(1.0, 3.0, 0.0))
    assert balance.loss(first + 1, TrainBatch(())) == BalancedLoss(0.75)


def test_the_other_rules(loaded: Loaded) -> None:
    batch = mixed_batch(loaded[1])
    seen = sum(int((s.segments == PERCEPTION).sum()) for s in batch.sequences)
    staged = {"curriculum": "perception_first", "curriculum_share": 2 / 40, "norm_every": 0}
    mean = Balance(sft("token_mean", **staged))
    assert mean.loss(2, batch) == BalancedLoss(1.0)
    assert mean.loss(3, batch) == TokenMeanLoss()
    assert mean.weight_at(3, batch) == seen / batch.response_tokens()
    assert not mean.measures(3)
    fixed = Balance(sft("fixed", perception_weight=0.3, norm_every=2))
    fixed.observe(1, SegmentGradients(1.0, 9.0, 0.0))
    assert fixed.loss(1, batch) == BalancedLoss(0.3)
