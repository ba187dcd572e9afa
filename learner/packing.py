"""Several sequences in one row: where each lies, and attention that stays within each.

Shapes: L tokens of a row, P prompt tokens, T response tokens, N response tokens of all sequences,
H query heads, K key heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rollout.tokens import ModelError


@dataclass(frozen=True)
class Stretch:
    """Neighbours in a row that belong to one sequence: tokens `start` to `end`, the last excluded.

    Where `prefix_end > prefix_start`, the sequence begins with those tokens of the row, which other
    sequences begin with too.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


class Varlen(NamedTuple):
    """The rows of all keys; where each stretch's queries and keys end, from 0; the longest."""

    rows: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class Stretches:
    """The stretches of a row in its order, and what attention needs of them, made once for all
    layers: a mask is kept for the backward pass."""

    items: tuple[Stretch, ...]
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def mask(self, queries: int, before: int, like: torch.Tensor) -> torch.Tensor:
        """[1, 1, queries, before + queries], to be added to scores: 0 up to a query's own key."""
        if (queries, before) not in self._cache:
            hidden = like.new_full((1, 1, queries, before + queries), -math.inf)
            self._cache[queries, before] = hidden.triu(before + 1)
        mask: torch.Tensor = self._cache[queries, before]
        return mask

    def varlen(self, device: torch.device) -> Varlen:
        """What FlashAttention's kernel asks for."""
        if "varlen" not in self._cache:
            rows = [np.r_[s.prefix_start : s.prefix_end, s.start : s.end] for s in self.items]
            queries, keys = [s.end - s.start for s in self.items], [len(of) for of in rows]
            self._cache["varlen"] = Varlen(
                torch.from_numpy(np.concatenate(rows)).to(device),
                torch.tensor(np.cumsum([0, *queries]), dtype=torch.int32, device=device),
                torch.tensor(np.cumsum([0, *keys]), dtype=torch.int32, device=device),
                max(queries),
                max(keys),
            )
        varlen: Varlen = self._cache["varlen"]
        return varlen


@dataclass(frozen=True)
class PackedRow:
    """Sequences laid end to end.

    Attributes:
        ids: int64 [L].
        sequence, position: int64 [L], which sequence a token was laid for and how many tokens come
            before it there.
        columns: int64 [N], the token that predicts each response token, in sequence order.
        stretches: they cover the row.
        with_prompt: the sequences whose prompts are in the row, in its order; others share theirs.
    """

    ids: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    columns: np.ndarray
    stretches: Stretches
    with_prompt: tuple[int, ...]


def pack(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], keys: Sequence[Hashable]
) -> PackedRow:
    """Lay out sequences; those of an equal key share the prompt of the first of them.

    The last token of a response is only ever a target and is left out.
    """
    ids, sequence, position = [], [], []
    columns, stretches, with_prompt = [], [], []
    prompt_at: dict[Hashable, tuple[int, int]] = {}
    end = 0
    for index, (prompt, response, key) in enumerate(zip(prompts, responses, keys, strict=True)):
        inputs = response[:-1]
        start, row_tokens = end, inputs
        if key not in prompt_at:
            prompt_at[key] = (start, start + len(prompt))
            with_prompt.append(index)
            row_tokens = np.concatenate([prompt, inputs])
        first, last = prompt_at[key]
        end = start + len(row_tokens)
        if end > start:
            shared = (first, last) if first != start else (0, 0)
            stretches.append(Stretch(start, end, *shared))
        ids.append(row_tokens)
        sequence.append(np.full(len(row_tokens), index))
        position.append(np.arange(len(row_tokens)) + len(prompt) + len(inputs) - len(row_tokens))
        if len(response):
            columns.append(np.append(last - 1, np.arange(end - len(inputs), end)))
    return PackedRow(
        np.concatenate(ids).astype(np.int64),
        np.concatenate(sequence),
        np.concatenate(position),
        np.concatenate([np.zeros(0, np.int64), *columns]),
        Stretches(tuple(stretches)),
        tuple(with_prompt),
    )


def attend_within_stretches(model: Any) -> None:
    """Let the language model of `model` take `stretches`; without them it attends as before.

    Raises ModelError where its attention is not plain causal attention by a kernel known here.
    """
    config = model.get_decoder().config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ModelError(
            f"a {type(model).__name__} has {', '.join(sorted(kinds))} layers; packed rows know "
            'full attention only: write learner.layout = "padded"'
        )
    kernel = config._attn_implementation
    if kernel in KERNELS.values():
        return
    if kernel not in KERNELS:
        raise ModelError(
            f"{kernel} attention does not take packed rows; write learner.layout = "
            f'"padded", or model.attention = "sdpa" or "flash"'
        )
    config._attn_implementation = KERNELS[kernel]


def _sdpa(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    stretches: Stretches | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa` of query [1, H, L, D], key and value [1, K, L, D], stretch by stretch.

    A call a stretch costs what its own length does, without padding. One call with a block mask
    over the whole row would cost the square of the row.
    """
    if stretches is None:
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return attended, None
    # Split, not sliced: the gradient of a slice is a whole row of zeros, one a sequence.
    lengths = [s.end - s.start for s in stretches.items]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    at = {s.start: index for index, s in enumerate(stretches.items)}
    prefixes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    parts = []
    for s, q, k, v in zip(stretches.items, queries, keys, values, strict=True):
        mask, before = None, s.prefix_end - s.prefix_start
        if before:
            if s.prefix_start not in prefixes:
                owner = at[s.prefix_start]
                prefixes[s.prefix_start] = keys[owner][:, :, :before], values[owner][:, :, :before]
            first_keys, first_values = prefixes[s.prefix_start]
            k, v = torch.cat([first_keys, k], dim=2), torch.cat([first_values, v], dim=2)
            mask = stretches.mask(q.shape[2], before, q)
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(parts, dim=1), None


def _flash(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    stretches: Stretches | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The same in one call of torch's own FlashAttention kernel. Not run: no GPU was at hand.

    The kernel aligns the causal mask to the last key, so a stretch sees all of its prefix.
    """
    batch, _, length, _ = query.shape
    if stretches is None:
        stretches = Stretches(tuple(Stretch(i * length, (i + 1) * length) for i in range(batch)))
    from torch.nn.attention import varlen  # which imports torch's compiler, for seconds

    rows, queries, keys, most_queries, most_keys = stretches.varlen(query.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B*L, heads, D]
    attended: Any = varlen.varlen_attn(
        q, k[rows], v[rows], queries, keys, most_queries, most_keys,
        scale=scaling, window_size=CAUSAL, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return attended.unflatten(0, (batch, length)), None


FLASH = "flash"
"""Our name of a language model's attention by `_flash`, whatever its rows hold."""
CAUSAL = (-1, 0)
"""As a window: all keys before a query, none after it."""
KERNELS: dict[str, str] = {}
"""transformers' name of a kernel, and that of the one which takes stretches."""

for _name, _attend in (("sdpa", _sdpa), (FLASH, _flash)):
    KERNELS[_name] = f"stretches_{_name}"
    AttentionInterface.register(KERNELS[_name], _attend)
AttentionInterface.register(FLASH, _flash)
