"""The loss of RL: a policy-gradient term, and terms on KL, entropy and the use of the image.

Shapes: N response tokens of a micro-batch. ρ_t = π(t) / π_sampler(t): ratios are against the
sampler's own log-probs, and the sampler is the policy that the tokens were drawn from. Only
under a correction (`learner.correction`) ρ_t is π(t) / π_old(t), and each token has a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from learner.batch import Tokens, TrainBatch
from learner.correction import correction_weights, mismatch_metrics, old_logprobs
from learner.loss_settings import LOSS_DEFAULTS, LossConfig
from learner.losses import Loss, Terms, View
from learner.metrics import Largest, Mean, Metric
from learner.own_loss import own_loss
from tasks.core import SEGMENTS
from tasks.images import mask_patches


def k1(sampled: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """−log r of each token, r = p/q: an unbiased estimate of KL(q ‖ p), of either sign.

    `sampled` and `other` are log-probs [N] under q, which the tokens were drawn from, and p. As a
    loss (its gradient averaged over tokens drawn from q), by which of the two is trained:
    - p trained, q fixed: the gradient of KL(q ‖ p), exact but noisy: it is not 0 token by token
      even where p = q.
    - q trained, p fixed (a KL to a reference model): zero on average. It does nothing.

    The three estimators: Schulman 2020, "Approximating KL divergence".
    """
    return sampled - other


def k2(sampled: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """½·log² r of each token: a biased estimate of KL(q ‖ p), never negative; arguments as `k1`.

    As a loss it follows the KL whose first argument is the policy that is trained:
    - p trained, q fixed: the gradient of KL(p ‖ q), as far as tokens of q stand for tokens of p.
    - q trained, p fixed: the gradient of KL(q ‖ p), exact.
    """
    return (sampled - other).square() / 2


def k3(sampled: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """r − 1 − log r of each token: an unbiased estimate of KL(q ‖ p), never negative; as `k1`.

    As a loss:
    - p trained, q fixed: the gradient of KL(q ‖ p), exact, and 0 token by token where p = q.
    - q trained, p fixed: the gradient of KL(p ‖ q), though the value estimates KL(q ‖ p).
    """
    gap = other - sampled
    return torch.exp(gap) - 1 - gap


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class PolicyLoss(Loss):
    """Policy gradient with token-level advantages, plus optional terms, as `config` says.

    `policy`, by `loss`; s the surrogate gain of a token, to be maximised:
    - `clip`: s = min(ρ_t A_t, clip(ρ_t, 1-ε_low, 1+ε_high) A_t). PPO's clipped surrogate
      (arXiv 1707.06347, eq. 7) as in GRPO (2402.03300), with clip-higher (DAPO, 2503.14476).
    - `gspo`: the same with one ratio a sequence, the geometric mean of its ρ_t (GSPO,
      2507.18071). In its token form (section 4.3), where a token's gradient is the sequence's
      ratio times A_t ∇log π(t): with equal advantages over a sequence and `sequence_mean` it is
      GSPO's own objective, value and gradient.
    - `cispo`: s = sg(clip(ρ_t, 1-ε_low, 1+ε_high)) A_t log π(t): no token loses its gradient
      (CISPO, 2506.13585). ε_low = 1 is no lower bound.
    - a function of the user's own gives −s (`learner.own_loss`).

    `kl`: `kl_weight` times the KL to the sampler's policy: of tokens drawn from q = the sampler,
    with the learner as the trained p in `k1`, `k2` or `k3`.

    `reference_kl`: `reference_kl_weight` times the KL to `model.path` as it was before training, of
    tokens drawn from q = the learner, which is trained, by `k2` or `k3` (GRPO, eq. 4).

    `aggregation` says how these three become one number, over the whole update:
    - `token_mean`: Σ_t / response tokens (DAPO, eq. 8).
    - `sequence_mean`: the mean over sequences of each sequence's mean (GRPO, eq. 3).
    - `constant`: Σ_t / (sequences × `max_tokens`), so that length earns nothing (Dr. GRPO,
      2503.20783). Sequences are those of the update: groups left out of it do not count.

    `entropy`: −`entropy_weight` times the mean entropy of all response tokens.
    `entropy_<segment>`: −`entropy_weights.<segment>` times the mean over that segment's own
    tokens, so a short perception counts as much as a long reasoning.

    `papo_kl`, `papo_entropy`, `papo_masked_entropy`: reward a policy for what it says because of
    the image, `-γ·KL(π(·|image) ‖ π(·|masked image)) + η·(H[π(·|image)] + H[π(·|masked image)])`,
    each a mean over response tokens (PAPO, arXiv 2507.06448). KL is estimated by `k3`, as in PAPO's
    code. Both views have a gradient (in PAPO's code the masked one has none, see its issue 20):
    through `k3` the masked view follows that of this KL, the plain view that of KL(masked ‖ plain).
    Entropies are exact. A sequence without an image is the same in both views: its KL is 0.

    `correction` weighs each token's s by who drew it (`learner.correction`).
    """

    config: LossConfig
    max_tokens: int = 1

    @property
    def uses_entropy(self) -> bool:
        papo = self.config.papo
        weights = (self.config.entropy_weight, *self._entropy_weights().values())
        return any(weights) or bool(papo and papo.entropy_weight)

    @property
    def uses_reference(self) -> bool:
        return self.config.reference_kl_weight > 0

    def second_view(self) -> Callable[[bytes], bytes] | None:
        """Images with some patches black, each made once."""
        papo = self.config.papo
        if papo is None:
            return None
        return cache(lambda image: mask_patches(image, papo.patch_size, papo.share))

    def denominators(self, batch: TrainBatch) -> dict[str, float]:
        config = self.config
        tokens = float(max(1, batch.response_tokens()))
        sequences = float(max(1, sum(s.targets.any() for s in batch.sequences)))
        counts = {
            "token_mean": tokens,
            "sequence_mean": sequences,
            "constant": sequences * self.max_tokens,
        }
        denominators = {"policy": counts[config.aggregation]}
        if config.kl_weight:
            denominators["kl"] = counts[config.aggregation]
        if self.uses_reference:
            denominators["reference_kl"] = counts[config.aggregation]
        if config.entropy_weight:
            denominators["entropy"] = tokens
        of_segment = batch.segment_tokens()
        for index in self._entropy_weights():
            denominators[f"entropy_{SEGMENTS[index]}"] = float(max(1, of_segment.get(index, 0)))
        if config.papo:
            denominators["papo_kl"] = tokens
            if config.papo.entropy_weight:
                denominators |= {"papo_entropy": tokens, "papo_masked_entropy": tokens}
        return denominators

    def sums(self, outputs: View, tokens: Tokens, second: View | None = None) -> Terms:
        config, (logprobs, entropy) = self.config, outputs
        terms = {"policy": -self._sum(self._gain(logprobs, tokens), tokens)}
        if config.kl_weight:
            kl = KL_ESTIMATORS[config.kl_estimator](tokens.sampler_logprobs, logprobs)
            terms["kl"] = config.kl_weight * self._sum(kl, tokens)
        if self.uses_reference:
            assert tokens.reference_logprobs is not None
            estimate = KL_ESTIMATORS[config.reference_kl_estimator]
            kl = estimate(logprobs, tokens.reference_logprobs)
            terms["reference_kl"] = config.reference_kl_weight * self._sum(kl, tokens)
        if config.entropy_weight:
            terms["entropy"] = -config.entropy_weight * entropy.sum()
        for index, weight in self._entropy_weights().items():
            chosen = torch.where(tokens.segments == index, entropy, torch.zeros_like(entropy))
            terms[f"entropy_{SEGMENTS[index]}"] = -weight * chosen.sum()
        if config.papo and second:
            masked, masked_entropy = second
            terms["papo_kl"] = -config.papo.weight * k3(logprobs, masked).sum()
            if config.papo.entropy_weight:
                terms["papo_entropy"] = config.papo.entropy_weight * entropy.sum()
                terms["papo_masked_entropy"] = config.papo.entropy_weight * masked_entropy.sum()
        return terms

    def metrics(self, outputs: View, tokens: Tokens) -> dict[str, Metric]:
        logprobs, _ = outputs
        gap = logprobs - tokens.sampler_logprobs
        count, ratio = float(len(gap)), torch.exp(gap)
        metrics = super().metrics(outputs, tokens)
        metrics |= mismatch_metrics(logprobs, tokens, self.config.correction)
        if tokens.reference_logprobs is not None:
            moved = float(k3(logprobs, tokens.reference_logprobs).sum())
            metrics["reference_kl"] = Mean(moved, count)
        if self.config.loss in LOSS_DEFAULTS:
            metrics["clip_fraction"] = Mean(float(self.clipped(logprobs, tokens).sum()), count)
        return metrics | {
            "kl": Mean(float(k3(tokens.sampler_logprobs, logprobs).sum()), count),
            "ratio_mean": Mean(float(ratio.sum()), count),
            "ratio_gap": Largest(float((ratio - 1).abs().max()) if count else 0.0),
            "logprob_gap": Largest(float(gap.abs().max()) if count else 0.0),
        }

    def clipped(self, logprobs: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """bool [N]: tokens whose gradient the clip cuts off (of `cispo`: whose weight it cuts)."""
        ratio, advantages = self._ratio(logprobs, tokens), tokens.advantages
        above, below = ratio > 1 + self.config.clip_high, ratio < 1 - self.config.clip_low
        if self.config.loss == "cispo":
            return (above | below) & (advantages != 0)
        return (above & (advantages > 0)) | (below & (advantages < 0))

    def _entropy_weights(self) -> dict[int, float]:
        """The weight of each segment's own bonus, by its index; of those that have one."""
        weights = self.config.entropy_weights
        return {i: w for i, name in enumerate(SEGMENTS) if (w := getattr(weights, name))}

    def _anchor(self, logprobs: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """The log-probs [N] that ratios are against."""
        corrected = self.config.correction.kind != "none"
        return old_logprobs(logprobs, tokens) if corrected else tokens.sampler_logprobs

    def _ratio(self, logprobs: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        gap = logprobs - self._anchor(logprobs, tokens)
        if self.config.loss == "gspo":
            # The value is the sequence's, the gradient each token's own.
            mean = tokens.sequence_sums(gap.detach() * tokens.shares())
            gap = mean[tokens.sequences] + logprobs - logprobs.detach()
        return torch.exp(gap)

    def _gain(self, logprobs: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        config, ratio = self.config, self._ratio(logprobs, tokens)
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        if config.loss not in LOSS_DEFAULTS:
            gain = -own_loss(config, logprobs, self._anchor(logprobs, tokens), tokens)
        elif config.loss == "cispo":
            gain = clipped.detach() * tokens.advantages * logprobs
        else:
            gain = torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)
        if config.correction.kind == "none":
            return gain
        drawn_by = old_logprobs(logprobs, tokens) - tokens.sampler_logprobs
        return correction_weights(config.correction, drawn_by, tokens) * gain

    def _sum(self, values: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """What `aggregation` adds up of values [N], before its denominator."""
        if self.config.aggregation == "sequence_mean":
            values = values * tokens.shares()
        return values.sum()
