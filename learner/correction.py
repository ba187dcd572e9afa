"""Off-policy correction: what a token counts that another policy than the learner's drew.

Shapes: N response tokens of a micro-batch. ρ_t = π_old(t) / π_sampler(t), where π_old is the
learner's policy when the step begins: the policy that the update starts from. The two differ
where the sampler is some versions behind, and where its arithmetic is not the learner's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from learner.batch import Tokens, TrainBatch

CorrectionKind = Literal[
    "token_tis", "sequence_tis", "token_mask", "sequence_mask", "icepop", "geometric_mask"
]


@dataclass(frozen=True)
class Correction:
    """A weight w for each token, without a gradient, by `kind`:

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

    Attributes:
        low, high: bounds of ρ_t, of the product or of the geometric mean; low ≤ 1 ≤ high. The
            two truncations have no lower one.
    """

    kind: CorrectionKind
    high: float
    low: float = 0.0

    def __post_init__(self) -> None:
        if not self.low <= 1 <= self.high:
            raise ValueError(f"the bounds must hold 1, got {self.low} and {self.high}")

    def weights(self, gap: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """w [N] of log ρ [N]; no gradient."""
        level = self._level(gap, tokens)
        # In logarithms: the product of a long sequence overflows before it is cut.
        kept = torch.exp(level.clamp(max=math.log(self.high)))
        if self.kind in ("token_tis", "sequence_tis"):
            return kept
        if self.kind == "geometric_mask":
            kept = torch.ones_like(kept)
        return torch.where(self._inside(level), kept, torch.zeros_like(kept))

    def touched(self, gap: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """bool [N]: tokens whose weight was truncated, or which are masked."""
        return ~self._inside(self._level(gap, tokens))

    def _level(self, gap: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """The log-ratio [N] that is held against the bounds: a token's own, or its sequence's."""
        gap = gap.detach()
        if self.kind in ("token_tis", "token_mask", "icepop"):
            return gap
        if self.kind == "geometric_mask":
            gap = gap * tokens.shares()
        return tokens.sequence_sums(gap)[tokens.sequences]

    def _inside(self, level: torch.Tensor) -> torch.Tensor:
        low = math.log(self.low) if self.low else -math.inf
        return (level >= low) & (level <= math.log(self.high))


def old_logprobs(logprobs: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """log π_old [N] of a micro-batch: those it carries, or the learner's of this very pass.

    A step's first update starts from π_old, so its own forward pass has them.
    """
    return logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs


def with_old_logprobs(batch: TrainBatch, logprobs: Sequence[np.ndarray]) -> TrainBatch:
    """The batch with log π_old, float32 [T] a sequence in its order."""
    paired = zip(batch.sequences, logprobs, strict=True)
    return TrainBatch(tuple(replace(s, old_logprobs=found) for s, found in paired))


def mismatch_statistics(
    logprobs: torch.Tensor, tokens: Tokens, correction: Correction | None, segments: Sequence[str]
) -> dict[str, float]:
    """Sums over a micro-batch of what tells sampler and learner apart (`sum/…`).

    `sum/mismatch/k1` and `k3` estimate KL(sampler ‖ π_old) (see `learner.policy_loss`), `k3`
    also by segment; ρ and ρ² make an effective sample size; `sum/correction/…` are of w.
    """
    gap = (old_logprobs(logprobs, tokens) - tokens.sampler_logprobs).double()
    ratio = torch.exp(gap)
    of_token = ratio - 1 - gap
    found = {
        "sum/mismatch/k1": float(-gap.sum()),
        "sum/mismatch/k3": float(of_token.sum()),
        "sum/mismatch/ratio": float(ratio.sum()),
        "sum/mismatch/squared": float(ratio.square().sum()),
    }
    for index, segment in enumerate(segments):
        found[f"sum/mismatch/k3/{segment}"] = float(of_token[tokens.segments == index].sum())
    if correction:
        weights = correction.weights(gap, tokens)
        found["sum/correction/weight"] = float(weights.sum())
        found["sum/correction/squared"] = float(weights.square().sum())
        found["sum/correction/touched"] = float(correction.touched(gap, tokens).sum())
    return found


def mismatch_summary(
    found: dict[str, float], tokens: float, segments: Sequence[str]
) -> dict[str, float]:
    """From the sums of a whole update over `tokens` tokens to metrics (docs/metrics.md)."""
    metrics = {
        "mismatch/k1": found["sum/mismatch/k1"] / tokens,
        "mismatch/k3": found["sum/mismatch/k3"] / tokens,
        "mismatch/effective_share": _effective(
            found["sum/mismatch/ratio"], found["sum/mismatch/squared"], tokens
        ),
    }
    for segment in segments:
        if count := found.get(f"sum/tokens/{segment}"):
            metrics[f"mismatch/k3/{segment}"] = found[f"sum/mismatch/k3/{segment}"] / count
    if "sum/correction/weight" in found:
        metrics["correction/weight_mean"] = found["sum/correction/weight"] / tokens
        metrics["correction/touched_share"] = found["sum/correction/touched"] / tokens
        metrics["correction/effective_share"] = _effective(
            found["sum/correction/weight"], found["sum/correction/squared"], tokens
        )
    return metrics


def _effective(total: float, squared: float, count: float) -> float:
    """(Σw)² / (n Σw²): the share of n draws that as many of equal weight are worth (Kish 1965)."""
    return total * total / (count * squared) if squared else 0.0
