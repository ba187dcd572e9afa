"""The live parts of a run: samplers, learner, reward workers; started together, ended together.

`Run` is what the driver talks to. A part that fails ends the run; nothing waits for ever.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from cluster.recipe.nodes import actors_of
from cluster.recipe.placement import Command
from cluster.recipe.problems import ProblemSource
from cluster.recipe.recipe import Recipe
from cluster.record.evaluation import EvalTable
from cluster.record.terminal import Progress
from cluster.run.checkpoints import Resumed
from cluster.run.delivery import Delivery, GpuDelivery
from cluster.run.engines import FrozenPools, frozen_pools, sampler_pool, sampling_from
from cluster.run.evaluate import evaluate_all
from cluster.run.kept import Parts, leave, shape_of, take
from cluster.run.places import Places, places_of
from cluster.run.session import session
from cluster.run.turns import Turns
from learner.actor import LearnerGroup
from learner.trainer import LearnerSetup
from rewards.advantages import find_advantage
from rewards.pool import RewardPool
from rewards.scored import ScoredGroup
from rollout.jobs import News
from rollout.pool import SamplerPool
from rollout.record import Group
from rollout.transfer import TransferReport


def learner_setup(recipe: Recipe, folder: str = "", resume: bool = False) -> LearnerSetup:
    """What a recipe's ranks of RL are started with (see `LearnerSetup`)."""
    return replace(
        sft_setup(recipe, folder, resume),
        temperature=recipe.sampler.temperature,
        reference=recipe.algorithm.reference_kl_weight > 0,
    )


def sft_setup(recipe: Recipe, folder: str = "", resume: bool = False) -> LearnerSetup:
    """What its ranks of SFT are started with."""
    return LearnerSetup(
        recipe.model,
        recipe.learner,
        recipe.transfer,
        recipe.checkpoint,
        folder,
        resume,
        seed=recipe.seed,
    )


@contextmanager
def learning(recipe: Recipe, setup: LearnerSetup) -> Iterator[LearnerGroup]:
    """A learner without samplers; Ray must be connected."""
    with places_of(recipe, actors_of(recipe, "replay")) as places:
        learner = LearnerGroup(setup, lambda rank: places.options("learner", rank))
        try:
            learner.start()
            yield learner
        finally:
            learner.stop()


@contextmanager
def sampling_and_scoring(recipe: Recipe) -> Iterator[tuple[SamplerPool, Scoring]]:
    """The recipe's samplers and reward workers, without a learner; Ray must be connected."""
    with sampling_from(recipe, recipe.model.path, "sample") as (pool, frozen, places):
        scoring = Scoring(recipe, pool, frozen, places)
        try:
            yield pool, scoring
        finally:
            scoring.stop()


class Scoring:
    """The reward workers."""

    def __init__(
        self, recipe: Recipe, policy: SamplerPool, frozen: FrozenPools, places: Places
    ) -> None:
        """`policy`, `frozen`: whom terms may ask."""
        models = {"": policy, **frozen}
        algorithm = recipe.algorithm
        advantage = find_advantage(algorithm.advantage, algorithm.advantage_args)
        drops = recipe.environment is not None and recipe.environment.on_failure == "drop_group"
        self._rewards = RewardPool(recipe.reward, advantage, models, places.options, drops)

    def score(
        self, groups: Sequence[Group], share: float
    ) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Groups with their rewards at a share of the run, and what the workers have counted.

        Counted since the run began: restarts, and what remote terms count of themselves.
        """
        scored = self._rewards.score(groups, share)
        counts = {f"reward/{name}": value for name, value in self._rewards.counts().items()}
        return scored, counts | {"reward/worker_restarts": float(self._rewards.restarts)}

    def stop(self) -> None:
        """End every actor."""
        self._rewards.close()


def sampler_metrics(samplers: SamplerPool, frozen: Mapping[str, SamplerPool]) -> dict[str, float]:
    """What befell the samplers since the run began, under `sampler/`.

    Under `frozen/` the same of the engines of frozen models, all together.
    """
    together: Counter[str] = Counter()
    for pool in frozen.values():
        together.update(pool.counts())
    of_frozen = {f"frozen/{name}": value for name, value in together.items()}
    return {f"sampler/{name}": value for name, value in samplers.counts().items()} | of_frozen


def new_parts(recipe: Recipe, command: Command, learner: LearnerSetup) -> Parts:
    """Places of a command's actors, and the learner's ranks in theirs; no sampler yet."""
    places = Places(recipe, actors_of(recipe, command))
    group = LearnerGroup(learner, lambda rank: places.options("learner", rank))
    return Parts(shape_of(recipe, command), places, group)


class LivePolicy:
    """A learner and the samplers that get its weights by transfer; all that SFT measures with.

    Both start from the same model; of a run that goes on the samplers from the recipe's, since a
    transfer follows.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[ProblemSource],
        learner: LearnerSetup,
        command: Command = "sft",
    ) -> None:
        self.recipe, self.sources = recipe, sources
        self.parts = take(recipe, command) or new_parts(recipe, command, learner)
        places, waiting = self.parts.places, self.parts.samplers
        self.frozen = frozen_pools(recipe, command, places, waiting)
        self.places, self.learner = places, self.parts.learner
        self.learner.begin(learner)
        on_one_gpu = recipe.paired
        if on_one_gpu:
            # An engine measures the memory that is free while it starts.
            self._starting = self.learner.start_async()
            self.learner.wait(self._starting)
            if recipe.placement.by_turns:
                self.learner.offload()
        start = None if learner.resume else learner.start
        self.samplers = sampler_pool(recipe, places, start, waiting=waiting)
        if not on_one_gpu:  # last, for it waits for the process of rank 0
            self._starting = self.learner.start_async()
        self.turns = Turns(self.samplers, self.learner) if recipe.placement.by_turns else None
        if self.turns:
            self.samplers.turn = partial(self.turns.enter, "sampling")
            self.learner.turn = partial(self.turns.enter, "learning")
            self.learner.sending = partial(self.turns.enter, "sending")
        self._delivery = (
            Delivery(self.samplers, self.learner)
            if recipe.transfer.transport == "host"
            else GpuDelivery(
                self.samplers, self.learner, recipe.transfer, recipe.sampler.tensor_parallel
            )
        )

    def wait_ready(self) -> None:
        """Return once all are up."""
        self.learner.wait(self._starting)
        for pool in (self.samplers, *self.frozen.values()):
            pool.wait_ready(self.recipe.sampler.start_timeout_seconds)

    def evaluate(self) -> dict[str, EvalTable]:
        """The recipe's evaluation of the policy that the samplers have, a table a task."""
        return evaluate_all(self.samplers, self.sources, self.recipe, self.frozen)

    def send_weights(self, version: int) -> TransferReport:
        """Have all samplers that are up hold the learner's weights as a policy version."""
        return self._delivery.send(version)

    def renew_weights(self, version: int) -> TransferReport | None:
        """The same after a step; under `transfer.overlap` it is only begun (`Delivery.begin`)."""
        deliver = self._delivery.begin if self.recipe.transfer.overlap else self._delivery.send
        return deliver(version)

    def settle_weights(self) -> None:
        """Wait for a transfer that was begun."""
        self._delivery.settle()

    def stop(self, ended_well: bool = False) -> None:
        """End every actor, or leave them to the next run (`cluster.run.kept`)."""
        pools = (self.samplers, *self.frozen.values())
        # Engines that GPUs send weights to are not left: that was never run.
        if ended_well and self.recipe.transfer.transport == "host" and leave(self.parts, pools):
            return
        for pool in pools:
            pool.stop()
        self.parts.stop()


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
        folder, resume = str(checkpoint or ""), checkpoint is not None
        setup = learner_setup(recipe, folder, resume)
        super().__init__(recipe, sources, setup, "train")
        self.scoring = Scoring(recipe, self.samplers, self.frozen, self.places)
        self.wait_ready()
        say.say(f"all up after {time.perf_counter() - start:.0f} s")

    def counts(self) -> dict[str, float]:
        """What befell the samplers (`sampler_metrics`), and what turns took where there are any."""
        turns = self.turns.counts() if self.turns else {}
        return sampler_metrics(self.samplers, self.frozen) | turns

    def news(self) -> list[News]:
        """Which samplers, and engines of frozen models, were lost or came back since last asked."""
        pools = (self.samplers, *self.frozen.values())
        return [one for pool in pools for one in pool.news()]

    def stop(self, ended_well: bool = False) -> None:
        """The same, and end the reward workers."""
        self.scoring.stop()
        super().stop(ended_well)


@contextmanager
def running(
    recipe: Recipe,
    address: str | None,
    folder: Path,
    say: Progress,
    resumed: Resumed | None = None,
) -> Iterator[Run]:
    """A run's actors, or those of a run that goes on; ended whatever happens (see `session`)."""
    with session(recipe, "train", address, folder, say.say, resumed) as ready:
        say.steps = ready.recipe.algorithm.steps
        run = Run(ready.recipe, ready.sources, say, resumed.checkpoint if resumed else None)
        ended_well = False
        try:
            yield run
            ended_well = True
        finally:
            run.stop(ended_well)
