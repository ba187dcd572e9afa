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
from learner.collate import Collator
from learner.loss_settings import EntropyWeights, LossConfig
from learner.losses import BalancedLoss, Loss, TokenMeanLoss
from learner.micro_batches import Costs, deal_micro_batches, describe
from learner.packing import KERNELS, Stretch, Stretches, attend_within_stretches, pack
from learner.policy import keep_no_activations, load_policy
from learner.policy_loss import PolicyLoss
from rollout.tokens import ModelError
from tests.support.plain import learn, plain_logprobs, summed
from tests.support.samples import Loaded, episode, mixed_batch, off_policy, sequence

PACKED: tuple[Layout, ...] = tuple(x for x in get_args(Layout) if x != "padded")
GSPO = PolicyLoss(
    LossConfig(
        loss="gspo", clip_low=0.05, clip_high=0.08, aggregation="sequence_mean",
        entropy_weights=EntropyWeights(perception=0.5),
    )
)  # fmt: skip
LOSSES: dict[str, tuple[float, Loss]] = {
    "token mean": (0.3, TokenMeanLoss()),
    "balanced": (0.7, BalancedLoss(0.9)),
    "clip": (1.3, PolicyLoss(LossConfig(entropy_weight=0.01))),
    "gspo": (2.1, GSPO),
}
"""By name, with a weight: a sum in which an error of one is no error of another."""


def all_kinds(processor: Any) -> TrainBatch:
    """`mixed_batch`; of one group an empty response, one of a token and another image's; episodes.

    Two of these begin alike and were shown other pictures later.
    """
    first, *others = mixed_batch(processor).sequences
    mates = [
        off_policy(
            replace(first, response_ids=first.response_ids[:n], segments=first.segments[:n]), n
        )
        for n in (0, 1, 25)
    ]
    stranger = replace(first, images=sequence(processor, 5, (64, 64), 9).images)
    one = episode(processor, 6, [(64, 64)], [(64, 96), (96, 64)], [], [(64, 64)])
    other = episode(processor, 6, [(64, 64)], [(96, 96)], length=5)
    assert one.prompt_ids.tobytes() == other.prompt_ids.tobytes()
    return TrainBatch((mates[0], one, first, *others, *mates[1:], stranger, other))


@pytest.fixture(scope="module")
def own(model_path: str) -> Loaded:
    """A policy that may be told to attend within stretches."""
    return load_policy(model_path)


def micro_batches(
    loaded: Loaded, batch: TrainBatch, layout: Layout, budget: int
) -> Iterator[MicroBatch]:
    collate = Collator(*loaded, layout)
    items = [describe(s, collate.image_token_id) for s in batch.sequences]
    for indices in deal_micro_batches(items, 1, budget, layout, Costs())[0]:
        yield collate([batch.sequences[i] for i in indices])


def learnt(
    loaded: Loaded, batch: TrainBatch, layout: Layout, budget: int = 10**6
) -> tuple[float, dict[str, torch.Tensor]]:
    """All of `LOSSES`, each by a weight of its own, of a batch; and the gradient."""
    policy, _ = loaded

    def value(micro: MicroBatch) -> torch.Tensor:
        seen = policy(micro, entropy_gradient=True)
        losses = [w * summed(loss, batch, micro, seen) for w, loss in LOSSES.values()]
        return torch.stack(losses).sum()

    return learn(policy, micro_batches(loaded, batch, layout, budget), value)


@pytest.fixture(scope="module")
def padded(own: Loaded) -> tuple[float, dict[str, torch.Tensor]]:
    """What all kinds of sequences give in one padded micro-batch."""
    return learnt(own, all_kinds(own[1]), "padded")


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


@pytest.mark.parametrize(
    ("layout", "budget"),
    (("padded", 150), ("packed", 10**6), ("packed", 300), ("shared_prefix", 10**6),
     ("shared_prefix", 1), ("shared_prefix", 150)),
)  # fmt: skip
def test_every_layout_and_split_equals_padded_in_losses_and_gradients(
    own: Loaded, padded: Any, layout: Layout, budget: int
) -> None:
    batch = all_kinds(own[1])
    split = len(list(micro_batches(own, batch, layout, budget)))
    assert split == 1 if budget == 10**6 else split > 1
    assert_equal(learnt(own, batch, layout, budget), padded)


@pytest.mark.parametrize("layout", PACKED)
def test_a_packed_row_gives_the_plain_models_log_probs(own: Loaded, layout: Layout) -> None:
    policy, processor = own
    batch = all_kinds(processor)
    with torch.no_grad():
        found, _ = policy.run(Collator(policy, processor, layout)(batch.sequences))
        expected = [plain_logprobs(policy, processor, s)[0] for s in batch.sequences]
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=0, atol=2e-5)


def varlen_by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch documents of `varlen_attn`, which CPUs have not: a causal window aligned to the
    last key, in stretches that end where `queries` and `keys` say."""
    assert window_size == (-1, 0) and q.dtype == k.dtype == v.dtype
    assert most_queries == int(queries.diff().max()) and most_keys == int(keys.diff().max())
    assert enable_gqa == (q.shape[1] != k.shape[1])
    parts = []
    for a, b, c, d in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        mine, before, values = q[a:b], k[c:d], v[c:d]
        share = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", mine, before.repeat_interleave(share, 1)) * scale
        offset = len(before) - len(mine)
        scores = scores + torch.full_like(scores, -math.inf).triu(offset + 1)
        read = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(share, 1))
        parts.append(read)
    return torch.cat(parts)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_torchs_flash_kernel_is_asked_for_what_sdpa_computes(
    model_path: str, padded: Any, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    flash = load_policy(model_path, attention="flash")
    assert_equal(learnt(flash, all_kinds(flash[1]), layout), padded)


def test_what_is_shared_is_there_once(own: Loaded) -> None:
    policy, processor = own
    sequences = all_kinds(processor).sequences
    padded = Collator(policy, processor)(sequences)
    packed = Collator(policy, processor, "packed")(sequences)
    shared = Collator(policy, processor, "shared_prefix")(sequences)
    assert packed.inputs["input_ids"].shape == (1, packed.real_tokens)
    assert packed.real_tokens == padded.real_tokens and not packed.shared_tokens
    # Five sequences begin with one prompt and image; one of the same text has another image. Two
    # episodes begin alike too.
    once = 4 * len(sequences[0].prompt_ids) + len(sequences[-1].prompt_ids)
    assert shared.shared_tokens == once
    assert shared.real_tokens + shared.shared_tokens == packed.real_tokens
    assert len(shared.vision.images) == len(packed.vision.images) - 5
    for name in ("ids", "segments", "advantages", "sampler_logprobs", "sequences"):
        assert torch.equal(getattr(shared.tokens, name), getattr(padded.tokens, name))


@pytest.mark.parametrize("layout", get_args(Layout))
def test_no_loss_has_a_gradient_on_the_logits_of_an_environments_token(
    own: Loaded, layout: Layout
) -> None:
    """The body is cut off, so a hidden state's gradient is that of its own logits alone."""
    policy, processor = own
    batch = all_kinds(processor)
    micro = Collator(policy, processor, layout)(batch.sequences)
    leaves: list[torch.Tensor] = []

    def cut(module: Any, given: Any, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state.detach().requires_grad_()
        leaves.append(out.last_hidden_state)
        return out

    expected = set[tuple[int, int]](zip(micro.rows.tolist(), micro.columns.tolist(), strict=True))
    handle = policy.model.model.register_forward_hook(cut)  # type: ignore[union-attr]
    try:
        for name, (_, loss) in LOSSES.items():
            value = summed(loss, batch, micro, policy(micro, entropy_gradient=True))
            value.backward()
            touched = leaves.pop().grad.abs().sum(-1).nonzero().tolist()  # type: ignore[union-attr]
            assert {(row, column) for row, column in touched} <= expected, name
            assert len(touched) > 0.9 * len(expected), name
    finally:
        handle.remove()
    said = [s.response_ids[s.targets] for s in batch.sequences]
    assert micro.tokens.ids.tolist() == np.concatenate(said).tolist()
    assert sum(len(s.response_ids) for s in batch.sequences) > 100 + len(micro.tokens.ids)


def test_without_any_image_the_tower_runs_and_counts_for_nothing(own: Loaded) -> None:
    blind = mixed_batch(own[1]).sequences[2]
    loss, gradients = learnt(own, TrainBatch((blind, blind)), "shared_prefix")
    tower = [g for n, g in gradients.items() if "vis" in n]
    assert len(tower) > 20 and not any(g.any() for g in tower)
    assert loss == pytest.approx(learnt(own, TrainBatch((blind,)), "padded")[0], rel=1e-5)


def test_layers_that_are_run_again_for_their_gradient_give_the_same(model_path: str) -> None:
    """Activation checkpointing hands the stretches to a layer's second run too."""
    loaded = load_policy(model_path)
    loaded[0].train()
    batch = all_kinds(loaded[1])
    expected = learnt(loaded, batch, "shared_prefix")
    keep_no_activations(loaded[0])
    assert_equal(learnt(loaded, batch, "shared_prefix"), expected)


def test_transformers_own_mask_for_packed_rows_gives_the_same(model_path: str) -> None:
    """Its block mask comes from positions that begin anew, a fourth plane before M-RoPE's three."""
    policy, processor = load_policy(model_path)
    sequences = all_kinds(processor).sequences[1:5]
    micro = Collator(policy, processor, "packed")(sequences)
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
@settings(max_examples=200)
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
    assert len(row.with_prompt) == len(set(keys))
    stretch_of = {t: s for s in row.stretches.items for t in range(s.start, s.end)}
    columns = iter(row.columns.tolist())
    for prompt, response in zip(prompts, responses, strict=True):
        for t in range(len(response)):
            column = next(columns)
            s = stretch_of[column]
            seen = [*range(s.prefix_start, s.prefix_end), *range(s.start, column + 1)]
            assert row.ids[seen].tolist() == [*prompt, *response[:t]]
            assert row.position[seen].tolist() == list(range(len(seen)))
    assert next(columns, None) is None


def test_attention_that_cannot_be_packed_is_refused(own: Loaded) -> None:
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


def test_positions_are_made_once_for_each_prompt_of_a_batch(
    own: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, processor = own
    collate = Collator(policy, processor, "packed")
    made = []
    positions = policy.family.positions
    counted = lambda *args: made.append(args) or positions(*args)  # noqa: E731
    monkeypatch.setattr(policy.family, "positions", counted)
    one, other = (sequence(processor, seed, (64, 64), 9) for seed in (0, 1))
    for _ in range(2):
        collate([one, other, one])
    assert len(made) == 2
    collate.forget()
    collate([one])
    assert len(made) == 3


def test_a_longer_response_after_a_picture_counts_on(own: Loaded) -> None:
    """Positions are those the model itself would count over the whole sequence."""
    policy, processor = own
    model: Any = policy.model
    collate = Collator(policy, processor, "shared_prefix")
    s: TrainSequence = sequence(processor, 1, (96, 64), 24)
    micro = collate([s])
    expected = torch.arange(micro.real_tokens)[None]
    if hasattr(model.model, "get_rope_index"):
        ids = micro.inputs["input_ids"]
        (image,) = collate.encode_images(s.images)
        kinds = (ids == collate.image_token_id).int()
        found = model.model.get_rope_index(ids, kinds, image.inputs["image_grid_thw"])[0]
        expected = found
    assert torch.equal(micro.inputs["position_ids"], expected)
