"""Actors that outlive their run, so that the next one of the same shape begins with them.

Within `keeping` a run that ended well leaves its engines, the learner's processes and their places
here. What begins with them is as if it were new: the learner loads its model again, and the engines
fetch its weights before anything is asked of them, held against what they held at first
(`cluster.run.train.verify_transfer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import ray

from cluster.recipe.nodes import actors_of
from cluster.recipe.placement import Command, frozen_models
from cluster.recipe.recipe import Recipe
from cluster.run.places import Places
from learner.actor import LearnerGroup
from rollout.jobs import PoolClient, retire
from rollout.pool import SamplerPool

Checksums = dict[str, dict[str, str]]
"""Sampler -> digest of every parameter as its engine holds it."""


@dataclass
class Parts:
    """What a run leaves to the next.

    shape: all of a recipe that is settled when actors start (`shape_of`).
    samplers: by name, of the policy and of frozen models; each is taken by the pool that starts it.
    first_held: what samplers held before they were first sent weights; empty: not looked at.
    """

    shape: str
    places: Places
    learner: LearnerGroup
    samplers: dict[str, PoolClient] = field(default_factory=dict)
    first_held: Checksums = field(default_factory=dict)

    def stop(self) -> None:
        """End every actor."""
        retire([*self.samplers.values()])
        self.learner.stop()
        self.places.release()


class _Keeper:
    active = False
    parts: Parts | None = None


@contextmanager
def keeping() -> Iterator[None]:
    """Within, this process's Ray and the actors of a run that ended well stay for the next run."""
    _Keeper.active = True
    try:
        yield
    finally:
        _Keeper.active = False
        drop()
        ray.shutdown()


def is_keeping() -> bool:
    """Whether Ray is to outlive a run."""
    return _Keeper.active


def take(recipe: Recipe, command: Command) -> Parts | None:
    """What an earlier run has left, if this one can begin with it; anything else is ended."""
    parts, _Keeper.parts = _Keeper.parts, None
    if parts is not None and parts.shape != shape_of(recipe, command):
        parts.stop()
        return None
    return parts


def leave(parts: Parts, pools: Sequence[SamplerPool]) -> bool:
    """Whether a run's parts stay for the next: within `keeping`, with all samplers of its pools up.

    The pools are over then, and the run is not to stop its actors.
    """
    if not _Keeper.active or any(len(p.clients) < p.size() for p in pools):
        return False
    for pool in pools:
        parts.samplers |= {client.name: client for client in pool.release()}
    _Keeper.parts = parts
    return True


def drop() -> None:
    """End what was left."""
    parts, _Keeper.parts = _Keeper.parts, None
    if parts is not None:
        parts.stop()


def shape_of(recipe: Recipe, command: Command) -> str:
    """What two runs have in common if one can begin with the other's actors, as text.

    All of a section counts, also what could be changed in a live actor: so what is trained, and
    with it what engines are sent, is the same.
    """
    sections = (recipe.model, recipe.sampler, recipe.learner, recipe.transfer, recipe.placement)
    return repr((command, sections, frozen_models(recipe, command), actors_of(recipe, command)))
