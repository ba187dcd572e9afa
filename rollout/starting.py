"""Starting an engine: what vLLM is told, and its own words when it does not start."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch

from rollout.engine_thread import EngineThread
from rollout.settings import ModelConfig, SamplerConfig
from rollout.tokens import load_processor, load_reader, pixel_limits, tokenizer_of
from tasks.fetched import fetched
from tasks.importing import hidden, importing

PLAIN = re.compile(r"[\w./-]+", re.ASCII)
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\)\s*)?((ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\]\s*)?")
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b")
ENGINE_BACKENDS = {"host": "host", "nccl": "watched_nccl", "ipc": "plain_ipc"}
"""Transport -> the engine's end of it, as `rollout.transports` registers it."""
_EMPTY = "root cause"
"""In what vLLM says for an error that it only printed, that of a rank in a process of its own."""


class EngineNotStarted(RuntimeError):
    """An engine that did not start; the message names the model and the engine's own last error."""


def plain_path(model: str) -> str:
    """A model's path as vLLM can be given it, which finds the weights by a pattern.

    A folder of another name than letters, digits, `_`, `.` and `-` is reached by a link in the
    folder for temporary files; hub names stay as they are.
    """
    if PLAIN.fullmatch(model) or not os.path.isdir(model):
        return model
    folder = tempfile.gettempdir()
    target = os.path.realpath(model)
    name = f"equipoise-model-{os.getuid()}-{hashlib.sha256(os.fsencode(target)).hexdigest()[:16]}"
    link = Path(folder if PLAIN.fullmatch(folder) else "/tmp", name)
    fresh = link.with_name(f"{name}.{os.getpid()}")
    fresh.symlink_to(target)
    os.replace(fresh, link)
    return str(link)


def start_engine(
    model: ModelConfig, sampler: SamplerConfig, **options: Any
) -> tuple[EngineThread, Any]:
    """A started engine, and what reads prompts for it. `options`: of `engine_args`."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Cores are Ray's to hand out; vLLM's own pinning would stack two engines on one core.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["OMP_NUM_THREADS"] = str(sampler.engine_threads)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # or the core gets a process of its own
    slow = ["scipy.signal", "cv2"]  # for speech and video
    if sampler.eager and not torch.accelerator.is_available():
        # A few small functions would be compiled all the same, at the first request: that takes a
        # C++ compiler longer than a CPU run can ever win back. Read when torch._dynamo is imported.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        slow.append("torch._inductor.lowering")
    with importing(), hidden(*slow):  # vLLM does without them
        args, processor = engine_args(model, sampler, **options)
        importlib.import_module("vllm.v1.engine.llm_engine")
    with own_errors(model.path):
        return EngineThread(args, sampler.engine_threads), processor


def engine_args(
    model: ModelConfig,
    sampler: SamplerConfig,
    transport: str,
    frozen: bool,
    seed: int,
    sleeps: bool = False,
) -> tuple[Any, Any]:
    """What vLLM is told of an engine, and what reads prompts for it."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    processor = load_reader(model.path) if frozen else load_processor(model.path, reading=model)
    options: dict[str, Any] = {}
    if tokenizer_of(processor) is not processor:
        options["limit_mm_per_prompt"] = {"video": 0}
        if limits := pixel_limits(processor):
            images = processor.image_processor
            fitting = model.max_model_len * (images.patch_size * images.merge_size) ** 2
            most = max(limits["shortest_edge"], min(limits["longest_edge"], fitting))
            options["mm_processor_kwargs"] = scaled_to(limits | {"longest_edge": most})
    if not frozen:
        if model.sampler_dtype != "float32" and model.lm_head_float32:
            options["hf_overrides"] = {"head_dtype": "float32"}  # as the learner's is
        options["worker_extension_cls"] = "rollout.transports.WorkerExtension"
        options["weight_transfer_config"] = WeightTransferConfig(backend=ENGINE_BACKENDS[transport])
    if current_platform.is_cpu():
        options["kv_cache_memory_bytes"] = round(sampler.kv_cache_gib * 2**30)
        # A prompt read in pieces throws the token drawn after each piece away and takes its
        # seed's stream back by an offset, which a CPU's generator does not have.
        options["enable_chunked_prefill"] = False
    elif sleeps:  # a CPU engine refuses the option, and its workers leave the call unheeded
        options["enable_sleep_mode"] = True
    args = EngineArgs(
        model=fetched(model.path),
        dtype=model.sampler_dtype,
        max_model_len=model.max_model_len,
        **sampler.model_dump(include={"max_num_seqs", "gpu_memory_utilization"}),
        enforce_eager=sampler.eager,
        tensor_parallel_size=sampler.tensor_parallel,
        distributed_executor_backend="uni" if sampler.tensor_parallel == 1 else "mp",
        seed=seed,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        **options,
    )
    args.model = plain_path(fetched(model.path))
    return args, processor


def scaled_to(limits: dict[str, int]) -> dict[str, Any]:
    """What vLLM is told of the pixels that images are scaled to (see `pixel_limits`).

    An engine is told of no larger image than fits the context: it sets memory aside for one of the
    largest (16,384 tokens by the processor of Qwen3-VL). A request is told of the processor's own
    limits, which count: so no image is scaled down because the engine had not thought of it.
    """
    return {"images_kwargs": {"size": limits}}


@contextmanager
def own_errors(model: str) -> Iterator[None]:
    """Within, an engine that does not start raises EngineNotStarted with its own last error.

    A rank in a process of its own tells why on the output that it shares with this one; that of an
    actor is a file.
    """
    before = {descriptor: _length(descriptor) for descriptor in (1, 2)}
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        if _EMPTY in why:
            output = "".join(_written_since(descriptor, at) for descriptor, at in before.items())
            why = last_error(output) or why
        raise EngineNotStarted(f"model {model}: the engine does not start: {why}") from error


def own_words(message: str) -> str:
    """What an engine that did not start said, of a longer message about its actor; else that."""
    causes = re.findall(r"EngineNotStarted: (.*)", message)
    return causes[-1] if causes else message


def last_error(output: str) -> str:
    """The line of an output that names an error: the last `SomeError: ...`; "" without one."""
    lines = [_PREFIX.sub("", line.strip()).strip() for line in output.splitlines()]
    named = [line for line in lines if _ERROR.match(line) and _EMPTY not in line]
    return named[-1][:300] if named else ""


def _length(descriptor: int) -> int:
    with suppress(OSError):
        status = os.fstat(descriptor)
        return status.st_size if S_ISREG(status.st_mode) else -1
    return -1


def _written_since(descriptor: int, start: int) -> str:
    """What was written to a file since it had a length; nothing of what is no file."""
    if start < 0:
        return ""
    with suppress(OSError), open(f"/proc/self/fd/{descriptor}", "rb") as file:
        file.seek(start)
        return file.read().decode("utf-8", "replace")
    return ""
