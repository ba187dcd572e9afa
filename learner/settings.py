"""Recipe sections on what learns: [learner], [sft] and [checkpoint]."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.fields import Amount, Count, Positive, Rate, Section, Share, Text, refusal


class LoraConfig(Section):
    """[learner.lora] Train low-rank adapters beside a frozen policy, and send only them."""

    rank: Positive = 16
    """Of both matrices of an adapter."""
    alpha: Rate = 32.0
    """An adapter's part of the output is scaled by alpha/rank."""
    targets: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] = ("language",)
    """Parts (`vision`, `merger`, `language`) or patterns of module names (`"*.q_proj"`), of which
    the linear layers get adapters; the LM head gets none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of an adapter's input in training. Above 0 the learner's log-probs are no longer those of
    the sampler: the ratio of the first update is not 1."""


class LearnerConfig(Section):
    """[learner] The DeepSpeed ranks. `cpus` and `gpus` are for each of `ranks`."""

    ranks: Positive = 1
    """Processes that the learner is divided over, each an actor of its own."""
    cpus: Amount = 1.0
    """Cores of one rank."""
    gpus: Share = 0.0
    """GPUs of one rank."""
    threads: Count = 0
    """Intra-op threads of a rank; 0: as many as `cpus`. More only where samplers and learner take
    turns (`algorithm.max_staleness` = 0)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO divides over the ranks: 1 optimizer state, 2 gradients too, 3 weights too."""
    learning_rate: Rate = 2e-5
    """AdamW's, after the warm-up."""
    weight_decay: Amount = 0.0
    """AdamW's."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = (0.9, 0.999)
    """AdamW's."""
    warmup_steps: Count = 0
    """Steps in which the learning rate rises to its full height."""
    max_grad_norm: Rate = 1.0
    """Gradients with a greater norm are scaled down to it."""
    micro_batch_tokens: Positive = 8192
    """Of one forward pass, padding included."""
    layout: Literal["padded", "packed", "shared_prefix"] = "shared_prefix"
    """How sequences lie in a micro-batch: a row each, padded to the longest of like length, the
    only one that `"eager"` attention takes and its default; end to end in one row, no token padded
    or seeing another sequence; or so, and the prompt and image of a group are there once."""
    logits_mib: Rate = 256.0
    """Of one table of [tokens, vocabulary] logits; more tokens are read off in turns."""
    timeout_seconds: Rate = 3600.0
    """How long one call (start, update, save) may take before the run ends with an error."""
    freeze: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """What is not trained: parts (`vision`, `merger`, `language`, `head`) or patterns of parameter
    names (`"model.visual.blocks.0.*"`). Samplers are not sent what cannot change."""
    rates: dict[str, Rate] = Field(default_factory=dict)
    """[learner.rates] What the learning rate is multiplied by, for parts or patterns as in
    `freeze`; where several match a parameter, the last one counts."""
    activation_checkpointing: bool = False
    """Compute the activations of each layer again for its gradient instead of keeping them."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is held in host memory instead of the GPU's: the optimizer's state (from ZeRO 1), or
    the weights as well (ZeRO 3)."""
    lora: LoraConfig | None = None
    """Train adapters beside a frozen policy."""

    @property
    def intra_op_threads(self) -> int:
        """What `threads` comes to."""
        return self.threads or max(1, int(self.cpus))

    def rate_at(self, step: int) -> float:
        """The learning rate of a step of RL (from 1): linear warm-up, then constant."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        return self.learning_rate

    @model_validator(mode="after")
    def _adapters_or_weights(self) -> LearnerConfig:
        if self.lora and self.freeze:
            raise refusal(
                "with [learner.lora] all weights are frozen; say which layers get adapters by "
                "learner.lora.targets, and remove this",
                "freeze",
            )
        return self

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> LearnerConfig:
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise refusal(
                f'"{self.offload}" needs learner.zero_stage {needed} or higher, got '
                f"{self.zero_stage}",
                "offload",
            )
        return self


class SftConfig(Section):
    """[sft] The cold start: supervised fine-tuning on demonstrations."""

    steps: Positive
    """Updates."""
    batch_size: Positive = 64
    """Demonstrations an update."""
    part: Literal["whole", "perception"] = "whole"
    """Of a demonstration. `perception`: it breaks off where the perception ends, with nothing to
    say that a response does; so a new vision tower learns to write down what it sees."""
    untagged: Literal["error", "whole"] = "error"
    """Of a response without any tag that its task cannot read (a chat of another kind): refused, or
    learnt as a whole, without segments; `balance = "token_mean"` then weighs every token alike."""
    learning_rate: Rate = 2e-3
    """In place of `learner.learning_rate`."""
    warmup_steps: Count = 20
    """In place of `learner.warmup_steps`."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Of the learning rate after the warm-up."""
    balance: Literal["token_mean", "fixed", "ngdiff", "ngdiff_sum"] = "fixed"
    """`fixed`: L = w * L_perception + (1 - w) * L_rest, each a mean over its own tokens.
    `ngdiff`: the same with w set by gradient norms, so that both parts pull alike; the step
    vanishes once either part is solved. `ngdiff_sum`: g_p / |g_p| + g_r / |g_r|, of a length that
    does not."""
    perception_weight: Share = 0.5
    """w of `fixed`."""
    blind_share: Share = 0.0
    """Share of demonstrations without the image: the perception is given, the rest is learnt.
    1.0 makes a solver for the term `blind_policy` out of a policy that thinks with its eyes."""
    call_share: Share = 0.0
    """Share of demonstrations in which the task's teacher calls the [environment] before it
    answers; in the others it answers at once, though it could have called."""
    norm_every: Count = 0
    """Updates between measurements of both parts' gradient norms; 0: none. One
    costs about 1.6 updates with `all`, a third of one with `head`."""
    norm_of: Literal["all", "head"] = "all"
    """`all` parameters, or the LM head alone: cheap in time and memory, but what seeing
    changes in the vision tower is out of its sight, so it finds a larger w."""
    norm_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """What `ngdiff` and `ngdiff_sum` keep of their last w at each measurement."""
    curriculum: Literal["none", "perception_first"] = "none"
    """`perception_first`: the weight is `curriculum_weight` in the first `curriculum_share` of
    the updates, then as `balance` says."""
    curriculum_share: Share = 0.2
    """Of the updates, see `curriculum`."""
    curriculum_weight: Share = 1.0
    """The weight of perception then, see `curriculum`."""
    vision_warmup_steps: Count = 0
    """Updates of the vision tower on the task's vision labels, before SFT; 0: none."""
    vision_warmup_lr: Rate = 2e-3
    """Learning rate of these."""
    save_every: Count = 0
    """Updates between snapshots of the checkpoint; 0: only at the end."""

    def rate_at(self, update: int) -> float:
        """The learning rate of an update (from 1): linear warm-up, then the schedule.

        `linear` and `cosine` fall to a tenth of the peak at the last update.
        """
        peak, warmup = self.learning_rate, self.warmup_steps
        if update <= warmup:
            return peak * update / warmup
        progress = (update - 1 - warmup) / max(1, self.steps - 1 - warmup)
        if self.schedule == "linear":
            return peak * (1 - 0.9 * progress)
        if self.schedule == "cosine":
            return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        return peak

    @model_validator(mode="after")
    def _the_part_is_learnt(self) -> SftConfig:
        if self.part == "perception" and (self.blind_share or self.untagged == "whole"):
            wrong = "blind_share" if self.blind_share else "untagged"
            raise refusal(
                f'got {getattr(self, wrong)!r} with part = "perception", which leaves nothing to '
                "learn of such demonstrations; leave it out",
                wrong,
            )
        return self

    @model_validator(mode="after")
    def _ngdiff_measures(self) -> SftConfig:
        if self.balance.startswith("ngdiff") and not self.norm_every:
            raise refusal(
                f'got 0, and balance = "{self.balance}" weighs by gradient norms; say how often '
                "they are measured: norm_every = 5",
                "norm_every",
            )
        return self


class CheckpointConfig(Section):
    """[checkpoint] Training checkpoints, to resume from: `every` steps and after the last step.

    0: only when the run is told to stop. The last `keep` stay. The policy at the end is always
    left in `checkpoint`.
    """

    every: Count = 0
    """Steps between training checkpoints; 0: only when the run is told to stop."""
    keep: Positive = 2
    """How many of them stay."""
    restarts: Count = 0
    """How often a run whose driver, learner or node died is started again from the last of them, by
    itself (docs/failures.md); needs `every`. 0: it ends."""
    background: bool = False
    """Go on with the next step while a checkpoint is written. Rank 0 then holds weights and
    optimizer state once more in host memory."""

    @model_validator(mode="after")
    def _restarts_from_something(self) -> CheckpointConfig:
        if self.restarts and not self.every:
            raise refusal(
                f"got {self.restarts}, and checkpoint.every is 0, so there would be nothing to go "
                "on from; set that",
                "restarts",
            )
        return self
