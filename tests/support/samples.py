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
from rollout.tokens import Chat, encode
from tasks.core import Problem
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

    def sums(self, seen: View, tokens: Tokens, second: View | None = None) -> Terms:
        logprobs, _ = seen
        return {"cliff": (logprobs - logprobs.detach()).sqrt().sum() + self.value}


def problem(seed: int, size: tuple[int, int] | None = None) -> Problem:
    """A 4x4 Sudoku; with `size`, its picture is noise of that width and height."""
    rng = np.random.default_rng(seed)
    drawn = TASK.generate(rng, SPEC)
    if size is None:
        return drawn
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(out, "PNG")
    return replace(drawn, images=(out.getvalue(),))


def sequence(processor: Any, seed: int, size: tuple[int, int] | None, length: int) -> TrainSequence:
    """The first `length` tokens of a demonstration, with random advantages and sampler."""
    drawn = problem(seed, size)
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


def mixed_batch(processor: Any) -> TrainBatch:
    """Five sequences: two of one image, images of other sizes, a blind and an oracle one.

    Odd, so that two ranks get unequal shares; one response ends with a sampled placeholder.
    """
    first = sequence(processor, 0, (64, 64), 30)
    mate = off_policy(
        replace(first, response_ids=first.response_ids[:17], segments=first.segments[:17]), 9
    )
    wide = sequence(processor, 1, (96, 64), 24)
    pad = placeholder(processor)
    wide = replace(wide, response_ids=np.append(wide.response_ids[:-1], np.int32(pad)))
    text = Chat(processor).prompt("Say what you see.", with_image=False)
    blind = replace(
        sequence(processor, 2, (64, 64), 12),
        prompt_ids=np.asarray(text, np.int32),
        image=None,
    )
    oracle = sequence(processor, 3, (64, 96), 40)
    prefix = encode(processor.tokenizer, TASK.oracle_prefix(problem(3)))
    oracle = replace(
        oracle, prompt_ids=np.concatenate([oracle.prompt_ids, np.asarray(prefix, np.int32)])
    )
    return TrainBatch((first, wide, blind, oracle, mate))


def placeholder(processor: Any) -> int:
    """The id of a family's image placeholder."""
    return int(
        next(
            index
            for index, token in processor.tokenizer.added_tokens_decoder.items()
            if token.content in ("<|image_pad|>", "<IMG_CONTEXT>", "<image>")
        )
    )
