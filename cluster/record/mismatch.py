"""Whether sampler and learner agree on a step's tokens."""

from __future__ import annotations

from collections.abc import Mapping

MISMATCH_LIMIT = {
    ("float32", False): 1e-3,
    ("float32", True): 0.1,
    ("bfloat16", False): 2.0,
    ("bfloat16", True): 2.0,
    ("mixed", False): 2.0,
    ("mixed", True): 2.0,
}
"""Largest on-policy log-prob gap in nats that arithmetic alone explains: (dtype, on GPUs).

On CPUs: float32 stays below 1e-4 (`tests/rollout/test_engine.py`); bfloat16 came to 0.1 with 1.8
million parameters, and was reported up to 0.8 with 139 million. On GPUs nothing was measured:
vLLM's float32 attention multiplies with the 10 bits of tf32 there, 8 times finer than bfloat16's 7.
"""

ROUNDING_KL_LIMIT = 0.01
"""Largest mean KL in nats a token that goes with rounding in bfloat16; 6e-4 was reported."""

STALE_KL_LIMIT = 0.1
"""Largest KL(sampler ‖ learner) in nats a token of stale tokens: what learning in between explains.

Our choice, about what clips of 0.2 and 0.28 allow within one step, some steps over.
"""


def mismatch(metrics: Mapping[str, float], dtype: str, on_gpu: bool = False) -> str | None:
    """What is wrong if sampler and learner disagree on a step's tokens, before its first update.

    `metrics` are those of the step; without a learner's in it nothing is said. Where every token is
    of the learner's own version, no log-prob may differ by more than `MISMATCH_LIMIT`: checksums on
    a CPU cannot see packed linear layers, so this is the proof that a transfer arrived. In
    bfloat16, where single tokens say little, the mean KL may not be above `ROUNDING_KL_LIMIT`
    either. Where some are older, it may not be above `STALE_KL_LIMIT`.
    """
    kl = metrics.get("learner/mismatch/k3", 0.0)
    if metrics.get("policy/lag_max", 0.0) > 0:
        return (
            f"sampler and learner are {kl:.2g} nats a token apart (more than {STALE_KL_LIMIT:g}); "
            "the tokens are too stale, or their weights or inputs are not the same"
            if not kl <= STALE_KL_LIMIT
            else None
        )
    gap, limit = metrics.get("learner/logprob_gap", 0.0), MISMATCH_LIMIT[dtype, on_gpu]
    if dtype != "float32" and not kl <= ROUNDING_KL_LIMIT:
        return (
            f"sampler and learner are {kl:.2g} nats a token apart (more than {ROUNDING_KL_LIMIT:g} "
            f"for {dtype}); their weights or inputs are not the same"
        )
    return (
        f"sampler and learner log-probs differ by up to {gap:.2g} nats (more than {limit:g} for "
        f"{dtype}); their weights or inputs are not the same"
        if not gap <= limit
        else None
    )
