"""A packed row is its sequences one by one: same log-probs, losses and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from learner.batch import Layout, MicroBatch, TrainBatch, TrainSequence
from learner.losses import BalancedLoss, Loss, TokenMeanLoss
from learner.packing import KERNELS, Stretch, Stretches, attend_within_stretches, pack
from learner.plan import Costs, describe, plan_micro_batches
from learner.policy import Policy, keep_no_activations, load_policy, make_collator
from learner.policy_loss import PolicyLoss
from rollout.tokens import ModelError
from tests.learner.test_policy import plain_logprobs
from tests.support.samples import mixed_batch, off_policy, sequence

PACKED: tuple[Layout, ...] = tuple(x for x in get_args(Layout) if x != "padded")
GSPO = PolicyLoss(
    0.05, 0.08, objective="gspo", aggregation="sequence_mean", entropy_weights={"perception": 0.5}
)
LOSSES: dict[str, Loss] = {
    "token mean": TokenMeanLoss(),
    "balanced": BalancedLoss(0.9),
    "clip": PolicyLoss(entropy_weight=0.01),
    "gspo": GSPO,
}


def all_kinds(processor: Any) -> TrainBatch:
    """`mixed_batch`, and of one group an empty response, one of a token and another image's."""
    first, *others = mixed_batch(processor).sequences
    mates = [
        off_policy(
            replace(first, response_ids=first.response_ids[:n], segments=first.segments[:n]), n
        )
        for n in (0, 1, 25)
    ]
    stranger = replace(first, image=sequence(processor, 5, (64, 64), 9).image)
    return TrainBatch((mates[0], first, *others, *mates[1:], stranger))


@pytest.fixture(scope="module")
def own(model_path: str) -> tuple[Policy, Any]:
    """A policy that may be told to attend within stretches."""
    return load_policy(model_path)


def micro_batches(
    loaded: tuple[Policy, Any], batch: TrainBatch, layout: Layout, budget: int
) -> Iterator[MicroBatch]:
    collate = make_collator(*loaded, layout)
    items = [describe(s, collate.image_token_id) for s in batch.sequences]
    for indices in plan_micro_batches(items, 1, budget, layout, Costs())[0]:
        yield collate([batch.sequences[i] for i in indices])


def learn(
    loaded: tuple[Policy, Any], batch: TrainBatch, layout: Layout, loss: Loss, budget: int = 10**6
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch and its gradients."""
    policy, _ = loaded
    policy.zero_grad()
    total = 0.0
    for micro in micro_batches(loaded, batch, layout, budget):
        logprobs, entropy = policy(micro, entropy_gradient=loss.uses_entropy)
        counts = loss.denominators(batch)
        terms = loss.sums(logprobs, entropy, micro.tokens)
        value = sum((term / counts[name] for name, term in terms.items()), torch.zeros(()))
        value.backward()
        total += float(value.detach())
    found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return total, found


def assert_equal(
    found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]
) -> None:
    """To 1e-5 relative: the loss, and each parameter's gradient as a part of the whole."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected[1].values()))
    gap = math.sqrt(sum(float((found[1][n] - g).square().sum()) for n, g in expected[1].items()))
    assert gap < 1e-5 * norm
    for name, gradient in expected[1].items():
        # Own norms may be next to nothing (a key's bias does not matter to attention).
        bound = 1e-5 * float(gradient.norm()) + 1e-6 * norm
        assert float((found[1][name] - gradient).norm()) < bound, name


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("name", LOSSES)
def test_packed_equals_padded_in_loss_and_gradients(
    own: tuple[Policy, Any], name: str, layout: Layout
) -> None:
    batch = all_kinds(own[1])
    expected = learn(own, batch, "padded", LOSSES[name])
    assert_equal(learn(own, batch, layout, LOSSES[name]), expected)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_any_split_equals_the_whole(own: tuple[Policy, Any], layout: Layout) -> None:
    batch = all_kinds(own[1])
    whole = learn(own, batch, layout, GSPO)
    for budget in (1, 150, 300):
        assert len(list(micro_batches(own, batch, layout, budget))) > 1
        assert_equal(learn(own, batch, layout, GSPO, budget), whole)


@pytest.mark.parametrize("layout", PACKED)
def test_a_packed_row_gives_the_plain_models_log_probs(
    own: tuple[Policy, Any], layout: Layout
) -> None:
    policy, processor = own
    batch = all_kinds(processor)
    with torch.no_grad():
        found, _ = policy.run(make_collator(policy, processor, layout)(batch.sequences))
        expected = [plain_logprobs(policy, processor, s)[0] for s in batch.sequences]
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=0, atol=2e-5)


def test_what_is_shared_is_there_once(own: tuple[Policy, Any]) -> None:
    policy, processor = own
    sequences = all_kinds(processor).sequences
    padded = make_collator(policy, processor)(sequences)
    packed = make_collator(policy, processor, "packed")(sequences)
    shared = make_collator(policy, processor, "shared_prefix")(sequences)
    assert packed.inputs["input_ids"].shape == (1, packed.real_tokens)
    assert packed.real_tokens == padded.real_tokens and not packed.shared_tokens
    # Five sequences begin with one prompt and image; one of the same text has another image.
    assert shared.shared_tokens == 4 * len(sequences[0].prompt_ids)
    assert shared.real_tokens + shared.shared_tokens == packed.real_tokens
    assert len(shared.vision.images) == len(packed.vision.images) - 4
    for name in ("ids", "segments", "advantages", "sampler_logprobs", "sequences"):
        assert torch.equal(getattr(shared.tokens, name), getattr(padded.tokens, name))


def test_without_any_image_the_tower_runs_and_counts_for_nothing(
    own: tuple[Policy, Any],
) -> None:
    blind = mixed_batch(own[1]).sequences[2]
    loss, gradients = learn(own, TrainBatch((blind, blind)), "shared_prefix", TokenMeanLoss())
    tower = [g for n, g in gradients.items() if "vis" in n]
    assert len(tower) > 20 and not any(g.any() for g in tower)
    alone, _ = learn(own, TrainBatch((blind,)), "padded", TokenMeanLoss())
    assert loss == pytest.approx(alone, rel=1e-5)


def test_layers_that_are_run_again_for_their_gradient_give_the_same(model_path: str) -> None:
    """Activation checkpointing hands the stretches to a layer's second run too."""
    loaded = load_policy(model_path)
    loaded[0].train()
    batch = all_kinds(loaded[1])
    expected = learn(loaded, batch, "shared_prefix", GSPO)
    keep_no_activations(loaded[0])
    assert_equal(learn(loaded, batch, "shared_prefix", GSPO), expected)


def test_transformers_own_mask_for_packed_rows_gives_the_same(model_path: str) -> None:
    """Its block mask comes from positions that begin anew, a fourth plane before M-RoPE's three."""
    policy, processor = load_policy(model_path)
    sequences = all_kinds(processor).sequences[1:5]
    micro = make_collator(policy, processor, "packed")(sequences)
    with torch.no_grad():
        expected, _ = policy.run(micro)
        policy.model.get_decoder().config._attn_implementation = "sdpa"  # type: ignore[operator]
        counted = torch.cat(
            [torch.arange(len(s.prompt_ids) + len(s.response_ids) - 1) for s in sequences]
        )
        inputs = {n: v for n, v in micro.inputs.items() if n != "stretches"}
        if inputs["position_ids"].ndim == 3:
            inputs["position_ids"] = torch.cat([counted[None, None], inputs["position_ids"]])
        found, _ = policy.run(replace(micro, inputs=inputs))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("grouped", [1, 2])
def test_attention_of_stretches_is_that_of_the_definition(grouped: int) -> None:
    rng = np.random.default_rng(0)
    heads, size, length = 4, 8, 14
    stretches = (Stretch(0, 5), Stretch(5, 8, 0, 3), Stretch(8, 9), Stretch(9, 14, 0, 3))
    q = rng.normal(size=(heads, length, size))
    k, v = rng.normal(size=(2, heads // grouped, length, size))
    expected = np.zeros((length, heads, size))
    for s in stretches:
        for t in range(s.start, s.end):
            seen = [*range(s.prefix_start, s.prefix_end), *range(s.start, t + 1)]
            for h in range(heads):
                keys, values = k[h // grouped][seen], v[h // grouped][seen]
                weights = np.exp(keys @ q[h, t] / math.sqrt(size))
                expected[t, h] = weights @ values / weights.sum()
    attend: Any = AttentionInterface()[KERNELS["sdpa"]]
    module = SimpleNamespace(num_key_value_groups=grouped, is_causal=True)
    tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
    row = Stretches(stretches)
    found, _ = attend(module, *tensors, None, stretches=row, scaling=1 / math.sqrt(size))
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=0, atol=1e-12)


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
        min_size=1,
        max_size=5,
    ),
    shared=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_sequence_can_be_read_back_from_the_row(
    groups: list[tuple[int, list[int]]], shared: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    drawn = [
        (rng.integers(0, 99, p), rng.integers(0, 99, t), g)
        for g, (p, responses) in enumerate(groups)
        for t in responses
    ]
    by_group = {g: prompt for prompt, _, g in drawn}
    order = rng.permutation(len(drawn))
    prompts = [by_group[drawn[i][2]] for i in order]
    responses = [drawn[i][1] for i in order]
    keys = [drawn[i][2] if shared else i for i in order]
    row = pack(prompts, responses, keys)
    assert [s.start for s in row.stretches.items] == [0, *(s.end for s in row.stretches.items[:-1])]
    assert row.stretches.items[-1].end == len(row.ids)
    assert len(row.written) == len(set(keys))
    stretch_of = {t: s for s in row.stretches.items for t in range(s.start, s.end)}
    columns = iter(row.columns.tolist())
    for prompt, response in zip(prompts, responses, strict=True):
        for t in range(len(response)):
            column = next(columns)
            s = stretch_of[column]
            seen = [*range(s.prefix_start, s.prefix_end), *range(s.start, column + 1)]
            assert row.ids[seen].tolist() == [*prompt, *response[:t]]
            assert row.place[seen].tolist() == list(range(len(seen)))
    assert next(columns, None) is None


def test_attention_that_cannot_be_packed_is_refused(own: tuple[Policy, Any]) -> None:
    def model(**config: Any) -> Any:
        found = SimpleNamespace(_attn_implementation="sdpa", **config)
        return SimpleNamespace(get_decoder=lambda: SimpleNamespace(config=found))

    sliding = model(layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ModelError, match=r"sliding_attention layers.*learner\.layout"):
        attend_within_stretches(sliding)
    eager = model()
    eager.get_decoder().config._attn_implementation = "eager"
    with pytest.raises(ModelError, match=r"eager attention.*learner\.layout"):
        attend_within_stretches(eager)


def test_positions_are_made_once_for_each_prompt_of_a_batch(own: tuple[Policy, Any]) -> None:
    policy, processor = own
    collate = make_collator(policy, processor, "packed")
    made = []
    positions = collate._positions
    collate._positions = lambda *args: made.append(args) or positions(*args)  # type: ignore
    one, other = (sequence(processor, seed, (64, 64), 9) for seed in (0, 1))
    for _ in range(2):
        collate([one, other, one])
    assert len(made) == 2
    collate.forget()
    collate([one])
    assert len(made) == 3


def test_a_longer_response_after_a_picture_counts_on(own: tuple[Policy, Any]) -> None:
    """Positions are those the model itself would count over the whole sequence."""
    policy, processor = own
    model: Any = policy.model
    collate = make_collator(policy, processor, "shared_prefix")
    s: TrainSequence = sequence(processor, 1, (96, 64), 24)
    micro = collate([s])
    expected = torch.arange(micro.real_tokens)[None]
    if hasattr(model.model, "get_rope_index"):
        ids = micro.inputs["input_ids"]
        (image,) = collate.encode_images([s.image or b""])
        kinds = (ids == collate.image_token_id).int()
        found = model.model.get_rope_index(ids, kinds, image.inputs["image_grid_thw"])[0]
        expected = found
    assert torch.equal(micro.inputs["position_ids"], expected)
