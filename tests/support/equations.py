"""Draws of response tokens, and the equations of the papers as float64 loops over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from learner.batch import Tokens, TrainBatch, TrainSequence
from learner.loss_settings import LOSS_DEFAULTS, LossConfig
from learner.losses import Loss
from learner.policy_loss import PolicyLoss

LENGTHS = (1, 37, 8, 20, 3, 12, 30, 5)
MAX_TOKENS = 40
ENDS = np.cumsum(LENGTHS)
SPANS = [range(end - length, end) for end, length in zip(ENDS, LENGTHS, strict=True)]
N = int(ENDS[-1])
OBJECTIVES = tuple(LOSS_DEFAULTS)
AGGREGATIONS, ESTIMATORS = (
    get_args(LossConfig.model_fields[name].annotation) for name in ("aggregation", "kl_estimator")
)
PAPO = {"weight": 0.02, "entropy_weight": 0.03}
CLIP = {"clip": (0.2, 0.28), "gspo": (0.05, 0.08), "cispo": (0.3, 0.4)}


def loss_of(objective: str = "clip", **fields: Any) -> PolicyLoss:
    """A policy loss with the clip of `CLIP`; an argument replaces what comes with the objective."""
    low, high = CLIP[objective]
    plain = {"loss": objective, "aggregation": "token_mean", "clip_low": low, "clip_high": high}
    return PolicyLoss(LossConfig.model_validate(plain | fields), MAX_TOKENS)


@dataclass(frozen=True)
class Draw:
    """A batch of sequences of `LENGTHS`; float64 [N] each, and [N] under a masked image."""

    logprobs: np.ndarray
    entropy: np.ndarray
    masked: np.ndarray
    masked_entropy: np.ndarray
    tokens: Tokens


def draw(seed: int, one_advantage: bool = False) -> Draw:
    """Ratios fall on all sides of every clip; `one_advantage`: the same over a sequence."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, N)
    rows = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    drift = rng.normal(0, 0.1, len(LENGTHS))[rows]  # so that a sequence's mean is off 1 as well
    advantages = rng.normal(0, 1, N)
    tokens = Tokens(
        ids=torch.zeros(N, dtype=torch.long),
        segments=torch.from_numpy(rng.integers(-1, 3, N).astype(np.int8)),
        sampler_logprobs=torch.from_numpy(logprobs - drift - rng.normal(0, 0.3, N)),
        advantages=torch.from_numpy(advantages[rows] if one_advantage else advantages),
        sequences=torch.from_numpy(rows),
        reference_logprobs=torch.from_numpy(
            logprobs - np.random.default_rng([seed, 1]).normal(0.1, 0.4, N)
        ),
    )
    entropies = rng.exponential(1.0, (2, N))
    return Draw(logprobs, entropies[0], logprobs - rng.normal(0.5, 1, N), entropies[1], tokens)


def sequences_of(drawn: Draw) -> tuple[TrainSequence, ...]:
    """The draw as training sequences, for the denominators."""
    prompt = np.zeros(1, np.int32)
    found = []
    for span in SPANS:
        segments = drawn.tokens.segments.numpy()[span.start : span.stop]
        zeros = np.zeros(len(span), np.float32)
        found.append(TrainSequence(prompt, zeros.astype(np.int32), (), segments, zeros, zeros))
    return tuple(found)


def total(loss: Loss, logprobs: torch.Tensor, entropy: torch.Tensor, drawn: Draw) -> torch.Tensor:
    counts = loss.denominators(TrainBatch(sequences_of(drawn)))
    parts = loss.sums((logprobs, entropy), drawn.tokens)
    assert parts.keys() == counts.keys()
    return torch.stack([value / counts[name] for name, value in parts.items()]).sum()


def aggregated(values: list[float], aggregation: str) -> float:
    per_sequence = [[values[t] for t in span] for span in SPANS]
    if aggregation == "token_mean":
        return sum(map(sum, per_sequence)) / sum(map(len, per_sequence))
    if aggregation == "sequence_mean":
        return sum(sum(s) / len(s) for s in per_sequence) / len(per_sequence)
    return sum(sum(s) / MAX_TOKENS for s in per_sequence) / len(per_sequence)


def clipped_gain(ratio: float, a: float, low: float, high: float) -> float:
    # A positive advantage earns nothing above 1 + high, a negative one nothing below 1 - low.
    return min(ratio, 1 + high) * a if a > 0 else max(ratio, 1 - low) * a


def gains(objective: str, logprobs: np.ndarray, at: np.ndarray, drawn: Draw) -> list[float]:
    """Each token's gain at `logprobs`; what the papers stop the gradient of is taken at `at`."""
    low, high = CLIP[objective]
    old, advantages = drawn.tokens.sampler_logprobs.tolist(), drawn.tokens.advantages.tolist()
    found = []
    for span in SPANS:
        for t in span:
            if objective == "clip":
                ratio = math.exp(logprobs[t] - old[t])
                found.append(clipped_gain(ratio, advantages[t], low, high))
            elif objective == "cispo":
                weight = min(max(math.exp(at[t] - old[t]), 1 - low), 1 + high)
                found.append(weight * advantages[t] * logprobs[t])
            else:
                mean = sum(at[u] - old[u] for u in span) / len(span)
                ratio = math.exp(mean) * math.exp(logprobs[t]) / math.exp(at[t])
                found.append(clipped_gain(ratio, advantages[t], low, high))
    return found


def assert_gradient(
    gradient: torch.Tensor | None, reference: Callable[[np.ndarray], float], at: np.ndarray
) -> None:
    """Central differences of `reference` at every fifth token."""
    assert gradient is not None
    for i in range(0, N, 5):
        step = np.zeros(N)
        step[i] = 1e-6
        slope = (reference(at + step) - reference(at - step)) / 2e-6
        assert float(gradient[i]) == pytest.approx(slope, abs=1e-8)


def of_part(tokens: Tokens, part: Sequence[int]) -> tuple[np.ndarray, Tokens]:
    """Where the tokens of some sequences lie, and these as a micro-batch of their own."""
    at = np.concatenate([np.arange(SPANS[i].start, SPANS[i].stop) for i in part])
    counts = torch.tensor([LENGTHS[i] for i in part])
    chosen = tokens.map(lambda value: value[torch.from_numpy(at)])
    return at, replace(chosen, sequences=torch.arange(len(part)).repeat_interleave(counts))
