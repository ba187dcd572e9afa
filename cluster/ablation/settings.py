"""The sections of an ablation's file, and what its arms are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from rewards.settings import RewardConfig, RewardTermConfig
from tasks.fields import Count, PathText, Positive, Rate, Section, Share, Text, refusal

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=32)]
Settings = dict[str, Any]

CellCommand = Literal["train", "sft"]

NOT_AN_ARMS = {
    "seed": "the ablation's seeds decide it",
    "name": "each cell gets a name of its own",
    "question": "the ablation's question stands in every cell",
    "output": "cells write below the ablation's folder",
    "job": "the cells of an ablation are one job's",
    "watch": "it decides no result",
    "algorithm.steps": "[budget] decides how long a run is",
    "algorithm.budget": "[budget] decides how long a run is",
    "sft.steps": "[budget] decides how long a run is",
}
"""Fields that no arm or difficulty may set, and what decides them instead."""

IDLE: dict[CellCommand, tuple[str, ...]] = {"train": ("sft",), "sft": ("reward", "algorithm")}
"""Sections that a command does not read, so that an arm which sets them is no arm."""

PAIRED: dict[CellCommand, tuple[str, ...]] = {
    "train": ("model", "tasks", "eval", "algorithm.problems_per_step", "algorithm.order"),
    "sft": (
        "model", "tasks", "eval", "sampler.max_tokens", "sft.batch_size", "sft.blind_share",
        "sft.vision_warmup_steps", "sft.vision_warmup_lr",
    ),
}  # fmt: skip
"""Fields that must be equal over arms: with the seed they decide initial weights, training
problems or demonstrations in their order, and what is measured."""


class ArmConfig(Section):
    """[[arms]] One variant. The first arm is the reference that the others are compared with."""

    name: Label
    note: str | None = None
    """What is different here, in words."""
    reward: Settings | None = None
    """Replaces the base recipe's whole [reward] section."""
    set: Settings = Field(default_factory=dict)
    """Single fields of the recipe: `set = { "learner.learning_rate" = 1e-5 }`."""


class DifficultyConfig(Section):
    """[[difficulties]] A named change of the base recipe that every arm is run under."""

    name: Label
    note: str | None = None
    set: Settings = Field(default_factory=dict)


class BudgetConfig(Section):
    """[budget] What every cell may spend, the same for all arms."""

    kind: Literal["updates", "tokens", "seconds"]
    amount: Positive
    """Of one cell: optimizer updates, sampled response tokens, or seconds of training steps."""
    expected_minutes: Rate | None = None
    """A cell's expected minutes on the machine the file was written for, until one is measured."""

    def in_words(self) -> str:
        """Such as `40 updates`."""
        units = {"updates": "update", "tokens": "sampled token", "seconds": "second"}
        plural = "" if self.amount == 1 else "s"
        of = " of training steps" if self.kind == "seconds" else ""
        return f"{self.amount:,} {units[self.kind]}{plural}{of}"


class AblationConfig(Section):
    """An ablation file."""

    command: CellCommand = "train"
    """What a cell runs: RL, or SFT on demonstrations."""
    question: Text
    base: PathText
    """The recipe that arms vary; a path relative to this file."""
    set: Settings = Field(default_factory=dict)
    """Single fields of the base recipe that every cell changes."""
    seeds: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    arms: Annotated[tuple[ArmConfig, ...], Field(strict=False, min_length=1)]
    difficulties: Annotated[tuple[DifficultyConfig, ...], Field(strict=False)] = ()
    budget: BudgetConfig
    parallel: Positive = 1
    """Cells at one time, where the cores allow it."""
    target: Share | None = None
    """The training accuracy that costs are counted to; by default what the reference ends at."""

    @model_validator(mode="after")
    def _sft_is_counted_in_updates(self) -> AblationConfig:
        if self.command != "sft":
            return self
        if self.budget.kind != "updates":
            raise refusal(
                f'got "{self.budget.kind}", and cells of command = "sft" are counted in updates; '
                'write kind = "updates"',
                "budget",
                "kind",
            )
        if self.target is not None:
            raise refusal(
                'costs are counted to an accuracy of RL training, which command = "sft" has not; '
                "remove it",
                "target",
            )
        return self

    @model_validator(mode="after")
    def _names_and_seeds_are_distinct(self) -> AblationConfig:
        groups: list[tuple[str, list[Any]]] = [
            ("arms", [arm.name for arm in self.arms]),
            ("difficulties", [difficulty.name for difficulty in self.difficulties]),
            ("seeds", list(self.seeds)),
        ]
        for section, values in groups:
            for i, value in enumerate(values):
                if value in values[:i]:
                    where = f"{section}[{values.index(value)}]"
                    message = f"{json.dumps(value)} is already {where}; give each one once"
                    raise refusal(message, section, i)
        return self


def flat(settings: Settings, below: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables; `a.b = 1` in TOML is a table in a table."""
    for key, value in settings.items():
        full = f"{below}.{key}" if below else key
        if isinstance(value, dict) and value:
            yield from flat(value, full)
        else:
            yield full, value


def arm_reward(arm: ArmConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """The arm's reward section: the base recipe's, replaced and changed as the arm says."""
    reward = dict(base.get("reward") or {} if arm.reward is None else arm.reward)
    for key, value in flat(arm.set):
        section, _, field = key.partition(".")
        if section == "reward" and "." not in field:
            reward[field] = value
    return reward


def alpha_of(reward: Mapping[str, Any]) -> float | None:
    """α of a reward α·a_p + (1 − α)·a; 0 for the outcome alone, None for any other."""
    if reward.get("alpha") is not None:
        return float(reward["alpha"])
    try:
        terms = RewardConfig.model_validate(reward).effective_terms()
    except ValidationError:
        return None  # of another version
    # A term credited to some segments only, or whose weight changes, is another reward.
    outcome = RewardTermConfig(name="outcome")
    plain = all(term.model_copy(update={"weight": outcome.weight}) == outcome for term in terms)
    return 0.0 if plain else None


def other_settings(arm: ArmConfig) -> list[tuple[str, Any]]:
    """What an arm sets outside [reward]."""
    return [(key, value) for key, value in flat(arm.set) if key.partition(".")[0] != "reward"]


def fixed_weights(config: AblationConfig, base: Mapping[str, Any]) -> dict[str, float]:
    """Arm -> λ, of the arms of SFT that fix it and set nothing else."""
    plain = dict(base.get("sft") or {})
    weights = {}
    for arm in config.arms:
        sft = plain | {
            key.removeprefix("sft."): value for key, value in flat(arm.set) if key[:4] == "sft."
        }
        others = {key for key, _ in flat(arm.set)} - {"sft.balance", "sft.perception_weight"}
        if sft.get("balance") == "fixed" and not others:
            weights[arm.name] = float(sft.get("perception_weight", 0.5))
    return weights
