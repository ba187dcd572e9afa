"""Micro-batches: every sequence once, in budget, ranks alike; padding on the tasks' own lengths."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import layouts
from learner.batch import Layout, TrainSequence
from learner.collate import Collator
from learner.micro_batches import (
    Costs,
    Item,
    count_costs,
    deal_micro_batches,
    describe,
    load,
    row_tokens,
)
from learner.policy import load_policy
from learner.sft import Demonstrator
from tests.support.samples import TASK, Loaded, mixed_batch, problem

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
COSTS = Costs(pair=0.002, head=0.1, visual=2.5)


def group(number: int, prompt: int, visual: int | None, responses: list[int]) -> list[Item]:
    """Items of one prompt, with an image of `visual` tokens or none."""
    images = () if visual is None else (f"image {number}",)
    make = partial(Item, prompt_tokens=prompt, prompt=number, images=images)
    return [make(tokens=prompt + t, visual_tokens=visual or 0) for t in responses]


def drawn(sizes: list[tuple[int, int | None, list[int]]]) -> list[Item]:
    return [item for n, (p, v, r) in enumerate(sizes) for item in group(n, p, v, r)]


BATCHES = st.lists(
    st.tuples(
        st.integers(1, 120),
        st.none() | st.integers(1, 64),
        st.lists(st.integers(0, 300), min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=10,
).map(drawn)


def rank_costs(items: list[Item], plan: list[list[list[int]]], layout: Layout) -> list[float]:
    return [sum(load([items[i] for i in b], layout, COSTS) for b in batches) for batches in plan]


@given(items=BATCHES, ranks=st.integers(1, 4), budget=st.integers(1, 3000))
@settings(max_examples=200)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sequence_is_dealt_once_within_the_budget(
    layout: Layout, items: list[Item], ranks: int, budget: int
) -> None:
    plan = deal_micro_batches(items, ranks, budget, layout, COSTS)
    assert len(plan) == ranks
    assert sorted(i for batches in plan for b in batches for i in b) == list(range(len(items)))
    assert len({len(batches) for batches in plan}) == 1
    for batch in (b for batches in plan for b in batches):
        assert len(batch) <= 1 or row_tokens([items[i] for i in batch], layout) <= budget
    if layout != "padded" and sum(item.tokens for item in items) <= budget:
        assert len(plan[0]) == 1
    assert plan == deal_micro_batches(items, ranks, budget, layout, COSTS)


@given(items=BATCHES, ranks=st.integers(1, 4))
@settings(max_examples=200)
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_no_rank_waits_longer_than_for_one_sequence(
    layout: Layout, items: list[Item], ranks: int
) -> None:
    plan = deal_micro_batches(items, ranks, 10**9, layout, COSTS)
    alone = [load([item], layout, COSTS) for item in items]
    assert max(rank_costs(items, plan, layout)) <= sum(alone) / ranks + max(alone) + 1e-6


@given(items=BATCHES.filter(lambda items: len(items) <= 7))
@settings(max_examples=60)
def test_the_slowest_rank_is_near_the_best_there_is(items: list[Item]) -> None:
    plan = deal_micro_batches(items, 2, 10**9, "shared_prefix", COSTS)
    everyone = range(len(items))
    best = min(
        max(
            load([items[i] for i in part], "shared_prefix", COSTS)
            for part in (chosen, set(everyone) - set(chosen))
        )
        for size in everyone
        for chosen in itertools.combinations(everyone, size)
    )
    # 7/6 is what the rule promises of two ranks where nothing is shared (Graham 1969).
    assert max(rank_costs(items, plan, "shared_prefix")) <= 1.34 * best + 1e-6


def test_groups_stay_together_where_that_pays_and_are_divided_where_it_does_not() -> None:
    many = drawn([(60, 16, [90] * 8)] * 6)
    for batches in deal_micro_batches(many, 2, 10**9, "shared_prefix", COSTS):
        assert len({many[i].prompt for b in batches for i in b}) == 3
    one = drawn([(60, 16, [90] * 8)])
    halves = deal_micro_batches(one, 2, 10**9, "shared_prefix", COSTS)
    assert [sum(map(len, batches)) for batches in halves] == [4, 4]


def test_images_and_long_sequences_count_in_dealing() -> None:
    seeing = drawn([(60, 40, [50])] * 2 + [(60, None, [50])] * 2)
    for batches in deal_micro_batches(seeing, 2, 10**9, "packed", COSTS):
        assert sum(seeing[i].visual_tokens for b in batches for i in b) == 40
    # As many tokens as the two others, but twice the attention.
    long = drawn([(1, None, [2000]), (1, None, [999]), (1, None, [1000]), (1, None, [500])])
    (first, *_), (second, *_) = deal_micro_batches(long, 2, 10**9, "packed", COSTS)
    assert {tuple(sorted(first)), tuple(sorted(second))} == {(0,), (1, 2, 3)}


def test_a_cut_by_length_is_the_cheapest_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        items = drawn([(int(p), 4, [int(r)]) for p, r in rng.integers(1, 200, (8, 2))])
        order = sorted(range(8), key=lambda i: (-items[i].tokens, i))
        budget = int(rng.integers(200, 1500))

        def cost(cut: list[list[int]], items: list[Item] = items) -> float:
            # The head does not depend on the cut.
            each = [load([items[i] for i in b], "padded", COSTS) + COSTS.micro_batch for b in cut]
            return sum(each)

        cuts = []
        for bits in itertools.product([False, True], repeat=7):
            at = [0, *(i + 1 for i, bit in enumerate(bits) if bit), 8]
            cut = [order[a:b] for a, b in itertools.pairwise(at)]
            if all(
                len(b) == 1 or row_tokens([items[i] for i in b], "padded") <= budget for b in cut
            ):
                cuts.append(cost(cut))
        (found,) = deal_micro_batches(items, 1, budget, "padded", COSTS)
        assert cost(found) == pytest.approx(min(cuts))


def test_costs_are_those_of_the_arithmetic_that_is_done(loaded: Loaded) -> None:
    policy, processor = loaded
    model: Any = policy.model
    blank = Collator(policy, processor).blank
    costs = count_costs(policy, blank)
    text = model.get_decoder()

    def operations(work: Callable[[], object]) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def read(length: int) -> int:
        return operations(
            lambda: text(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
        )

    token = read(100) / 100
    kernel = text.config._attn_implementation
    try:
        text.config._attn_implementation = "eager"  # whose scores are counted
        pairs = read(100) / token - 100
    finally:
        text.config._attn_implementation = kernel
    assert costs.pair == pytest.approx(pairs / 100**2, rel=1e-6)
    hidden = torch.zeros(1, 128)
    assert costs.head == pytest.approx(operations(lambda: model.lm_head(hidden)) / token)
    seen = operations(lambda: policy.family.image_features(model, blank.inputs))
    assert costs.visual == pytest.approx(seen / blank.placeholders / token, rel=0.02)


def test_an_item_is_its_sequence(loaded: Loaded) -> None:
    policy, processor = loaded
    collate = Collator(policy, processor)
    sequences = mixed_batch(processor).sequences
    items = [describe(s, collate.image_token_id) for s in sequences]
    micro = collate(sequences)
    assert sum(item.tokens for item in items) == micro.real_tokens
    assert sum(item.response_tokens for item in items) == len(micro.tokens.ids)
    assert [item.visual_tokens for item in items] == [
        sum(image.placeholders for image in collate.encode_images(s.images)) for s in sequences
    ]
    first, *_, mate = items
    assert (first.prompt, first.images) == (mate.prompt, mate.images)
    other = describe(
        Demonstrator(processor).sequence(TASK, problem(7), TASK.demonstrate(problem(7), "terse")),
        collate.image_token_id,
    )
    assert other.images != first.images


@pytest.fixture(scope="module")
def shipped() -> Loaded:
    return load_policy(layouts.MODEL)


@pytest.fixture(scope="module")
def own_lengths(shipped: Loaded) -> dict[str, list[TrainSequence]]:
    """Both tasks, terse and verbose, as rollouts of groups and as demonstrations."""
    return layouts.batches(shipped[1], problems=16)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_is_under_5_percent_on_the_tasks_own_lengths(
    shipped: Loaded, own_lengths: dict[str, list[TrainSequence]], layout: Layout, ranks: int
) -> None:
    policy, processor = shipped
    collate = Collator(policy, processor, layout)
    costs = count_costs(policy, collate.blank)
    for name, batch in own_lengths.items():
        items = [describe(s, collate.image_token_id) for s in batch]
        plan = deal_micro_batches(items, ranks, 8192, layout, costs)
        made = [collate([batch[i] for i in b]) for share in plan for b in share if b]
        there = sum(micro.inputs["input_ids"].numel() for micro in made)
        assert 1 - sum(micro.real_tokens for micro in made) / there <= 0.05, name
        loads = [sum(load([items[i] for i in b], layout, costs) for b in share) for share in plan]
        assert max(loads) <= 1.05 * sum(loads) / ranks, name
