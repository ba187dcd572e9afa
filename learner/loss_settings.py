"""Recipe sections of the loss: `LossConfig`, the part of [algorithm] that the learner reads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.fields import Amount, OneOf, Positive, Rate, Section, Share, Weight, refusal


class SegmentWeights(Section):
    """[algorithm.segment_weights] What a token's loss is multiplied by, by its segment."""

    perception: Amount = 1.0
    """Of tokens of the perception."""
    reasoning: Amount = 1.0
    """Of tokens of the reasoning."""
    answer: Amount = 1.0
    """Of tokens of the answer."""
    act: Amount = 1.0
    """Of tokens of the calls of [environment]."""


class EntropyWeights(Section):
    """[algorithm.entropy_weights] A bonus on a segment's entropy, a mean over its own tokens."""

    perception: Weight = 0.0
    """Of the perception."""
    reasoning: Weight = 0.0
    """Of the reasoning."""
    answer: Weight = 0.0
    """Of the answer."""
    act: Weight = 0.0
    """Of the calls of [environment]."""


class PapoConfig(Section):
    """[algorithm.papo] PAPO's implicit perception loss: a second view of masked images.

    Its formula is in `learner.policy_loss.PolicyLoss`.
    """

    weight: Rate = 0.02
    """Of the KL between the views, which is maximised. It has no upper bound: a large weight ruins
    the policy under the mask."""
    entropy_weight: Amount = 0.0
    """Of the entropies of both views, which are minimised ("double entropy") to counter that."""
    patch_size: Positive = 14
    """Side of a masked patch, in pixels."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Of an image's patches, those painted black."""


LOSS_DEFAULTS = {
    "clip": {"aggregation": "token_mean", "clip_low": 0.2, "clip_high": 0.28},
    "gspo": {"aggregation": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"aggregation": "token_mean", "clip_low": 1.0, "clip_high": 4.0},
}
"""What a loss comes with: a range for a token's ratio would never clip a geometric mean of many."""


CORRECTION_BOUNDS: dict[str, dict[str, float]] = {
    "token_tis": {"high": 2.0},
    "sequence_tis": {"high": 3.0},
    "token_mask": {"high": 2.0},
    "sequence_mask": {"high": 3.0},
    "icepop": {"low": 0.5, "high": 5.0},
    "geometric_mask": {"low": 0.99, "high": 1.01},
}
"""What a correction comes with: 2 a token is usual, 3 a sequence TRL's, the others of their
authors or of those who run them (docs/papers.md)."""


class CorrectionConfig(Section):
    """[algorithm.correction] What a token counts that an older policy, or another arithmetic, drew.

    Formulas, and how they meet the clip, are in `learner.correction`.
    """

    kind: Literal[
        "none", "token_tis", "sequence_tis", "token_mask", "sequence_mask", "icepop",
        "geometric_mask",
    ] = "none"  # fmt: skip
    """`none`, or `token_tis` where `algorithm.max_staleness` is above 0."""
    low: Share = 0.0
    """Lower bound of the masks, on a ratio; 0: none."""
    high: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Upper bound of a token's ratio, a sequence's, or the geometric mean of one."""

    @model_validator(mode="before")
    @classmethod
    def _bounds_of_the_kind(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return CORRECTION_BOUNDS.get(str(data.get("kind", "none")), {}) | data

    @model_validator(mode="after")
    def _bounds_are_used(self) -> CorrectionConfig:
        unused = (
            "low"
            if self.low and self.kind in ("none", "token_tis", "sequence_tis")
            else "high"
            if self.high is not None and self.kind == "none"
            else None
        )
        if unused:
            raise refusal(
                f'got {getattr(self, unused):g}, and kind = "{self.kind}" has no such bound; '
                "leave it out, or choose a kind that masks",
                unused,
            )
        return self


class LossConfig(Section):
    """What of [algorithm] makes the loss of an update, see `learner.policy_loss.PolicyLoss`."""

    loss: Annotated[str, OneOf(tuple(LOSS_DEFAULTS))] = "clip"
    """`aggregation`, `clip_low` and `clip_high` default to what is usual with it. Or a function of
    your own, `"file.py:name"` or `"module:name"`: docs/your_algorithm.md."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of your own `loss`."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Over the whole update; `constant` divides by sequences * sampler.max_tokens."""
    clip_low: Share = 0.2
    """The ratio's lower bound is 1 minus this."""
    clip_high: Amount = 0.28
    """Its upper bound is 1 plus this."""
    kl_weight: Amount = 0.0
    """Of the KL to the policy that sampled."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the KL term."""
    reference_kl_weight: Amount = 0.0
    """Of the KL to `model.path` as it was before training. Above 0 each learner rank holds a second
    whole model; with [learner.lora] it costs no memory, as that is the policy without adapters."""
    reference_kl_estimator: Literal["k2", "k3"] = "k3"
    """`k2` has the exact gradient of KL(policy ‖ reference), `k3` (GRPO's) that of KL(reference ‖
    policy). The gradient of `k1` would be 0 on average."""
    entropy_weight: Weight = 0.0
    """Of a bonus on the mean entropy of all response tokens."""
    entropy_weights: EntropyWeights = EntropyWeights()
    """Bonuses on the entropy of single segments."""
    papo: PapoConfig | None = None
    """A second view of each sequence, under a masked image."""
    correction: CorrectionConfig = CorrectionConfig()
    """Importance-sampling correction of tokens that the learner would draw otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return LOSS_DEFAULTS.get(str(data.get("loss", "clip")), {}) | data

    @model_validator(mode="after")
    def _arguments_are_taken(self) -> LossConfig:
        if self.loss_args and self.loss in LOSS_DEFAULTS:
            raise refusal(f'"{self.loss}" takes none; leave them out', "loss_args")
        return self
