"""The sections of a recipe, their defaults, and what each refuses."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tasks.core import SEGMENTS, Segment

REWARD_TERMS = (
    "outcome", "perception", "perception_graded", "format", "length", "repetition",
    "group_agreement", "self_consistency", "blind_solver", "blind_policy", "image_dependence",
    "judge",
)  # fmt: skip
"""The reward terms a recipe can name without giving `module:Class`."""

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Weight = Annotated[float, Field(allow_inf_nan=False)]

_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def refusal(message: str, *at: str | int) -> PydanticCustomError:
    """An error whose message is a whole sentence, placed at the field `at` below the model."""
    return PydanticCustomError("recipe", "{message}", {"message": message, "at": at})


class Section(BaseModel):
    """What all sections share: unknown keys and wrong types are errors, nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class ModelConfig(Section):
    """[model] The policy: where its weights come from and how they are held."""

    path: Text
    """A folder with config, weights, tokenizer and processor, or a hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: Positive = 1024
    """Prompt and response together, in tokens, image placeholders included."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    lm_head_float32: bool = True


class TaskConfig(Section):
    """[[tasks]] One source of problems. `weight` is its share of the problems in a step."""

    name: Text
    """`"sudoku"`, `"graph_coloring"`, or `"module:Class"` on the Python path."""
    weight: Rate = 1.0
    data: Text | None = None
    """A Parquet data set to draw problems from instead of generating them."""
    knobs: dict[str, Any] = Field(default_factory=dict)
    """Difficulty of generated problems; resolved against the task's `spec`."""
    style: Literal["terse", "verbose"] = "terse"
    """How the chain-of-thought teacher writes SFT demonstrations."""

    @field_validator("name")
    @classmethod
    def _task_loads(cls, name: str) -> str:
        from tasks.load import load_task

        try:
            load_task(name)
        except ValueError as error:
            raise refusal(str(error)) from error
        return name

    @field_validator("knobs")
    @classmethod
    def _knobs_fit_the_task(cls, knobs: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from tasks.load import load_task

        if "name" not in info.data:  # already reported
            return knobs
        if info.data.get("data") is not None:
            if knobs:
                raise refusal("knobs generate problems, but `data` is set; remove one of them")
            return knobs
        spec = load_task(info.data["name"]).spec
        try:
            return spec.model_validate(knobs).model_dump(mode="json", exclude_none=True)
        except ValidationError as error:
            raise PydanticCustomError(
                "nested", "bad knobs", {"error": error, "model": spec}
            ) from error


class SamplerConfig(Section):
    """[sampler] The vLLM engines. `cpus` and `gpus` are for each of `count` engines."""

    count: Positive = 1
    tensor_parallel: Positive = 1
    cpus: Amount = 1.0
    gpus: Amount = 0.0
    threads: Count = 0
    """Intra-op threads of an engine; 0: as many as `cpus`. With
    `algorithm.max_staleness` = 0 samplers and learner take turns, so on a small machine each may
    use all its cores."""
    kv_cache_gib: Positive = 1
    """KV cache of one engine on a CPU; on a GPU `gpu_memory_utilization` decides instead."""
    max_num_seqs: Positive = 256
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    enforce_eager: bool = True
    temperature: Rate = 1.0
    """Training samples from the whole distribution at this temperature: a cut-off (top-p, top-k)
    would give the sampler log-probs that the learner cannot have. Evaluation is greedy."""
    max_tokens: Positive = 256
    start_timeout_seconds: Rate = 300.0
    request_timeout_seconds: Rate = 600.0
    """A sampler whose oldest request is older hangs, and is started again."""
    heartbeat_seconds: Rate = 120.0
    """A sampler whose engine does not answer a ping for so long hangs, and is started again. The
    first tokens of an engine may take half a minute, in which it does not listen."""
    max_restarts: Count = 3
    """How often one sampler may be started again within `restart_window_seconds`; 0: a sampler
    that is lost ends the run."""
    restart_window_seconds: Rate = 3600.0

    @model_validator(mode="after")
    def _gpus_fit_tensor_parallel(self) -> SamplerConfig:
        if self.gpus > 0 and self.gpus != self.tensor_parallel and not self._shares_one_gpu():
            raise refusal(
                f"got {self.gpus:g} with tensor_parallel = {self.tensor_parallel}; an engine takes "
                f"one GPU a tensor-parallel rank: write gpus = {self.tensor_parallel}",
                "gpus",
            )
        return self

    def _shares_one_gpu(self) -> bool:
        return self.gpus < 1 and self.tensor_parallel == 1


class RewardTermConfig(Section):
    """[[reward.terms]] One named component of the reward."""

    name: Text
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)] | None = (
        None
    )
    """What metrics and records call it; needed where one term is in a recipe twice."""
    weight: Weight = 1.0
    """0 logs the term without rewarding it."""
    final_weight: Weight | None = None
    """The weight at the end of the schedule, where it has one."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    schedule_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the run's steps after which `final_weight` is reached and kept."""
    segments: Annotated[tuple[Segment, ...], Field(strict=False, min_length=1)] = SEGMENTS
    """The tokens that get this term's advantage: credit by segment."""
    gate: Text | None = None
    """Another entry (its label, or its name): below `gate_threshold` this one counts as 0."""
    gate_threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the term's class."""
    on_failure: Literal["abort", "drop_group", "zero"] = "abort"

    @model_validator(mode="after")
    def _schedule_goes_somewhere(self) -> RewardTermConfig:
        if (self.schedule == "constant") != (self.final_weight is None):
            missing = self.final_weight is None
            raise refusal(
                f'"{self.schedule}" needs the weight it goes to; add final_weight'
                if missing
                else 'final_weight is given, and a "constant" weight never gets there; write '
                'schedule = "linear" or "cosine"',
                "schedule",
            )
        return self

    @property
    def entry(self) -> str:
        """What other entries call this one."""
        return self.label or self.name

    def weight_at(self, progress: float) -> float:
        """The weight at a share of the run in [0, 1]."""
        from rewards.compose import weight_at

        end = self.weight if self.final_weight is None else self.final_weight
        return weight_at(self.weight, end, self.schedule, progress / self.schedule_share)

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        if name in REWARD_TERMS or _CLASS_PATH.fullmatch(name):
            return name
        if ":" in name:
            raise refusal(f'expected "module:Class", got "{name}"')
        near = get_close_matches(name, REWARD_TERMS, n=1)
        hint = (
            f'did you mean "{near[0]}"?'
            if near
            else f'known: {", ".join(REWARD_TERMS)}, or your own as "module:Class"'
        )
        raise refusal(f'no reward term "{name}"; {hint}')


class RewardConfig(Section):
    """[reward] What is rewarded. `alpha` is short for `R = alpha * a_p + (1 - alpha) * a`."""

    alpha: Share | None = None
    terms: Annotated[tuple[RewardTermConfig, ...], Field(strict=False)] = ()
    compose: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    workers: Positive = 1
    """Processes that run the terms that compute; each reserves no core of its own."""
    deadline_seconds: Rate = 60.0
    """One call of the computing terms."""
    answer_seconds: Rate = 600.0
    """All that terms ask a model in a step."""
    remote_seconds: Rate = 300.0
    """One group at a remote term (a judge), its retries included."""
    remote_in_flight: Positive = 8
    """Groups that a remote term has in flight at once."""
    memory_gib: Rate = 4.0
    """What a reward worker may allocate before its term fails with a MemoryError."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> RewardConfig:
        if self.alpha is not None and self.terms:
            raise refusal(
                "alpha is short for the terms outcome and perception, and terms are given too; "
                "remove one of them",
                "alpha",
            )
        names = [term.entry for term in self.terms]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise refusal(
                    f'"{name}" is already terms[{names.index(name)}]; give it once, with the sum '
                    "of the weights, or give one of them a label",
                    "terms",
                    i,
                    "name",
                )
        return self

    @model_validator(mode="after")
    def _gates_are_other_entries(self) -> RewardConfig:
        names = [term.entry for term in self.terms]
        for i, term in enumerate(self.terms):
            if term.gate is not None and (term.gate not in names or term.gate == term.entry):
                others = ", ".join(f'"{name}"' for name in names if name != term.entry)
                raise refusal(
                    f'got "{term.gate}", which is no other entry; there is {others or "none"} '
                    "(a gate that should not be rewarded itself has weight = 0)",
                    "terms",
                    i,
                    "gate",
                )
        return self

    @model_validator(mode="after")
    def _composition_makes_sense(self) -> RewardConfig:
        if self.terms and not any(term.weight or term.final_weight for term in self.terms):
            raise refusal("all weights are 0, so nothing is rewarded; weigh one of them", "terms")
        return self

    def effective_terms(self) -> tuple[RewardTermConfig, ...]:
        """The terms that count: `terms`, or what `alpha` stands for, or outcome alone."""
        if self.alpha is None:
            return self.terms or (RewardTermConfig(name="outcome"),)
        return (
            RewardTermConfig(name="outcome", weight=1 - self.alpha),
            RewardTermConfig(name="perception", weight=self.alpha),
        )


class SegmentWeights(Section):
    """[algorithm.segment_weights] What a token's loss is multiplied by, by its segment."""

    perception: Amount = 1.0
    reasoning: Amount = 1.0
    answer: Amount = 1.0


class EntropyWeights(Section):
    """[algorithm.entropy_weights] A bonus on a segment's entropy, a mean over its own tokens."""

    perception: Weight = 0.0
    reasoning: Weight = 0.0
    answer: Weight = 0.0


class PapoConfig(Section):
    """[algorithm.papo] PAPO's implicit perception loss: a second view of masked images."""

    weight: Rate = 0.02
    """Of the KL between the views, which is maximised."""
    entropy_weight: Amount = 0.0
    """Of the entropies of both views, which are minimised ("double entropy")."""
    patch_size: Positive = 14
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

    Formulas, and how they meet the clip, are in `learner.correction.Correction`.
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


class DynamicSamplingConfig(Section):
    """[algorithm.dynamic_sampling] New groups for those without variance (DAPO)."""

    max_rounds: Positive = 4
    """How often a step may ask the samplers for more."""
    max_groups: Positive
    """How many extra groups a step may sample in all its rounds."""


class CurriculumConfig(Section):
    """[algorithm.curriculum] How often each `[[tasks]]` entry comes, by past success on it."""

    strategy: Text = "uniform"
    """`uniform`: by the entries' weights. `success_band`: more where about half of the answers
    are right. Or `"module:Class"`, see `cluster.curriculum.Strategy`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the strategy's class."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """What an entry's running success keeps of itself at each new group."""

    @field_validator("strategy")
    @classmethod
    def _strategy_is_known(cls, name: str) -> str:
        if name in ("uniform", "success_band") or _CLASS_PATH.fullmatch(name):
            return name
        raise refusal(
            f'no strategy "{name}"; known: uniform, success_band, or your own as "module:Class"'
        )


class SpendConfig(Section):
    """[algorithm.budget] What a run may spend: sampled tokens, or seconds of its steps."""

    kind: Literal["tokens", "seconds"]
    amount: Positive


class AlgorithmConfig(Section):
    """[algorithm] One step: sample, score, learn, send the weights back."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "grpo"
    group_size: Annotated[int, Field(ge=2)] = 8
    problems_per_step: Positive = 16
    steps: Positive = 40
    budget: SpendConfig | None = None
    """Ends the run before `steps` when it is spent, and is what schedules go by."""
    loss: Literal["clip", "gspo", "cispo"] = "clip"
    """`aggregation`, `clip_low` and `clip_high` default to what is usual with it."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Over the whole update; `constant` divides by sequences * sampler.max_tokens."""
    clip_low: Share = 0.2
    clip_high: Amount = 0.28
    kl_weight: Amount = 0.0
    """Of the KL to the policy that sampled."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_weight: Weight = 0.0
    """Of a bonus on the mean entropy of all response tokens."""
    drop_zero_variance: bool = True
    max_staleness: Count = 0
    """Policy versions that the oldest token of a group may lag behind the learner when a step
    begins. 0 is on-policy: samplers and learner take turns. Above 0 the samplers go on while
    the learner learns."""
    too_old: Literal["resample", "drop"] = "resample"
    """A group beyond `max_staleness`: sample its problem again, or take another problem."""
    order: Literal["problem", "completion"] = "problem"
    """Which groups a step learns from: those of the run's next problems, the same as without
    staleness, or those that are complete, oldest first. The latter waits for no slow group, and
    learns from long responses later, or finds them too old."""
    updates_per_step: Positive = 1
    """Minibatches a step's rollouts are split into, one optimizer step each."""
    segment_weights: SegmentWeights = SegmentWeights()
    entropy_weights: EntropyWeights = EntropyWeights()
    papo: PapoConfig | None = None
    correction: CorrectionConfig = CorrectionConfig()
    dynamic_sampling: DynamicSamplingConfig | None = None
    curriculum: CurriculumConfig = CurriculumConfig()
    on_mismatch: Literal["warn", "stop"] = "warn"
    """Where sampler and learner disagree by more than arithmetic explains: say so, or end the
    run with an error (the limits: `mismatch` in `cluster/metrics.py`)."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        stale = isinstance(versions := data.get("max_staleness", 0), int) and versions > 0
        corrected = {"correction": {"kind": "token_tis"}} if stale else {}
        return LOSS_DEFAULTS.get(str(data.get("loss", "clip")), {}) | corrected | data

    @model_validator(mode="after")
    def _kl_has_a_gradient(self) -> AlgorithmConfig:
        if self.kl_weight and self.updates_per_step == 1 and self.max_staleness == 0:
            raise refusal(
                f"got {self.kl_weight:g}, but with one update a step the learner still is the "
                "policy that sampled, and the KL to it has no gradient; raise updates_per_step, "
                "or leave kl_weight out",
                "kl_weight",
            )
        return self

    @model_validator(mode="after")
    def _curriculum_knows_the_past(self) -> AlgorithmConfig:
        if self.curriculum.strategy != "uniform" and self.max_staleness:
            raise refusal(
                f'got "{self.curriculum.strategy}" with max_staleness = {self.max_staleness}; '
                "problems are drawn ahead then, before the success on earlier ones is known; use "
                '"uniform" or max_staleness = 0',
                "curriculum",
                "strategy",
            )
        return self

    @model_validator(mode="after")
    def _refilling_makes_sense(self) -> AlgorithmConfig:
        if self.dynamic_sampling is None:
            return self
        if self.advantage not in ("grpo", "dr_grpo", "rloo"):
            raise refusal(
                f'extra groups are scored after the others, and "{self.advantage}" compares all '
                'groups of a batch; use "grpo", "dr_grpo" or "rloo"',
                "advantage",
            )
        if not self.drop_zero_variance:
            raise refusal(
                "got false, and dynamic_sampling puts new groups in the place of those that are "
                "dropped; leave one of them out",
                "drop_zero_variance",
            )
        return self

    @model_validator(mode="after")
    def _staleness_reaches_a_step(self) -> AlgorithmConfig:
        if 0 < self.max_staleness < self.updates_per_step:
            raise refusal(
                f"got {self.max_staleness}, but a step makes {self.updates_per_step} policy "
                "versions (updates_per_step), so nothing could be sampled ahead; write 0, or "
                f"{self.updates_per_step} or more",
                "max_staleness",
            )
        return self

    @model_validator(mode="after")
    def _enough_to_split(self) -> AlgorithmConfig:
        if self.updates_per_step > self.problems_per_step:
            raise refusal(
                f"got {self.updates_per_step}, more than problems_per_step = "
                f"{self.problems_per_step}; a minibatch needs at least one group",
                "updates_per_step",
            )
        return self


class LoraConfig(Section):
    """[learner.lora] Train low-rank adapters beside a frozen policy, and send only them."""

    rank: Positive = 16
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
    cpus: Amount = 1.0
    gpus: Share = 0.0
    threads: Count = 0
    """Intra-op threads of a rank; 0: as many as `cpus`."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    learning_rate: Rate = 2e-5
    weight_decay: Amount = 0.0
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = (0.9, 0.999)
    warmup_steps: Count = 0
    max_grad_norm: Rate = 1.0
    micro_batch_tokens: Positive = 8192
    """Of one forward pass, padding included."""
    layout: Literal["padded", "packed", "shared_prefix"] = "padded"
    """How sequences lie in a micro-batch: a row each, padded to the longest of like length; end to
    end in one row, no token padded or seeing another sequence; or so, and the prompt and image of
    a group are there once."""
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


class TransferConfig(Section):
    """[transfer] How new weights reach the samplers."""

    transport: Literal["host", "nccl", "ipc"] = "host"
    deadline_seconds: Rate = 120.0
    checksum: Literal["first", "never"] = "first"
    """`first`: sending the weights the engines already have must leave their checksums alone."""
    in_flight: Literal["keep", "abort", "wait"] = "keep"
    """Groups that are being sampled when new weights are there (`algorithm.max_staleness` above
    0): `keep` pauses them and they go on under the new weights, `abort` starts them again, with
    `wait` the transfer comes after them."""


class EvalConfig(Section):
    """[eval] The held-out measurement before, after and, if `every` > 0, between steps."""

    problems: Positive = 512
    seed: Count = 1234567
    samples: Positive = 1
    """Sampled responses a problem, for avg@k and pass@k."""
    every: Count = 0
    """Steps between measurements; 0: only before and after."""
    passes: Annotated[
        tuple[Literal["greedy", "sampled", "oracle", "oracle_blank", "blind"], ...],
        Field(strict=False, min_length=1),
    ] = ("greedy", "oracle")
    """`greedy` gives a and a_p, `oracle` a_r; `equipoise eval` always runs them all."""


class SftConfig(Section):
    """[sft] The cold start: supervised fine-tuning on demonstrations."""

    steps: Positive
    batch_size: Positive = 64
    learning_rate: Rate = 2e-3
    warmup_steps: Count = 20
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    balance: Literal["token_mean", "fixed", "ngdiff"] = "fixed"
    """`fixed`: L = w * L_perception + (1 - w) * L_rest, each a mean over its own tokens.
    `ngdiff`: the same with w set by gradient norms, so that both parts pull alike."""
    perception_weight: Share = 0.5
    """w of `fixed`."""
    blind_share: Share = 0.0
    """Share of demonstrations without the image: the perception is given, the rest is learnt.
    1.0 makes a solver for the term `blind_policy` out of a policy that thinks with its eyes."""
    norm_every: Count = 0
    """Updates between measurements of both parts' gradient norms; 0: none. One
    costs about 1.6 updates with `all`, a third of one with `head`."""
    norm_of: Literal["all", "head"] = "all"
    """`all` parameters, or the LM head alone: cheap in time and memory, but what seeing
    changes in the vision tower is out of its sight, so it finds a larger w."""
    norm_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """What `ngdiff` keeps of its last w at each measurement."""
    curriculum: Literal["none", "perception_first"] = "none"
    """`perception_first`: the weight is `curriculum_weight` in the first `curriculum_share` of
    the updates, then as `balance` says."""
    curriculum_share: Share = 0.2
    curriculum_weight: Share = 1.0
    vision_warmup_steps: Count = 0
    vision_warmup_lr: Rate = 2e-3
    save_every: Count = 0
    """Updates between snapshots of the checkpoint; 0: only at the end."""

    @model_validator(mode="after")
    def _ngdiff_measures(self) -> SftConfig:
        if self.balance == "ngdiff" and not self.norm_every:
            raise refusal(
                'got 0, and balance = "ngdiff" weighs by gradient norms; say how often they are '
                "measured: norm_every = 5",
                "norm_every",
            )
        return self


class CheckpointConfig(Section):
    """[checkpoint] Training checkpoints, to resume from: `every` steps and after the last step.

    0: only when the run is told to stop. The last `keep` stay. The policy at the end is always
    left in `checkpoint`.
    """

    every: Count = 0
    keep: Positive = 2
    background: bool = False
    """Go on with the next step while a checkpoint is written. Rank 0 then holds weights and
    optimizer state once more in host memory."""


class OutputConfig(Section):
    """[output] Where runs are written: `folder/<name>-...`."""

    folder: Text = "runs"
