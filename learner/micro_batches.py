"""Which rank learns from which sequences, in which micro-batches.

Costs are counted in text tokens: 1 is what one costs in the language model, attention left out.
R ranks, n sequences.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from learner.batch import Layout, TrainSequence
from learner.collate import EncodedImage, runs_of


@dataclass(frozen=True)
class Costs:
    """What parts of a forward pass cost, in text tokens.

    Attributes:
        pair: a token that attends to a token, in all layers.
        head: a response token at the LM head.
        visual: an image placeholder, its patches in vision tower and merger.
        micro_batch: what a micro-batch costs however small it is.
    """

    pair: float = 0.0
    head: float = 0.0
    visual: float = 0.0
    micro_batch: float = 64.0


def count_costs(policy: Any, image: EncodedImage) -> Costs:
    """The costs of a policy's parts by their weights: a token, or a patch, meets each once.

    `image` tells how many patches make a placeholder; attention within an image is left out. To be
    called before ZeRO-3 takes the weights away.
    """
    model, text = policy.model, policy.model.get_decoder()
    config, vision, head = text.config, model.config.vision_config, policy.model.lm_head
    weights: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            weights[policy.family.part_of(f"{name}.weight")] += module.weight.numel()
    token = weights["language"]
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    size = vision.patch_size
    area = size * size if isinstance(size, int) else math.prod(size)
    patch = 3 * area * getattr(vision, "temporal_patch_size", 1)
    patches = image.inputs["pixel_values"].numel() / patch
    return Costs(
        # Two multiplications a weight of a token, and of a pair: its score, and the sum by it.
        pair=2 * width * config.num_hidden_layers / token,
        head=head.in_features * head.out_features / token,
        visual=(weights["vision"] * patches / image.placeholders + weights["merger"]) / token,
    )


@dataclass(frozen=True)
class Item:
    """A sequence as far as its cost goes.

    Attributes:
        tokens: of the sequence, its last one, which is only a target, left out.
        prompt_tokens: those that other sequences of an equal `prompt` begin with too.
        visual_tokens: placeholders of its images.
        given_tokens: those of the response that are not to be predicted.
        prompt: equal where the prompt and its images are the same.
        images: a key of each image, in order; sequences of an equal prompt begin alike.
    """

    tokens: int
    prompt_tokens: int = 0
    visual_tokens: int = 0
    given_tokens: int = 0
    prompt: Hashable = None
    images: tuple[Hashable, ...] = ()

    @property
    def response_tokens(self) -> int:
        """Tokens to predict."""
        return self.tokens - self.prompt_tokens + 1 - self.given_tokens

    @property
    def visual(self) -> dict[Hashable, float]:
        """The placeholders of each image, as if they were alike."""
        return dict.fromkeys(self.images, self.visual_tokens / max(1, len(self.images)))


def describe(sequence: TrainSequence, image_token_id: int) -> Item:
    """The item of a training sequence."""
    prompt = sequence.prompt_ids
    prompt_images = len(runs_of(prompt == image_token_id))  # an image in tiles is several
    return Item(
        tokens=len(sequence.known),
        prompt_tokens=len(prompt),
        visual_tokens=int((sequence.known == image_token_id).sum()),
        given_tokens=int((~sequence.targets).sum()),
        prompt=(prompt.tobytes(), sequence.images[:prompt_images]),
        images=sequence.images,
    )


def row_tokens(items: Sequence[Item], layout: Layout) -> int:
    """Tokens that go through the language model when these are one micro-batch."""
    if layout == "padded":
        return len(items) * max((item.tokens for item in items), default=0)
    return sum(item.tokens for item in items) - _shared(items, layout, 1)


def load(items: Sequence[Item], layout: Layout, costs: Costs) -> float:
    """What one micro-batch of these costs, in text tokens, without what every one costs."""
    images: dict[Hashable, float] = {}
    for item in items:
        images |= item.visual
    if layout == "padded":
        squares = len(items) * max((item.tokens for item in items), default=0) ** 2
    else:
        squares = sum(item.tokens**2 for item in items) - _shared(items, layout, 2)
    return (
        row_tokens(items, layout)
        + costs.pair * squares / 2
        + costs.head * sum(item.response_tokens for item in items)
        + costs.visual * sum(images.values())
    )


def _shared(items: Sequence[Item], layout: Layout, power: int) -> int:
    """What prompts that are there once save, in tokens or in their squares."""
    if layout != "shared_prefix":
        return 0
    once = {item.prompt: item.prompt_tokens for item in items}
    return sum(i.prompt_tokens**power for i in items) - sum(n**power for n in once.values())


def deal_micro_batches(
    items: Sequence[Item], ranks: int, token_budget: int, layout: Layout, costs: Costs
) -> list[list[list[int]]]:
    """Indices of each micro-batch of each rank: `[rank][micro-batch] -> sequence indices`.

    Ranks are dealt like loads, by cost. What shares images or a prompt stays on one rank, unless
    the ranks are more alike, and the last of them is done sooner, where it is divided. The
    slowest rank has at most the mean cost plus that of one sequence.

    A micro-batch has at most `token_budget` tokens, padding included, or one longer sequence.
    Every rank gets the same number of micro-batches, as collectives need; where sequences run
    out the list is empty, and the rank runs a filler of weight zero. An index appears once.
    """
    of_ranks = _deal(items, ranks, layout, costs)
    if layout == "padded":
        shares = [
            _cut_by_length(items, itertools.chain(*units), token_budget, costs)
            for units in of_ranks
        ]
    else:
        shares = [_fill(items, units, token_budget, layout) for units in of_ranks]
    most = max(len(batches) for batches in shares)
    return [batches + [[] for _ in range(most - len(batches))] for batches in shares]


def _deal(items: Sequence[Item], ranks: int, layout: Layout, costs: Costs) -> list[list[list[int]]]:
    """The units of each rank: sequences that share their images or a prompt, or a part of them.

    The longest-processing-time rule (Graham 1969) for whole groups, their halves, quarters, ...
    down to single sequences; of these, the one whose slowest rank is fastest.
    """
    # What pads is known only when micro-batches are cut; ranks are compared without it.
    counted_layout: Layout = "packed" if layout == "padded" else layout
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        key = item.images[:1] or (item.prompt if layout == "shared_prefix" else None) or index
        groups.setdefault(key, []).append(index)
    size = max((len(group) for group in groups.values()), default=1)
    best: tuple[float, list[list[list[int]]]] = (float("inf"), [[] for _ in range(ranks)])
    while size:
        units = [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]
        cost = [load([items[i] for i in unit], counted_layout, costs) for unit in units]
        loads, of_ranks = [0.0] * ranks, [list[list[int]]() for _ in range(ranks)]
        for unit_index in sorted(range(len(units)), key=lambda u: (-cost[u], units[u])):
            rank = min(range(ranks), key=lambda r: (loads[r], r))
            loads[rank] += cost[unit_index]
            of_ranks[rank].append(units[unit_index])
        if max(loads) < best[0]:
            best = (max(loads), of_ranks)
        size = 0 if ranks == 1 else size // 2
    return best[1]


def _cut_by_length(
    items: Sequence[Item], indices: Iterable[int], budget: int, costs: Costs
) -> list[list[int]]:
    """Micro-batches of like lengths: of all cuts of the sequences by length, the cheapest."""
    order = sorted(indices, key=lambda i: (-items[i].tokens, i))
    # least[k]: cost of the first k, and where the last of their micro-batches begins.
    least: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(order) + 1):
        cheapest, images = (float("inf"), 0), dict[Hashable, float]()
        for start in range(end - 1, -1, -1):
            item = items[order[start]]
            count, width = end - start, item.tokens
            if count > 1 and count * width > budget:
                break
            images |= item.visual
            visual = costs.visual * sum(images.values())
            cost = count * width * (1 + costs.pair * width / 2) + visual
            cheapest = min(cheapest, (least[start][0] + cost + costs.micro_batch, start))
        least.append(cheapest)
    batches, end = [], len(order)
    while end:
        start = least[end][1]
        batches.append(order[start:end])
        end = start
    return batches[::-1]


def _fill(
    items: Sequence[Item], units: Iterable[list[int]], budget: int, layout: Layout
) -> list[list[int]]:
    """As few rows as first fit decreasing finds; units are divided only if too long for a row."""
    parts: list[list[int]] = []
    for unit in units:
        parts.append([])
        for index in unit:
            if parts[-1] and row_tokens([items[i] for i in [*parts[-1], index]], layout) > budget:
                parts.append([])
            parts[-1].append(index)
    sizes = [row_tokens([items[i] for i in part], layout) for part in parts]
    rows: list[list[int]] = []
    room: list[int] = []
    for part_index in sorted(range(len(parts)), key=lambda p: (-sizes[p], parts[p])):
        row = next((r for r, free in enumerate(room) if free >= sizes[part_index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row] += parts[part_index]
        room[row] -= sizes[part_index]
    return rows
