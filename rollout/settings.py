"""Recipe sections on what is sampled: [model], [sampler], [environment], [transfer], staleness."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.calls import CallForm
from tasks.environments import BUILT_IN as ENVIRONMENTS
from tasks.fields import Amount, Count, OneOf, PathText, Positive, Rate, Section, refusal, refuse

Order = Literal["problem", "completion"]


class ModelConfig(Section):
    """[model] The policy: where its weights come from and how they are held."""

    path: PathText
    """A folder with config, weights, tokenizer and processor, a hub name, or the URI of such a
    folder (`s3://…`, `gs://…`, `file:///…`), of which each node fetches a copy."""
    dtype: Literal["float32", "bfloat16", "mixed"] = "float32"
    """Of the weights, in the samplers and in the learner. `mixed`: bfloat16 in the samplers;
    float32 in checkpoints and in the learner, which multiplies in bfloat16 (autocast)."""
    max_model_len: Positive = 1024
    """Prompt and response together, in tokens, image placeholders included."""
    attention: Literal["sdpa", "eager", "flash"] = "sdpa"
    """How the learner computes attention. `flash`: the language model's by torch's own
    FlashAttention, on GPUs and in bfloat16."""
    lm_head_float32: bool = True
    """Compute logits in float32 whatever `dtype` is: then sampler and learner agree."""
    min_pixels: Count = 0
    """An image of fewer pixels is enlarged, by a family that scales images so; 0: the processor's
    own. What a checkpoint's processor has is saved with it."""
    max_pixels: Count = 0
    """An image of more pixels is scaled down, which bounds its tokens; 0: the processor's own."""
    system_prompt: str = ""
    """What the policy is told before the user's turn: in training, evaluation and SFT. Frozen
    models of reward terms are not told."""

    @property
    def learner_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the learner's weights, and of checkpoints."""
        return "float32" if self.dtype == "mixed" else self.dtype

    @property
    def sampler_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the samplers' weights, and of what they are sent."""
        return "bfloat16" if self.dtype == "mixed" else self.dtype

    @model_validator(mode="after")
    def _pixels_fit(self) -> ModelConfig:
        least, most = self.min_pixels, self.max_pixels
        refuse(0 < most < least, "max_pixels", f"got {most}, which is below min_pixels = {least}")
        return self


class SamplerConfig(Section):
    """[sampler] The vLLM engines. `cpus` and `gpus` are for each of `count` engines."""

    count: Positive = 1
    """Engines, each an actor of its own."""
    tensor_parallel: Positive = 1
    """GPUs, or processes, that one engine is divided over."""
    cpus: Amount = 1.0
    """Cores of one engine."""
    gpus: Amount = 0.0
    """GPUs of one engine: as many as `tensor_parallel`, or a part of one."""
    threads: Count = 0
    """Intra-op threads of an engine; 0: as many as `cpus`. With
    `algorithm.max_staleness` = 0 samplers and learner take turns, so on a small machine each may
    use all its cores."""
    kv_cache_gib: Rate = 1.0
    """KV cache of one engine on a CPU; on a GPU `gpu_memory_utilization` decides instead."""
    max_num_seqs: Positive = 256
    """Responses that one engine samples at a time."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Of a GPU's memory, the share that an engine fills, while it is awake."""
    enforce_eager: bool | None = None
    """Run the model without CUDA graphs and compilation: starts sooner, samples slower. By default
    on CPUs only."""
    temperature: Rate = 1.0
    """Training samples from the whole distribution at this temperature: a cut-off (top-p, top-k)
    would give the sampler log-probs that the learner cannot have. Evaluation is greedy."""
    max_tokens: Positive = 256
    """Of one response."""
    start_timeout_seconds: Rate = 300.0
    """How long an engine may take to come up."""
    request_timeout_seconds: Rate = 600.0
    """A sampler whose oldest request is older hangs, and is started again."""
    heartbeat_seconds: Rate = 120.0
    """A sampler whose engine does not answer a ping for so long hangs, and is started again. The
    first tokens of an engine may take half a minute, in which it does not listen."""
    max_restarts: Count = 3
    """How often one sampler may be started again within `restart_window_seconds`; 0: a sampler
    that is lost ends the run."""
    restart_window_seconds: Rate = 3600.0
    """The time that `max_restarts` are counted in."""

    @property
    def eager(self) -> bool:
        """Whether an engine runs without graphs and compilation."""
        return self.gpus == 0 if self.enforce_eager is None else self.enforce_eager

    @property
    def engine_threads(self) -> int:
        """Intra-op threads of an engine."""
        return self.threads or max(1, int(self.cpus))

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


class EnvironmentConfig(Section):
    """[environment] What answers the policy between its turns; without it a response is one turn.

    What does not fit a budget whole is not added, and the response ends there.
    """

    name: Annotated[str, OneOf(tuple(ENVIRONMENTS))]
    """`zoom`, `mark`, or a class of your own (docs/environments.md)."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its class."""
    calls: CallForm = "tags"
    """How the policy writes a call: `tags` (`<look>0 0 500 500</look>`), or `json` as chat
    templates have it (`<tool_call>{"name": "look", "arguments": {...}}</tool_call>`)."""
    turns: Positive = 3
    """Of the policy, in one response. `sampler.max_tokens` is for all of them together."""
    images: Count = 4
    """That the environment shows in one response."""
    image_tokens: Positive = 1024
    """What these take together."""
    step_seconds: Rate = 10.0
    """How long it may take for one answer before its process is ended."""
    seconds: Rate = 60.0
    """How long for all answers in one response."""
    workers: Positive = 2
    """Processes beside each sampler; each answers one call at a time."""
    memory_gib: Amount = 2.0
    """What such a process may allocate."""
    on_failure: Literal["score", "drop_group"] = "score"
    """A response whose environment failed ends there, with `finish_reason` "environment". `score`:
    it is scored as it stands; `drop_group`: nothing is learnt from its group."""


class StalenessConfig(Section):
    """[algorithm] What a step learns from, and how old it may be."""

    problems_per_step: Positive = 16
    """Groups that a step learns from."""
    max_staleness: Count = 0
    """Policy versions that the oldest token of a group may lag behind the learner when a step
    begins. 0 is on-policy: samplers and learner take turns. Above 0 the samplers go on while
    the learner learns."""
    too_old: Literal["resample", "drop"] = "resample"
    """A group beyond `max_staleness`: sample its problem again, or take another problem."""
    order: Order = "problem"
    """Which groups a step learns from: those of the run's next problems, the same as without
    staleness, or those that are complete, oldest first. The latter waits for no slow group, and
    learns from long responses later, or finds them too old."""
    updates_per_step: Positive = 1
    """Minibatches a step's rollouts are split into, one optimizer step, and so one policy version,
    each."""

    @property
    def steps_ahead(self) -> int:
        """Steps whose groups may be sampled before the weights they are learnt with are there.

        A group started `s` steps ahead is `s` x `updates_per_step` versions old when its step
        begins, if no other overtakes it.
        """
        return self.max_staleness // self.updates_per_step

    @model_validator(mode="after")
    def _staleness_reaches_a_step(self) -> StalenessConfig:
        stale, updates = self.max_staleness, self.updates_per_step
        refuse(
            0 < stale < updates,
            "max_staleness",
            f"got {stale}, but a step makes {updates} policy versions (updates_per_step), so "
            f"nothing could be sampled ahead; write 0, or {updates} or more",
        )
        return self


class TransferConfig(Section):
    """[transfer] How new weights reach the samplers."""

    transport: Literal["host", "nccl", "ipc"] = "host"
    """`host`: through Ray's object store. `nccl` and `ipc`: between GPUs."""
    deadline_seconds: Rate = 120.0
    """How long one transfer may take before the run ends with an error."""
    bucket_mib: Amount = 64.0
    """Layer groups that are smaller are sent together up to this size; 0: each by itself, as
    those of [learner.lora] always are: the engine merges one at a time."""
    checksum: Literal["first", "never"] = "first"
    """`first`: sending the weights the engines already have must leave their checksums alone."""
    in_flight: Literal["keep", "abort", "wait"] = "keep"
    """Groups that are being sampled when new weights are there (`algorithm.max_staleness` above
    0): `keep` pauses them and they go on under the new weights, `abort` starts them again, with
    `wait` the transfer comes after them."""
    overlap: bool = False
    """Samplers fetch new weights while the learner goes on, from Ray's object store.
    Needs `algorithm.max_staleness` above 0: without it the learner waits for samples anyway."""
