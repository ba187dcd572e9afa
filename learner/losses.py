"""Losses as sums of named terms, each over its own global token count; those of SFT.

Every function is pure. A term is a sum over the tokens of one micro-batch; dividing it by the
token count of the *whole* update (all micro-batches, all ranks) makes the loss independent of
how the update was split. Shapes: N response tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from learner.batch import Tokens, TrainBatch
from learner.correction import mismatch_statistics
from learner.policy_loss import PolicyLoss, k3
from tasks.core import SEGMENTS

PERCEPTION = SEGMENTS.index("perception")


class Loss(Protocol):
    """A loss: how much each named term weighs, its denominator, and its sum over a micro-batch."""

    @property
    def uses_entropy(self) -> bool:
        """Whether `sums` needs the gradient of the entropies."""

    def denominators(self, batch: TrainBatch) -> dict[str, float]:
        """Global token count of each term, over the whole update."""

    def sums(
        self, logprobs: torch.Tensor, entropy: torch.Tensor, tokens: Tokens
    ) -> dict[str, torch.Tensor]:
        """Each term's weighted sum over a micro-batch, to be divided by its denominator."""


@dataclass(frozen=True)
class TokenMeanLoss:
    """Standard SFT: cross-entropy averaged over all response tokens of the update."""

    @property
    def uses_entropy(self) -> bool:
        return False

    def denominators(self, batch: TrainBatch) -> dict[str, float]:
        return {"cross_entropy": float(max(1, batch.response_tokens()))}

    def sums(
        self, logprobs: torch.Tensor, entropy: torch.Tensor, tokens: Tokens
    ) -> dict[str, torch.Tensor]:
        return {"cross_entropy": -logprobs.sum()}


@dataclass(frozen=True)
class BalancedLoss:
    """SFT that balances seeing and thinking: `L = λ·L_p + (1-λ)·L_r` (arXiv 2605.29496).

    L_p averages over perception tokens, L_r over all other response tokens, each over its own
    global count. λ equal to perception's token share is `TokenMeanLoss`.
    """

    perception_weight: float = 0.5
    scale: float = 1.0
    """A factor on the whole loss; see `learner.balance.Balance`."""

    @property
    def uses_entropy(self) -> bool:
        return False

    def denominators(self, batch: TrainBatch) -> dict[str, float]:
        counts = batch.segment_tokens()
        perception = counts.get(PERCEPTION, 0)
        rest = batch.response_tokens() - perception
        return {"perception": float(max(1, perception)), "reasoning": float(max(1, rest))}

    def sums(
        self, logprobs: torch.Tensor, entropy: torch.Tensor, tokens: Tokens
    ) -> dict[str, torch.Tensor]:
        perception = tokens.segments == PERCEPTION
        zero = logprobs.new_zeros(())
        seen = self.scale * self.perception_weight
        rest = self.scale * (1 - self.perception_weight)
        return {
            "perception": -seen * torch.where(perception, logprobs, zero).sum(),
            "reasoning": -rest * torch.where(perception, zero, logprobs).sum(),
        }


def token_statistics(
    logprobs: torch.Tensor, entropy: torch.Tensor, tokens: Tokens, loss: Loss
) -> dict[str, float]:
    """Sums and maxima of one micro-batch, to be added up (`sum/…`) or maximised (`max/…`)."""
    found: dict[str, float] = {}
    for index, segment in enumerate((*SEGMENTS, "other")):
        chosen = tokens.segments == (index if index < len(SEGMENTS) else -1)
        found[f"sum/tokens/{segment}"] = float(chosen.sum())
        found[f"sum/nll/{segment}"] = float(-logprobs[chosen].sum())
        found[f"sum/entropy/{segment}"] = float(entropy[chosen].sum())
    if isinstance(loss, PolicyLoss):
        gap = logprobs - tokens.sampler_logprobs
        ratio = torch.exp(gap)
        found["sum/clipped"] = float(loss.clipped(logprobs, tokens).sum())
        found["sum/kl"] = float(k3(tokens.sampler_logprobs, logprobs).sum())
        found["sum/ratio"] = float(ratio.sum())
        found["max/logprob_gap"] = float(gap.abs().max()) if len(gap) else 0.0
        found["max/ratio_gap"] = float((ratio - 1).abs().max()) if len(gap) else 0.0
        found |= mismatch_statistics(logprobs, tokens, loss.correction, SEGMENTS)
    return found
