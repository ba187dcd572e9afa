"""From rewards to advantages: one number a rollout, then one a token.

Shapes: G rollouts in a group, T response tokens, C credit columns; a batch is the groups of one
step. Float64 up to the last step.
A group whose values are all equal carries no signal. It is detected by `max == min` before
anything is normalised: the float mean of six 0.9s is not 0.9, so a test on the standard
deviation would let rounding noise through as an advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from rewards.scored import RewardError
from tasks.core import READ, SEGMENTS, Segment
from tasks.load import import_named

GroupEstimator = Literal["grpo", "dr_grpo", "rloo"]
"""Looks at one group alone."""

Estimator = Literal[GroupEstimator, "reinforce_pp", "reinforce_pp_baseline"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

Advantages = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""One of a user's own: float64 [G] rewards of each group of a step -> as many advantages each."""

CREDIT_COLUMNS = (*SEGMENTS, "none")
"""Where an advantage may go: the tokens of a segment, and the tokens outside every segment."""

NO_CALL_COLUMNS = (*READ, "none")
"""Those of a response without an environment, as they are stored."""

EPS = 1e-6
"""Added to a standard deviation, so that a spread of rounding errors stays a small number."""


def is_constant(values: np.ndarray) -> bool:
    """Whether all values are exactly equal (so a group of one is constant)."""
    return bool(values.max() == values.min())


def group_advantages(rewards: np.ndarray, estimator: GroupEstimator = "grpo") -> np.ndarray:
    """float64 [G] advantages of float64 [G] rewards, exactly 0 where all rewards are equal.

    `grpo`: (r − mean) / (std + EPS), population standard deviation (arXiv 2402.03300).
    `dr_grpo`: r − mean (arXiv 2503.20783).
    `rloo`: r − mean of the other rewards (arXiv 2402.14740).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if is_constant(rewards):
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if estimator == "grpo":
        advantages = centred / (rewards.std() + EPS)
    elif estimator == "dr_grpo":
        advantages = centred
    elif estimator == "rloo":
        # r_i − (Σr − r_i)/(G−1) is the centred reward times G/(G−1).
        advantages = centred * (len(rewards) / (len(rewards) - 1))
    else:
        raise ValueError(f"advantage estimator {estimator!r}: one of grpo, dr_grpo, rloo")
    return advantages


def batch_advantages(
    rewards: Sequence[np.ndarray], estimator: Estimator | Advantages
) -> list[np.ndarray]:
    """float64 [G] advantages of each group of a batch, from float64 [G] rewards each.

    `reinforce_pp`: (r − mean) / (std + EPS) with mean and population standard deviation over
    all rollouts of the batch (REINFORCE++, arXiv 2501.03262, without its token-level KL). No group
    is looked at: rollouts with equal rewards share one advantage, which is not 0 unless their
    reward is the batch's mean. Such a group has a gradient (an easy problem is reinforced, a hard
    one discouraged) and does not count as zero variance. Exactly 0 only where the whole batch is
    equal.
    `reinforce_pp_baseline`: r − mean of the group, then whitened over the batch (the same paper's
    variant with a group baseline); equal rewards in a group give exactly 0, and their zeros
    count in the batch's standard deviation.
    Others: `group_advantages` of each group. One of a user's own is called.
    """
    if callable(estimator):
        return estimator(rewards)
    if estimator == "reinforce_pp":
        everything = np.concatenate([np.zeros(0), *rewards])
        if len(everything) and is_constant(everything):
            return [np.zeros_like(r) for r in rewards]
        return [(r - everything.mean()) / (everything.std() + EPS) for r in rewards]
    if estimator == "reinforce_pp_baseline":
        return whiten([group_advantages(r, "dr_grpo") for r in rewards])
    return [group_advantages(r, estimator) for r in rewards]


def find_advantage(name: str, args: Mapping[str, Any]) -> Estimator | Advantages:
    """The estimator that a recipe names, or a function of the user's own, tried on made-up rewards.

    Raises RewardError, in one line, where that cannot be loaded or gives no advantages.
    """
    if name in ESTIMATORS:
        return name
    where = f'algorithm.advantage: "{name}"'
    try:
        function = import_named("algorithm.advantage", name)
    except ValueError as error:
        raise RewardError(str(error)) from error

    def checked(rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
        try:
            with np.errstate(all="ignore"):
                returned = list(function([group.copy() for group in rewards], **args))
                advantages = [np.asarray(group, dtype=np.float64) for group in returned]
        except Exception as error:
            raise RewardError(f"{where}: {type(error).__name__}: {error}") from error
        shapes, expected = [group.shape for group in advantages], [group.shape for group in rewards]
        if shapes != expected:
            raise RewardError(f"{where}: gave arrays of shapes {shapes} for rewards of {expected}")
        for had, group in zip(rewards, advantages, strict=True):
            if not np.isfinite(group).all():
                raise RewardError(f"{where}: gave {group.tolist()} for rewards {had.tolist()}")
        return advantages

    checked([np.array(group) for group in ([0.0, 1.0, 1.0, 0.0], [1.0] * 4, [0.5, -1.0, 2.0, 0.0])])
    return checked


def whiten(batch: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Float64 [G] of each group less the batch's mean, over its population standard deviation.

    Groups without signal count in both, and keep exactly 0.
    """
    if not batch:
        return []
    everything = np.concatenate(batch)
    mean, std = everything.mean(), everything.std()
    return [np.zeros_like(v) if is_constant(v) else (v - mean) / (std + EPS) for v in batch]


def token_advantages(
    advantages: np.ndarray, segments: np.ndarray, segment_weights: Mapping[Segment, float]
) -> np.ndarray:
    """float32 [T]: the rollout's advantage in each token's segment, times the segment's weight.

    Args:
        advantages: float64 [C], one a credit column (see `CREDIT_COLUMNS`).
        segments: int8 [T], as in `Rollout.segments`; tokens of the environment get 0.
        segment_weights: segments not named, and tokens outside every segment, weigh 1.
    """
    table = np.array([*(segment_weights.get(s, 1.0) for s in SEGMENTS), 1.0], dtype=np.float64)
    # NO_SEGMENT is -1, the last credit column, and ENVIRONMENT is -2.
    weighted = np.insert(np.asarray(advantages) * table, len(SEGMENTS), 0.0)
    result: np.ndarray = weighted[segments].astype(np.float32)
    return result
