"""Whether sampler and learner agree on a step's tokens."""

from __future__ import annotations

from collections.abc import Mapping

MISMATCH_LIMIT = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest on-policy log-prob gap in nats that arithmetic alone explains, by dtype."""

STALE_KL_LIMIT = 0.1
"""Largest KL(sampler ‖ learner) in nats a token of stale tokens: what learning in between explains.

Our choice, about what clips of 0.2 and 0.28 allow within one step, some steps over.
"""


def mismatch(metrics: Mapping[str, float], dtype: str) -> str | None:
    """What is wrong if sampler and learner disagree on a step's tokens, before its first update.

    `metrics` are those of the step; without a learner's in it nothing is said. Where every token is
    of the learner's own version, no log-prob may differ by more than `MISMATCH_LIMIT` of the dtype:
    checksums on a CPU cannot see packed linear layers, so this is the proof that a transfer
    arrived. Where some are older, the mean KL may not be above `STALE_KL_LIMIT`.
    """
    if metrics.get("policy/lag_max", 0.0) > 0:
        kl = metrics.get("learner/mismatch/k3", 0.0)
        return (
            f"sampler and learner are {kl:.2g} nats a token apart (more than {STALE_KL_LIMIT:g}); "
            "the tokens are too stale, or their weights or inputs are not the same"
            if not kl <= STALE_KL_LIMIT
            else None
        )
    gap, limit = metrics.get("learner/logprob_gap", 0.0), MISMATCH_LIMIT[dtype]
    return (
        f"sampler and learner log-probs differ by up to {gap:.2g} nats (more than {limit:g} for "
        f"{dtype}); their weights or inputs are not the same"
        if not gap <= limit
        else None
    )
