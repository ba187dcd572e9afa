"""Recipe sections on what is sampled: [model], [[tasks]], [sampler], [transfer] and [eval]."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cluster.recipe_fields import Amount, Count, PathText, Positive, Rate, Section, Text, refusal


class ModelConfig(Section):
    """[model] The policy: where its weights come from and how they are held."""

    path: PathText
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
    data: PathText | None = None
    """A Parquet data set to draw problems from instead of generating them."""
    too_long: Literal["error", "drop"] = "error"
    """Of problems that do not fit the policy: prompt and image leave less than `sampler.max_tokens`
    of `model.max_model_len`, or its processor refuses the image. `error` lists them before anything
    is started; `drop` leaves them out of training and evaluation, counted."""
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


class TransferConfig(Section):
    """[transfer] How new weights reach the samplers."""

    transport: Literal["host", "nccl", "ipc"] = "host"
    deadline_seconds: Rate = 120.0
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
    """Samplers read new weights while the learner goes on, from a copy in its rank 0's memory.
    Needs `algorithm.max_staleness` above 0: without it the learner waits for samples anyway."""


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
