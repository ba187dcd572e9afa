"""Runs learner ranks in processes of their own and brings back what each update did."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from learner.batch import TrainBatch
from learner.engine import DeepSpeedLearner, LearnerSettings, WorldPlace
from learner.losses import Loss


@dataclass(frozen=True)
class Job:
    """Updates on `batches`, one after the other, by a fresh learner."""

    settings: LearnerSettings
    batches: tuple[TrainBatch, ...]
    loss: Loss
    save: str | None = None


@dataclass
class Outcome:
    """What rank 0 saw: `gradients` and `moments` are of the first update, before clipping and
    after; `weights` are those of the end, `module_names` the names in the module tree."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: list[tuple[str, torch.dtype, tuple[int, ...]]] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


def run_ranks(ranks: int, jobs: dict[str, Job], folder: Path, seconds: float) -> dict[str, Outcome]:
    """Do all jobs on `ranks` processes; a rank's error is raised with its traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{probe.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    out = [folder / f"rank-{rank}.pickle" for rank in range(ranks)]
    processes = [
        context.Process(target=_rank, args=(WorldPlace(rank, ranks, master), jobs, str(out[rank])))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(seconds)
            assert process.exitcode is not None, f"a rank did not end within {seconds} s"
            if process.exitcode:
                break
    finally:
        for process in processes:
            process.kill()
    found = [pickle.loads(path.read_bytes()) for path in out if path.exists()]
    for result in found:
        assert isinstance(result, dict), result
    assert len(found) == ranks
    return found[0]


def _rank(place: WorldPlace, jobs: dict[str, Job], out: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    try:
        found: Any = {name: _do(job, place) for name, job in jobs.items()}
    except BaseException:
        found = f"rank {place.rank}:\n{traceback.format_exc()}"
    Path(f"{out}.partial").write_bytes(pickle.dumps(found))
    Path(f"{out}.partial").rename(out)
    if isinstance(found, str):
        os._exit(1)


def _do(job: Job, place: WorldPlace) -> Outcome:
    from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state

    learner = DeepSpeedLearner(replace(job.settings, threads=1), place)
    outcome = Outcome()
    named = dict(learner._engine.module.model.named_parameters())
    step = learner._step

    def watched() -> float:
        if not outcome.gradients:
            outcome.gradients.update(
                {name: safe_get_full_grad(p).clone() for name, p in named.items()}
            )
        return step()

    learner._step = watched  # type: ignore[method-assign]
    for batch in job.batches:
        outcome.metrics.append(learner.update(batch, job.loss, job.settings.learning_rate))
        if not outcome.moments and job.settings.dtype == "float32":
            for name, parameter in named.items():
                if job.settings.zero_stage:
                    moment = safe_get_full_optimizer_state(parameter, "exp_avg")
                else:
                    moment = learner._engine.optimizer.state[parameter]["exp_avg"]
                outcome.moments[name] = moment.clone()
    source = learner.weights()
    outcome.metadata = [(m.name, m.dtype, m.shape) for m in source.metadata()]
    outcome.weights = {name: tensor.clone() for name, tensor in source}
    outcome.logprobs = learner.logprobs(job.batches[0])
    if job.save:
        learner.save(Path(job.save))
    learner._engine.destroy()
    return outcome
