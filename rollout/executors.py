"""What runs a model inside an engine's core; the core ends with the sampler that started it."""

from __future__ import annotations

from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from rollout.starting import end_with_parent


class OneRank(UniProcExecutor):
    """`uni`, in a core that ends with its sampler."""

    def _init_executor(self) -> None:
        end_with_parent()
        super()._init_executor()


class Ranks(MultiprocExecutor):
    """`mp`, in a core that ends with its sampler; vLLM's workers end with their core."""

    def _init_executor(self) -> None:
        end_with_parent()
        super()._init_executor()


def executor(tensor_parallel: int) -> type[Executor]:
    """One rank needs no worker process of its own beside the engine core's."""
    return OneRank if tensor_parallel == 1 else Ranks
