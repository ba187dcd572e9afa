"""Off-policy correction: what a token counts that another policy than the learner's drew.

Shapes: N response tokens of a micro-batch. ρ_t = π_old(t) / π_sampler(t), where π_old is the
learner's policy when the step begins: the policy that the update starts from. The two differ
where the sampler is some versions behind, and where its arithmetic is not the learner's.

A weight w for each token, without a gradient, by `CorrectionConfig.kind`; `low` ≤ 1 ≤ `high` bound
ρ_t, the product or the geometric mean:

- `token_tis`: w_t = min(ρ_t, high). Truncated importance sampling (Ionides 2008), a token at
  a time as in Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
  RL training". A token's bias for a sequence's variance.
- `sequence_tis`: w = min(Π_t ρ_t, high), the same for every token of the sequence (Liu et
  al. 2025, "When speed kills stability"). Unbiased but for the cut; noisy for long responses.
- `token_mask`: w_t = ρ_t where low ≤ ρ_t ≤ high, else 0. Masked importance sampling.
- `sequence_mask`: w = Π_t ρ_t where that is within the bounds, else 0 for the whole sequence
  (masked importance sampling as in Liu et al. 2025).
- `icepop`: `token_mask` with a bound on both sides: a token that the learner finds far less
  likely than the sampler did is left out as well (IcePop; arXiv 2510.18855).
- `geometric_mask`: w = 1 where (Π_t ρ_t)^(1/T) is within the bounds, else 0 for the whole
  sequence of T tokens. It rejects, and does not reweigh what it keeps: the bounds are tight
  (Liu et al. 2025; trust region masking, arXiv 2512.23075). The mean does not grow with
  the length, so long responses are not rejected for their length.

How it meets the objective. Without a correction the ratio of `PolicyLoss` is
π / π_sampler, which is an importance weight itself; to multiply it by another would count
the gap twice. So with a correction the two jobs of that ratio are parted, as in decoupled PPO
(arXiv 2110.00641; for stale tokens AReaL, arXiv 2505.24298, eq. 5): the objective's ratio,
with its clip, is π / π_old and bounds what this step changes; w corrects for who drew the
token. A stale token is then not clipped away for what earlier steps have changed. The policy
term's gain of a token is w_t · s_t, s_t the gain of the objective (clip, GSPO, CISPO).
The KL, entropy and PAPO terms have no w; the KL stays one to the sampler.

Where π_old = π_sampler all weights are 1 (the bounds hold 1) and the loss is that without a
correction, in value and gradient. Tokens of weight 0 still count in the denominators: what
is masked makes the update smaller, and not what is left larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from learner.batch import Tokens, TrainBatch
from learner.loss_settings import CorrectionConfig
from learner.metrics import EffectiveShare, Mean, Metric
from tasks.core import SEGMENTS


def correction_weights(
    correction: CorrectionConfig, gap: torch.Tensor, tokens: Tokens
) -> torch.Tensor:
    """w [N] of log ρ [N]; no gradient."""
    level = _level(correction, gap, tokens)
    if correction.kind == "geometric_mask":
        weights = torch.ones_like(level)
    else:
        # In logarithms: the product of a long sequence overflows before it is cut.
        weights = torch.exp(level.clamp(max=math.log(correction.high or math.inf)))
    if correction.kind in ("token_tis", "sequence_tis"):
        return weights
    return torch.where(_inside(correction, level), weights, torch.zeros_like(weights))


def touched(correction: CorrectionConfig, gap: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """bool [N]: tokens whose weight was truncated, or which are masked."""
    return ~_inside(correction, _level(correction, gap, tokens))


def _level(correction: CorrectionConfig, gap: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The log-ratio [N] that is held against the bounds: a token's own, or its sequence's."""
    gap = gap.detach()
    if correction.kind in ("token_tis", "token_mask", "icepop"):
        return gap
    if correction.kind == "geometric_mask":
        gap = gap * tokens.shares()
    return tokens.sequence_sums(gap)[tokens.sequences]


def _inside(correction: CorrectionConfig, level: torch.Tensor) -> torch.Tensor:
    low = math.log(correction.low) if correction.low else -math.inf
    return (level >= low) & (level <= math.log(correction.high or math.inf))


def old_logprobs(logprobs: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """log π_old [N] of a micro-batch: those it carries, or the learner's of this very pass.

    A step's first update starts from π_old, so its own forward pass has them.
    """
    return logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs


def with_old_logprobs(batch: TrainBatch, logprobs: Sequence[np.ndarray]) -> TrainBatch:
    """The batch with log π_old, for each sequence in its order that of its targets, float32 [n]."""
    completed = []
    for sequence, values in zip(batch.sequences, logprobs, strict=True):
        old = np.zeros(len(sequence.response_ids), np.float32)
        old[sequence.targets] = values
        completed.append(replace(sequence, old_logprobs=old))
    return TrainBatch(tuple(completed))


def mismatch_metrics(
    logprobs: torch.Tensor, tokens: Tokens, correction: CorrectionConfig
) -> dict[str, Metric]:
    """What of a micro-batch tells sampler and learner apart (docs/metrics.md).

    `mismatch/k1` and `k3` estimate KL(sampler ‖ π_old) (see `learner.policy_loss`), `k3` also by
    segment; effective shares are of ρ, and under `correction/…` of w.
    """
    gap = (old_logprobs(logprobs, tokens) - tokens.sampler_logprobs).double()
    count, ratio = float(len(gap)), torch.exp(gap)
    of_token = ratio - 1 - gap
    metrics: dict[str, Metric] = {
        "mismatch/k1": Mean(float(-gap.sum()), count),
        "mismatch/k3": Mean(float(of_token.sum()), count),
        "mismatch/effective_share": _effective_share(ratio),
    }
    for index, segment in enumerate(SEGMENTS):
        chosen = of_token[tokens.segments == index]
        metrics[f"mismatch/k3/{segment}"] = Mean(float(chosen.sum()), float(len(chosen)))
    if correction.kind != "none":
        weights = correction_weights(correction, gap, tokens)
        changed = float(touched(correction, gap, tokens).sum())
        metrics["correction/weight_mean"] = Mean(float(weights.sum()), count)
        metrics["correction/touched_share"] = Mean(changed, count)
        metrics["correction/effective_share"] = _effective_share(weights)
    return metrics


def _effective_share(weights: torch.Tensor) -> EffectiveShare:
    return EffectiveShare(float(weights.sum()), float(weights.square().sum()), float(len(weights)))
