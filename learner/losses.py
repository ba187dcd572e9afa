"""Losses as sums of named terms, each over its own global token count; those of SFT.

Every function is pure. A term is a sum over the tokens of one micro-batch; dividing it by the
token count of the *whole* update (all micro-batches, all ranks) makes the loss independent of
how the update was split. Shapes: N response tokens of a micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from learner.batch import Tokens, TrainBatch
from learner.metrics import Mean, Metric, Total
from tasks.core import NO_SEGMENT, SEGMENTS

PERCEPTION = SEGMENTS.index("perception")

View = tuple[torch.Tensor, torch.Tensor]
"""Log-probs and entropies [N], in nats, of the response tokens under one view of their images."""
Terms = dict[str, torch.Tensor]


class Loss(ABC):
    """How much each named term weighs, its denominator, and what a micro-batch tells of it."""

    @property
    def uses_entropy(self) -> bool:
        """Whether `sums` needs the gradient of the entropies."""
        return False

    @property
    def uses_reference(self) -> bool:
        """Whether `sums` needs `Tokens.reference_logprobs`."""
        return False

    def second_view(self) -> Callable[[bytes], bytes] | None:
        """What makes a second view of an image, if every sequence is to be read under one too."""
        return None

    @abstractmethod
    def denominators(self, batch: TrainBatch) -> dict[str, float]:
        """Global token count of each term, over the whole update."""

    @abstractmethod
    def sums(self, outputs: View, tokens: Tokens, second: View | None = None) -> Terms:
        """Each term's weighted sum over a micro-batch, to be divided by its denominator.

        `second`: the same tokens under `second_view`, where the loss has one.
        """

    def metrics(self, outputs: View, tokens: Tokens) -> dict[str, Metric]:
        """What to log of a micro-batch, beside the terms: tokens, their loss and entropy."""
        logprobs, entropy = outputs
        metrics: dict[str, Metric] = {}
        for index, segment in (*enumerate(SEGMENTS), (NO_SEGMENT, "other")):
            chosen = tokens.segments == index
            count = float(chosen.sum())
            if segment == "act" and not count:
                continue  # no environment, as far as one can tell here
            metrics[f"tokens/{segment}"] = Total(count)
            metrics[f"nll/{segment}"] = Mean(float(-logprobs[chosen].sum()), count)
            metrics[f"entropy/{segment}"] = Mean(float(entropy[chosen].sum()), count)
        return metrics


@dataclass(frozen=True)
class TokenMeanLoss(Loss):
    """Standard SFT: cross-entropy averaged over all response tokens of the update."""

    def denominators(self, batch: TrainBatch) -> dict[str, float]:
        return {"cross_entropy": float(max(1, batch.response_tokens()))}

    def sums(self, outputs: View, tokens: Tokens, second: View | None = None) -> Terms:
        return {"cross_entropy": -outputs[0].sum()}


@dataclass(frozen=True)
class BalancedLoss(Loss):
    """SFT that balances seeing and thinking: `L = λ·L_p + (1-λ)·L_r` (arXiv 2605.29496).

    L_p averages over perception tokens, L_r over all other response tokens, each over its own
    global count. λ equal to perception's token share is `TokenMeanLoss`.
    """

    perception_weight: float = 0.5
    scale: float = 1.0
    """A factor on the whole loss; see `learner.balance.Balance`."""

    def denominators(self, batch: TrainBatch) -> dict[str, float]:
        perception = batch.segment_tokens().get(PERCEPTION, 0)
        rest = batch.response_tokens() - perception
        return {"perception": float(max(1, perception)), "reasoning": float(max(1, rest))}

    def sums(self, outputs: View, tokens: Tokens, second: View | None = None) -> Terms:
        logprobs, _ = outputs
        perception = tokens.segments == PERCEPTION
        zero = logprobs.new_zeros(())
        weight = self.scale * self.perception_weight
        rest = self.scale * (1 - self.perception_weight)
        return {
            "perception": -weight * torch.where(perception, logprobs, zero).sum(),
            "reasoning": -rest * torch.where(perception, zero, logprobs).sum(),
        }
