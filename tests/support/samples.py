"""Training sequences of every kind a step can hold, made from one tiny processor."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from learner.batch import Tokens, TrainBatch, TrainSequence
from learner.losses import Loss, Terms, View
from learner.policy import Policy
from learner.sft import Demonstrator
from rollout.decoding import encode
from rollout.tokens import Chat
from tasks.core import ENVIRONMENT, NO_SEGMENT, Problem
from tasks.load import load_task

Loaded = tuple[Policy, Any]
"""A policy and its processor."""
TASK = load_task("sudoku")
SPEC = TASK.spec(size=4, blanks=8, cell_size=16, margin=0, font_size=12, prompt="brief")


@dataclass(frozen=True)
class CliffLoss(Loss):
    """A loss of value 0 (or NaN) whose gradient is infinite."""

    value: float = 0.0

    def denominators(self, batch: TrainBatch) -> dict[str, float]:
        return {"cliff": 1.0}

    def sums(self, outputs: View, tokens: Tokens, second: View | None = None) -> Terms:
        logprobs, _ = outputs
        return {"cliff": (logprobs - logprobs.detach()).sqrt().sum() + self.value}


Size = tuple[int, int]


def problem(seed: int, *sizes: Size) -> Problem:
    """A 4x4 Sudoku; with sizes, its pictures are noise of those widths and heights.

    Several stand in the prompt, the last first.
    """
    rng = np.random.default_rng(seed)
    drawn = TASK.generate(rng, SPEC)
    pictures = []
    for width, height in sizes:
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(out, "PNG")
        pictures.append(out.getvalue())
    places = [f"Picture <image_{n}> " for n in range(len(sizes), 0, -1)]
    if len(sizes) > 1:
        drawn = replace(drawn, prompt=drawn.prompt.join(["".join(places[:-1]), places[-1]]))
    return replace(drawn, images=tuple(pictures)) if pictures else drawn


def sequence(processor: Any, seed: int, size: Size | list[Size], length: int) -> TrainSequence:
    """The first `length` tokens of a demonstration, with random advantages and sampler."""
    drawn = problem(seed, *(size if isinstance(size, list) else [size]))
    whole = Demonstrator(processor).sequence(TASK, drawn, TASK.demonstrate(drawn, "terse"))
    return off_policy(
        replace(whole, response_ids=whole.response_ids[:length], segments=whole.segments[:length]),
        seed,
    )


def off_policy(found: TrainSequence, seed: int) -> TrainSequence:
    """`found` with a sampler that is about uniform over 640 tokens, and random advantages."""
    rng, length = np.random.default_rng([seed, 1]), len(found.response_ids)
    return replace(
        found,
        sampler_logprobs=(-np.log(640) + 0.3 * rng.normal(size=length)).astype(np.float32),
        advantages=rng.normal(size=length).astype(np.float32),
    )


def episode(processor: Any, seed: int, *turns: list[Size], length: int = 9) -> TrainSequence:
    """A response of several turns of `length` tokens, with pictures of `turns` shown before each.

    What a sampler says of the environment's tokens is NaN, which no loss may see.
    """
    chat = Chat(processor)
    found = sequence(processor, seed, turns[0], length)
    ids, segments, images = [found.response_ids], [found.segments], [*found.images]
    for place, sizes in enumerate(turns[1:], 1):
        later = sequence(processor, seed + 10 * place, sizes or (64, 64), length)
        parts = [*(later.images if sizes else ()), f"Turn {place}. <image> <|im_end|>"]
        between = chat.expanded(chat.turn(parts, chat.end), sizes)
        ids += [np.array([chat.end, *between], np.int32), later.response_ids]
        segments += [np.array([NO_SEGMENT, *[ENVIRONMENT] * len(between)], np.int8), later.segments]
        images += later.images if sizes else ()
    found = replace(
        found,
        response_ids=np.concatenate(ids),
        segments=np.concatenate(segments),
        images=tuple(images),
    )
    found = off_policy(found, seed)
    nan = np.where(found.targets, np.float32(0), np.float32(np.nan))
    return replace(
        found,
        sampler_logprobs=found.sampler_logprobs + nan,
        advantages=found.advantages + nan,
    )


def mixed_batch(processor: Any) -> TrainBatch:
    """Five sequences: two of one image, one of two, a blind and an oracle one of another size.

    Odd, so that two ranks get unequal shares; one response ends with a sampled placeholder.
    """
    first = sequence(processor, 0, (64, 64), 30)
    mate = off_policy(
        replace(first, response_ids=first.response_ids[:17], segments=first.segments[:17]), 9
    )
    two = sequence(processor, 1, [(64, 64), (96, 64)], 24)
    pad = placeholder(processor)
    two = replace(two, response_ids=np.append(two.response_ids[:-1], np.int32(pad)))
    text = Chat(processor).prompt(["Say what you see."])
    blind = replace(
        sequence(processor, 2, (64, 64), 12),
        prompt_ids=np.asarray(text, np.int32),
        images=(),
    )
    oracle = sequence(processor, 3, (64, 96), 40)
    prefix = encode(processor.tokenizer, TASK.oracle_prefix(problem(3)))
    oracle = replace(
        oracle, prompt_ids=np.concatenate([oracle.prompt_ids, np.asarray(prefix, np.int32)])
    )
    return TrainBatch((first, two, blind, oracle, mate))


def placeholder(processor: Any) -> int:
    """The id of a family's image placeholder."""
    return int(
        next(
            index
            for index, token in processor.tokenizer.added_tokens_decoder.items()
            if token.content in ("<|image_pad|>", "<IMG_CONTEXT>", "<image>")
        )
    )
