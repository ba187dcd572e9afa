"""Everything a run stands on: Ray, its actors, the run folder; started together, ended together.

`Run` is what the driver talks to. A failure of any actor becomes a `RunFailed` with that
actor's own error on top, is written to the run folder, and ends the run; nothing waits for ever.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.recipe.machine import require_answer, told
from cluster.recipe.placement import frozen_models, require_cluster
from cluster.recipe.preflight import preflight
from cluster.recipe.problems import ProblemSource
from cluster.recipe.recipe import Recipe, RunFailed, UserError
from cluster.record.terminal import Progress
from cluster.run.checkpoints import Position, Resumed
from cluster.run.keeping import disk_error
from cluster.run.supervision import Delivery
from learner.actor import LearnerGroup
from learner.checkpoint import checkpoint_folder
from learner.lora import LoraSettings
from learner.trainer import LearnerSettings
from rewards.pool import Limits, RewardPool
from rewards.scored import RewardError
from rollout.dispatch import PoolLimits, SamplerLost
from rollout.engine import EngineSettings
from rollout.pool import PoolClient, SamplerPool
from rollout.sampler import ray_samplers
from rollout.transfer import HostSender, TransferReport, WeightSender, WeightTransferError
from tasks.files import put_text

LOCAL_RAY_TRIES = 3


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Attach to a Ray cluster, or start a local one; leave it, or end it, with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is not None:
        print(f"connecting to {address} ...", file=sys.stderr, flush=True)
        require_answer(address)
    _attach(address)
    try:
        yield
    finally:
        ray.shutdown()


def _attach(address: str | None) -> None:
    """`ray.init`, tried again where a local node was slow to come up.

    Ray gives a new node 30 seconds, which a busy machine can take; it raises a bare Exception.
    Without an address it would join whatever cluster was last started on this machine: a run
    joins only the one that it is told, by `address` or, as the jobs of a cluster are, by
    RAY_ADDRESS.
    """
    own = address is None and not os.environ.get("RAY_ADDRESS")
    job = address is None and not own
    for tries_left in range(LOCAL_RAY_TRIES - 1, -1, -1):
        try:
            # A node of our own hands its environment on, so that the workers that it starts at
            # once are those that the actors get; asked for by each job, they would not fit.
            with _environment(_worker_environment() if own else {}):
                ray.init(
                    address="local" if own else address,
                    include_dashboard=None if address else False,
                    log_to_driver=False,
                    logging_level="error",
                    ignore_reinit_error=True,
                    runtime_env={"env_vars": _worker_environment()} if job else None,
                )
            return
        except Exception as error:
            ray.shutdown()
            if address is not None:
                why = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(f"--address {address}: Ray cannot join it: {why}") from error
            if not tries_left or "timed out" not in str(error):
                raise


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """What is started within has these variables too."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _worker_environment() -> dict[str, str]:
    """What local workers need to find the same code as the driver, and to keep quiet."""
    paths = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def threads_for(cpus: float) -> int:
    """Intra-op threads of an actor that was given `cpus` cores."""
    return max(1, int(cpus))


def engine_settings(
    recipe: Recipe, model: str | None = None, frozen: bool = False
) -> EngineSettings:
    """What a recipe asks of each sampler engine; `frozen` for a model that is no policy."""
    sampler = recipe.sampler
    return EngineSettings(
        model=model or recipe.model.path,
        dtype=recipe.model.dtype,
        max_model_len=recipe.model.max_model_len,
        max_num_seqs=sampler.max_num_seqs,
        kv_cache_gib=sampler.kv_cache_gib,
        gpu_memory_utilization=sampler.gpu_memory_utilization,
        tensor_parallel=sampler.tensor_parallel,
        enforce_eager=sampler.enforce_eager,
        threads=sampler.threads or threads_for(sampler.cpus),
        seed=recipe.seed,
        transport=recipe.transfer.transport,
        frozen=frozen,
    )


def learner_settings(
    recipe: Recipe, model: str | None = None, temperature: float = 1.0, resume: bool = False
) -> LearnerSettings:
    """What a recipe asks of each learner rank; `temperature` is that of the tokens' sampler.

    `resume`: `model` is a training checkpoint to go on from.
    """
    learner = recipe.learner
    return LearnerSettings(
        model=model or recipe.model.path,
        dtype=recipe.model.dtype,
        attention=recipe.model.attention,
        head_float32=recipe.model.lm_head_float32,
        temperature=temperature,
        zero_stage=learner.zero_stage,
        learning_rate=learner.learning_rate,
        weight_decay=learner.weight_decay,
        betas=learner.betas,
        max_grad_norm=learner.max_grad_norm,
        micro_batch_tokens=learner.micro_batch_tokens,
        layout=learner.layout,
        logits_mib=learner.logits_mib,
        bucket_mib=recipe.transfer.bucket_mib,
        threads=learner.threads or threads_for(learner.cpus),
        seed=recipe.seed,
        resume=resume,
        freeze=learner.freeze,
        rates=learner.rates,
        activation_checkpointing=learner.activation_checkpointing,
        offload=learner.offload,
        background_saving=recipe.checkpoint.background,
        lora=LoraSettings(**learner.lora.model_dump()) if learner.lora else None,
        base=recipe.model.path,
    )


def sampler_pool(
    recipe: Recipe, model: str | None = None, name: str = "sampler", frozen: bool = False
) -> SamplerPool:
    """The recipe's samplers on the policy or another checkpoint, or the one of a frozen model.

    They are not yet waited for.
    """
    sampler = recipe.sampler
    limits = PoolLimits(
        sequences=sampler.max_num_seqs,
        request_seconds=sampler.request_timeout_seconds,
        start_seconds=sampler.start_timeout_seconds,
        heartbeat_seconds=sampler.heartbeat_seconds,
        max_restarts=sampler.max_restarts,
        restart_window_seconds=sampler.restart_window_seconds,
    )
    start = ray_samplers(engine_settings(recipe, model, frozen), sampler.cpus, sampler.gpus)
    return SamplerPool(start, 1 if frozen else sampler.count, limits, name)


def learner_group(recipe: Recipe, settings: LearnerSettings) -> LearnerGroup:
    """The recipe's learner ranks; they are not yet started."""
    learner = recipe.learner
    return LearnerGroup(
        settings, learner.ranks, learner.cpus, learner.gpus, learner.timeout_seconds
    )


@contextmanager
def sampling_from(recipe: Recipe, model: str) -> Iterator[SamplerPool]:
    """The recipe's samplers on a checkpoint, without a learner; Ray must be connected."""
    pool = sampler_pool(recipe, model)
    try:
        pool.wait_ready(recipe.sampler.start_timeout_seconds)
        yield pool
    finally:
        pool.stop()


def frozen_pools(recipe: Recipe) -> dict[str, SamplerPool]:
    """An engine for each frozen model that reward terms ask, by checkpoint; not yet waited for."""
    return {
        model: sampler_pool(recipe, model, f"frozen-{place}", frozen=True)
        for place, model in enumerate(frozen_models(recipe))
    }


def reward_pool(recipe: Recipe, models: dict[str, SamplerPool]) -> RewardPool:
    """The recipe's reward workers; `models`: whom terms may ask, the policy under ""."""
    reward = recipe.reward
    return RewardPool(
        reward.effective_terms(),
        reward.compose,
        recipe.algorithm.advantage,
        reward.workers,
        Limits(
            deadline_seconds=reward.deadline_seconds,
            answer_seconds=reward.answer_seconds,
            remote_seconds=reward.remote_seconds,
            remote_in_flight=reward.remote_in_flight,
            memory_gib=reward.memory_gib,
        ),
        models,
    )


class LivePolicy:
    """A learner and the samplers that get its weights by transfer; all that SFT measures with.

    Both start from the same model; of a run that goes on the samplers from the recipe's, since a
    transfer follows.
    """

    def __init__(
        self, recipe: Recipe, sources: Sequence[ProblemSource], learner: LearnerSettings
    ) -> None:
        self.recipe, self.sources = recipe, sources
        self.samplers = sampler_pool(recipe, None if learner.resume else learner.model)
        self.learner = learner_group(recipe, learner)
        self._starting = self.learner.start_async()
        self._delivery = Delivery(
            self.samplers,
            self.learner,
            self._sender,
            reaches_some=recipe.transfer.transport == "host",
        )

    def wait_ready(self) -> None:
        """Return once all are up."""
        self.learner.wait(self._starting)
        self.samplers.wait_ready(self.recipe.sampler.start_timeout_seconds)

    def send_weights(self, version: int) -> TransferReport:
        """Send the learner's weights to the samplers as a policy version (see `Delivery`)."""
        return self._delivery.send(version)

    def renew_weights(self, version: int) -> TransferReport | None:
        """The same after a step; under `transfer.overlap` it is only begun (`Delivery.begin`)."""
        if self.recipe.transfer.overlap:
            return self._delivery.begin(version)
        return self._delivery.send(version)

    def settle_weights(self) -> None:
        """Wait for a transfer that was begun."""
        self._delivery.settle()

    def _sender(self, clients: list[PoolClient]) -> WeightSender:
        transfer = self.recipe.transfer
        if transfer.transport == "host":
            return HostSender(clients, transfer.deadline_seconds)
        from rollout.transports_gpu import GpuSender

        return GpuSender(
            transfer.transport,
            clients,
            self.recipe.sampler.tensor_parallel,
            transfer.deadline_seconds,
        )

    def stop(self) -> None:
        """End every actor."""
        self.samplers.stop()
        self.learner.stop()


class Run(LivePolicy):
    """The live parts of a training run; the learner starts from `checkpoint` where one is given."""

    def __init__(
        self,
        recipe: Recipe,
        sources: list[ProblemSource],
        say: Progress,
        checkpoint: Path | None = None,
    ) -> None:
        start = time.perf_counter()
        say.say("starting samplers (vLLM), learner (DeepSpeed) and reward workers ...")
        model = str(checkpoint) if checkpoint else None
        settings = learner_settings(
            recipe, model, recipe.sampler.temperature, resume=checkpoint is not None
        )
        super().__init__(recipe, sources, settings)
        self.frozen = frozen_pools(recipe)
        self.rewards = reward_pool(recipe, {"": self.samplers, **self.frozen})
        self.wait_ready()
        say.say(f"all up after {time.perf_counter() - start:.0f} s")

    def wait_ready(self) -> None:
        """As for any live policy, the frozen models included."""
        super().wait_ready()
        for pool in self.frozen.values():
            pool.wait_ready(self.recipe.sampler.start_timeout_seconds)

    def news(self) -> list[str]:
        """Which samplers, and engines of frozen models, were lost since the last call, and why."""
        return [loss for pool in (self.samplers, *self.frozen.values()) for loss in pool.news()]

    def save(self, folder: Path, position: Position) -> None:
        """Write a training checkpoint of a run folder, keeping the last `checkpoint.keep`."""
        target = checkpoint_folder(folder, position.step)
        self.learner.save_training(target, position.to_dict(), self.recipe.checkpoint.keep)

    def stop(self) -> None:
        """End every actor."""
        super().stop()
        for pool in self.frozen.values():
            pool.stop()
        self.rewards.close()


@contextmanager
def running(
    recipe: Recipe,
    address: str | None,
    folder: Path,
    say: Progress,
    resumed: Resumed | None = None,
) -> Iterator[Run]:
    """Start a run's actors, or those of a run that goes on; end them whatever happens.

    Input that cannot be used is refused before anything is started or written. Raises RunFailed
    with the failing actor's own error on top; it is also written to `<folder>/error.txt`.
    """
    ready = preflight(recipe, "train", say.say, folder=folder)
    with actor_errors(folder), connected(address):
        require_cluster(recipe, ray.cluster_resources(), "train")
        for reason in resumed.refused if resumed else ():
            say.say(f"warning: checkpoint refused: {reason}")
        if resumed:
            say.say(f"going on after step {resumed.position.step}, from {resumed.checkpoint}")
        run = Run(recipe, ready.sources, say, resumed.checkpoint if resumed else None)
        try:
            yield run
        finally:
            run.stop()


@contextmanager
def actor_errors(folder: Path | None) -> Iterator[None]:
    """Turn an actor's error into RunFailed with that error on top; kept in `folder`, if any."""
    try:
        yield
    except (
        RunFailed,
        RayError,
        RewardError,
        SamplerLost,
        WeightTransferError,
        TimeoutError,
    ) as error:
        message = explain(error)
        if folder is not None:
            with suppress(OSError):  # a full disk may be what ended the run
                folder.mkdir(parents=True, exist_ok=True)
                put_text(folder / "error.txt", message + "\n")
        if isinstance(error, RunFailed):
            raise
        raise RunFailed(message) from error


def explain(error: BaseException) -> str:
    """The actor's own error first, then where it happened."""
    if isinstance(error, RunFailed):
        return str(error)
    if isinstance(error, RayTaskError):
        cause = error.cause
        if (full := disk_error(error)) is not None:
            return told(full)
        return f"{type(cause).__name__}: {cause}\n\n{error}"
    if isinstance(error, RayActorError):
        return f"an actor's process died: {error}"
    return f"{type(error).__name__}: {error}"
