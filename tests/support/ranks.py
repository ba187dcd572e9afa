"""Runs learner ranks in processes of their own and brings back what each update did."""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import pickle
import random
import signal
import socket
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

import learner.engine as learner_engine
from learner.balance import NormOf, SegmentGradients
from learner.batch import MicroBatch, TrainBatch
from learner.engine import DeepSpeedLearner
from learner.losses import Loss
from learner.settings import CheckpointConfig, LearnerConfig
from learner.state import seed_all
from learner.trainer import LearnerSetup, NonFiniteLoss, WorldPlace
from rollout.settings import ModelConfig, TransferConfig


@dataclass(frozen=True)
class Job:
    """Updates, one after the other, by a fresh learner; refused ones are gone past.

    checkpoint: where to write a training checkpoint, and after how many updates; in the
        background it is not begun before the next update is done.
    killed: SIGKILL in the middle of the checkpoint after one update more.
    turns: its states leave for main memory before each update, all but the weights first, and come
        back; and once in between with nothing to do.
    """

    setup: LearnerSetup
    updates: tuple[tuple[TrainBatch, Loss], ...]
    learning_rate: float
    save: str | None = None
    checkpoint: tuple[int, str] | None = None
    measure: tuple[NormOf, ...] = ()
    killed: bool = False
    turns: bool = False


def setup(model: str, dtype: str = "float32", **learner: Any) -> LearnerSetup:
    """What a rank of one thread starts with: fields of [learner]; each layer group by itself."""
    return LearnerSetup(
        ModelConfig.model_validate({"path": model, "dtype": dtype}),
        LearnerConfig.model_validate({"threads": 1, "micro_batch_tokens": 600} | learner),
        TransferConfig(bucket_mib=0.0),
        CheckpointConfig(),
    )


@dataclass
class Outcome:
    """What rank 0 saw.

    Attributes:
        metrics: of each update; norms: of each update's gathered gradients, before the step.
        gradients, moments: of the first update by module name, of what is trained: before
            clipping, and AdamW's first moment after the step.
        state_elements: how many numbers this rank's optimizer keeps as first moments.
        after_first, weights: checkpoint names after the first update and at the end.
        state_at_start, state_after_first: `OptimizerState.tensors` of everything, and the weights
            as `weights/<name>`, of a learner that goes on from a checkpoint.
        logprobs: of the first batch at the end; computed: how many of them this rank computed.
        forwarded: tokens that this rank sent through the model in each update, padding included.
        errors: of updates that were refused.
        draw_at_start, draw_at_checkpoint: see `draws`.
        measured: gradients by segment before each update, one for each of `Job.measure`.
    """

    metrics: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    after_first: dict[str, torch.Tensor] = field(default_factory=dict)
    state_at_start: dict[str, torch.Tensor] = field(default_factory=dict)
    state_after_first: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: list[tuple[str, torch.dtype, tuple[int, ...]]] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    computed: int = 0
    forwarded: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    draw_at_start: list[float] = field(default_factory=list)
    draw_at_checkpoint: list[float] = field(default_factory=list)
    measured: list[SegmentGradients] = field(default_factory=list)
    state_elements: int = 0


def draws() -> list[float]:
    """The next number of each random stream."""
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def run_ranks(ranks: int, jobs: dict[str, Job], folder: Path, seconds: float) -> dict[str, Outcome]:
    """Do all jobs on `ranks` processes; a rank's error is raised with its traceback."""
    out = [folder / f"rank-{rank}.pickle" for rank in range(ranks)]
    _run(ranks, jobs, out, seconds)
    found = [pickle.loads(path.read_bytes()) for path in out if path.exists()]
    for result in found:
        assert isinstance(result, dict), result
    assert len(found) == ranks
    return found[0]


class _Pickler(pickle.Pickler):
    """Tensors as arrays: torch writes each one as a file of its own, which takes minutes here."""

    def reducer_override(self, found: Any) -> Any:
        if not isinstance(found, torch.Tensor):
            return NotImplemented
        array = found.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (array, found.dtype, tuple(found.shape))


def _tensor(array: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(array).view(dtype).reshape(shape)


def run_killed(ranks: int, job: Job, folder: Path, seconds: float) -> None:
    """Do a job that ends by SIGKILL."""
    out = [folder / f"rank-{rank}.pickle" for rank in range(ranks)]
    codes = _run(ranks, {"killed": replace(job, killed=True)}, out, seconds)
    assert -signal.SIGKILL in codes, [path.read_bytes() for path in out if path.exists()]


def _run(ranks: int, jobs: dict[str, Job], out: list[Path], seconds: float) -> list[int | None]:
    """The exit codes of all processes once they ended, or one of them failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{probe.getsockname()[1]}"
    # Each is a fresh fork of a process that has done nothing but import what they need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "deepspeed"])
    processes = [
        context.Process(
            target=_rank, args=(WorldPlace(rank, ranks, master), jobs, str(out[rank]), seconds - 5)
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + seconds
    try:
        # A rank that fails leaves the others waiting for it.
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            assert time.monotonic() < until, f"ranks did not end within {seconds} s"
            wait([p.sentinel for p in processes if p.is_alive()], timeout=1)
        return [p.exitcode for p in processes]
    finally:
        for process in processes:
            process.kill()


def _rank(world: WorldPlace, jobs: dict[str, Job], out: str, seconds: float) -> None:
    faulthandler.dump_traceback_later(seconds)  # where a rank that hangs stands
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # DeepSpeed calls collectives by their older names
    found: Any = {}
    try:
        for name, job in jobs.items():
            outcome = _do(job, world)
            found |= {name: outcome} if world.rank == 0 else {}
    except BaseException:
        found = f"rank {world.rank}:\n{traceback.format_exc()}"
    with open(f"{out}.partial", "wb") as file:
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(found)
    Path(f"{out}.partial").rename(out)
    if isinstance(found, str):
        os._exit(1)


def _do(job: Job, world: WorldPlace) -> Outcome:
    from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state

    seed_all(1, 0, world.rank)  # so that two lives of one job draw alike
    learner = DeepSpeedLearner(job.setup, world)
    outcome = Outcome()
    parameters = learner._engine.module.model.named_parameters()
    named = {name: parameter for name, parameter in parameters if parameter.requires_grad}
    step = learner._step

    def watched() -> float:
        gradients = {name: safe_get_full_grad(p).clone() for name, p in named.items()}
        outcome.gradients = outcome.gradients or gradients
        outcome.norms.append(
            math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        )
        return step()

    learner._step = watched  # type: ignore[method-assign]
    source = learner.weights()
    outcome.draw_at_start = draws()
    if job.setup.resume:
        outcome.state_at_start = whole_state(learner)
    passes: list[int] = []
    counting = learner._engine.module.register_forward_pre_hook(
        lambda _, given: passes.append(given[0].inputs["input_ids"].numel())
    )
    moved_on = threading.Event()
    for done, (batch, loss) in enumerate(job.updates):
        if job.checkpoint and job.checkpoint[0] == done:
            if job.setup.checkpoint.background:
                # The one thread of the writer has this to do first.
                learner._writer._thread.submit(moved_on.wait, 60)
            learner.save_training(Path(job.checkpoint[1]), {"updates": done})
            outcome.draw_at_checkpoint = draws()
            if world.rank == 0:
                assert Path(job.checkpoint[1]).exists() != job.setup.checkpoint.background
        outcome.measured += [learner.segment_gradients(batch, of) for of in job.measure]
        passes.clear()
        if job.turns:
            in_turns(learner)
        try:
            outcome.metrics.append(learner.update(batch, loss, job.learning_rate))
        except NonFiniteLoss as error:
            outcome.errors.append(str(error))
            continue
        outcome.forwarded.append(sum(passes))
        if job.checkpoint and job.checkpoint[0] == done:
            moved_on.set()
            if job.killed:
                _die_in_the_middle_of(learner, Path(job.checkpoint[1]), done + 1)
        if not outcome.after_first:
            state = whole_state(learner)  # which DeepSpeed's own look below rests on
            outcome.state_after_first = state if job.setup.resume else {}
            # Under bfloat16 AdamW steps on float32 twins of these.
            for name, parameter in named.items() if job.setup.model.dtype == "float32" else ():
                if job.setup.learner.zero_stage:
                    moment = safe_get_full_optimizer_state(parameter, "exp_avg")
                else:
                    moment = learner._engine.optimizer.state[parameter]["exp_avg"]
                outcome.moments[name] = moment.clone()
            outcome.after_first = {name: tensor.clone() for name, tensor in source}
    counting.remove()
    states = learner._engine.optimizer.state.values()
    outcome.state_elements = sum(state["exp_avg"].numel() for state in states)
    outcome.metadata = [(m.name, m.dtype, m.shape) for m in source.metadata()]
    outcome.weights = {name: tensor.clone() for name, tensor in source}
    run = learner._engine.module.run

    def counted(micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        outcome.computed += len(micro.tokens.ids) if micro.weight else 0
        return run(micro)

    learner._engine.module.run = counted
    outcome.logprobs = learner.logprobs(job.updates[0][0])
    if job.save:
        learner.save(Path(job.save))
    learner.close()
    return outcome


def in_turns(learner: DeepSpeedLearner) -> None:
    """What samplers on a rank's GPU would make it do; on a CPU its own `offload` does nothing."""
    states = learner._states
    states.offload(weights=False)
    assert learner._engine.optimizer.offloaded_states, "DeepSpeed has moved something"
    list(learner.weights())  # which are sent from the device
    states.offload(weights=True)
    states.reload()
    assert not learner._engine.optimizer.offloaded_states
    states.offload(weights=True)
    states.reload()


def whole_state(learner: DeepSpeedLearner) -> dict[str, torch.Tensor]:
    """`<kind>/<parameter>` -> float32 optimizer state, and the weights as the model has them."""
    weights = {f"weights/{name}": tensor.clone() for name, tensor in learner.weights()}
    groups = learner._optimizer_groups()
    return weights | {name: t.clone() for group in groups for name, t in group.items()}


def _die_in_the_middle_of(learner: DeepSpeedLearner, last: Path, step: int) -> None:
    """Begin one more checkpoint, and die with some of its files written."""
    learner.finish_saving()
    seal = learner_engine.seal

    def killed(folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        os.kill(os.getpid(), signal.SIGKILL)
        seal(folder)

    learner_engine.seal = killed  # type: ignore[assignment]
    learner.save_training(last.with_name(f"step-{step:06d}"), {"updates": step})
    learner.finish_saving()
    time.sleep(60)  # rank 0 is the one that writes
