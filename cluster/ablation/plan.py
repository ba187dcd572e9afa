"""Ablations: the TOML file that names a question, a base recipe, arms, seeds and a budget.

Cells are runs of `equipoise train` or, with `command = "sft"`, of `equipoise sft`.

`load_ablation` reads it into an `Ablation` with one resolved recipe a cell (arm × difficulty ×
seed), or raises a `RecipeError` with one line for each thing wrong, as `load_recipe` does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from cluster.recipe.algorithm import AlgorithmConfig, SpendConfig
from cluster.recipe.errors import dotted, explain
from cluster.recipe.recipe import Recipe, RecipeError, load_recipe, read_toml
from cluster.recipe.toml_writer import toml_value
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


@dataclass(frozen=True)
class CellName:
    """Which training run of an ablation. `difficulty` is "" where the file names none."""

    id: str
    arm: str
    difficulty: str
    seed: int


@dataclass(frozen=True)
class Cell(CellName):
    """One training run of an ablation, with all that it takes to start it."""

    recipe: Recipe
    command: CellCommand = "train"

    @property
    def steps(self) -> int:
        """Steps of RL or updates of SFT; under a budget of tokens or seconds the most it can do."""
        sft = self.recipe.sft
        return sft.steps if self.command == "sft" and sft else self.recipe.algorithm.steps


@dataclass(frozen=True)
class Ablation:
    """A read ablation; `name` is the file's stem. Cells come seed by seed, so that every seed's
    arms can be compared as soon as possible."""

    name: str
    config: AblationConfig
    base: Recipe
    cells: tuple[Cell, ...]

    def identity(self) -> dict[str, Any]:
        """JSON-able: all that decides the results, so not `parallel`."""
        config = self.config.model_dump(mode="json", exclude={"parallel", "base", "budget"})
        if config["command"] == "train":  # as it was before there was a choice
            del config["command"]
        budget = self.config.budget.model_dump(mode="json", exclude={"expected_minutes"})
        return config | {"budget": budget, "base": self.base.model_dump(mode="json")}


def load_ablation(path: str | Path) -> Ablation:
    """Read an ablation file and resolve the recipe of every cell.

    Raises RecipeError, its message one line for each thing wrong.
    """
    source = Path(path)
    config = _read(source)
    base_path = source.parent / config.base
    try:
        base = load_recipe(base_path, _settings(config.set))
    except RecipeError as error:
        # The loader marks what did not come from the base recipe.
        marked = [line.removesuffix(" (from --set)") for line in str(error).splitlines()]
        lines = [
            f"{source}: base: {line}"
            if line == said
            else f"{source}: set: {line.removeprefix(f'{base_path}: ')}"
            for line, said in zip(marked, str(error).splitlines(), strict=True)
        ]
        raise RecipeError("\n".join(lines)) from None
    errors = [f"{source}: {line}" for line in _misplaced(config)]
    if config.command == "sft":
        errors += [f"{source}: {line}" for line in _unfit_for_sft(base)]
    if not errors:
        errors = [f"{source}: {line}" for line in _refused(config, base_path)]
    if errors:
        raise RecipeError("\n".join(dict.fromkeys(errors)))
    cells = tuple(
        _cell(config, base_path, arm, difficulty, seed)
        for seed in config.seeds
        for difficulty in config.difficulties or (None,)
        for arm in config.arms
    )
    errors = [f"{source}: {line}" for line in _unpaired(config, cells)]
    if errors:
        raise RecipeError("\n".join(dict.fromkeys(errors)))
    return Ablation(source.stem, config, base, cells)


def stored_ablation(identity: Mapping[str, Any]) -> tuple[AblationConfig, tuple[CellName, ...]]:
    """The file and the cells behind an `Ablation.identity` that was read back, recipes left out.

    Raises ValidationError for what no ablation has written.
    """
    config = AblationConfig.model_validate({**identity, "base": "ablation.json"})
    return config, tuple(
        _cell_name(arm, difficulty, seed)
        for seed in config.seeds
        for difficulty in config.difficulties or (None,)
        for arm in config.arms
    )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two `Ablation.identity` dicts: `budget.amount: 40 -> 60`."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    found = []
    for key in dict.fromkeys([*before, *after]):
        if before.get(key, ...) != after.get(key, ...):
            was = _shown(before[key]) if key in before else "not there"
            now = _shown(after[key]) if key in after else "gone"
            found.append(f"{key}: {was} -> {now}")
    return found


def _read(source: Path) -> AblationConfig:
    data = read_toml(source)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", source.stem):
        raise RecipeError(
            f"{source}: the file's name names the ablation; use at most 32 letters, digits, dots, "
            "dashes and underscores"
        )
    try:
        return AblationConfig.model_validate(data)
    except ValidationError as error:
        lines = explain(error.errors(include_url=False), AblationConfig)
        raise RecipeError("\n".join(f"{source}: {dotted(at)}: {said}" for at, said in lines)) from (
            None
        )


def flat(settings: Settings, below: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables; `a.b = 1` in TOML is a table in a table."""
    for key, value in settings.items():
        full = f"{below}.{key}" if below else key
        if isinstance(value, dict) and value:
            yield from flat(value, full)
        else:
            yield full, value


def _overrides(*parts: ArmConfig | DifficultyConfig | None) -> list[str]:
    """What `load_recipe` takes, in order: later ones win."""
    found = []
    for part in parts:
        if isinstance(part, ArmConfig) and part.reward is not None:
            found.append(f"reward={toml_value(part.reward)}")
        if part is not None:
            found += _settings(part.set)
    return found


def _settings(settings: Settings) -> list[str]:
    return [f"{key}={toml_value(value)}" for key, value in flat(settings)]


def _named(config: AblationConfig) -> list[tuple[str, ArmConfig | DifficultyConfig]]:
    arms = [(f"arms[{i}] ({arm.name})", arm) for i, arm in enumerate(config.arms)]
    harder = [(f"difficulties[{i}] ({d.name})", d) for i, d in enumerate(config.difficulties)]
    return [*arms, *harder]


def _misplaced(config: AblationConfig) -> Iterator[str]:
    parts = [("set", config.set), *((f"{at}.set", part.set) for at, part in _named(config))]
    for where, settings in parts:
        for key, _ in flat(settings):
            for field, instead in NOT_AN_ARMS.items():
                if key == field or key.startswith(f"{field}."):
                    yield f"{where}: {key}: {instead}; remove it"
    idle = IDLE[config.command]
    for where, part in _named(config):
        keys = [key for key, _ in flat(part.set)]
        if isinstance(part, ArmConfig) and part.reward is not None:
            keys.append("reward")
        for key in keys:
            if key.partition(".")[0] in idle:
                yield f'{where}: {key}: command = "{config.command}" does not read it; remove it'


def _unfit_for_sft(base: Recipe) -> Iterator[str]:
    if base.sft is None:
        yield 'base: sft: command = "sft" needs this section and it is missing; add [sft]'
    if not base.eval.every:
        yield (
            'eval.every: got 0, and cells of command = "sft" are compared by measurements before, '
            "between and after their updates; set it in the base recipe, or in the file's own set"
        )


def _refused(config: AblationConfig, base: Path) -> Iterator[str]:
    """What the recipe loader says of each arm and difficulty alone, then of them together."""
    alone = list(_named(config))
    common = _settings(config.set)
    lines = [line for where, part in alone for line in _complaints(where, base, common, part)]
    yield from lines
    if not lines:
        for i, arm in enumerate(config.arms):
            for j, harder in enumerate(config.difficulties):
                where = f"arms[{i}] ({arm.name}) with difficulties[{j}] ({harder.name})"
                yield from _complaints(where, base, common, harder, arm)


def _complaints(
    where: str, base: Path, common: Sequence[str], *parts: ArmConfig | DifficultyConfig
) -> Iterator[str]:
    try:
        load_recipe(base, [*common, *_overrides(*parts)])
    except RecipeError as error:
        for line in str(error).splitlines():
            said = line.removeprefix(f"{base}: ").removesuffix(" (from --set)")
            yield f"{where}: {said.removeprefix('--set ')}"


def _cell_name(arm: ArmConfig, difficulty: DifficultyConfig | None, seed: int) -> CellName:
    parts = [arm.name, *([difficulty.name] if difficulty else []), f"seed-{seed}"]
    return CellName("--".join(parts), arm.name, difficulty.name if difficulty else "", seed)


def _cell(
    config: AblationConfig,
    base: Path,
    arm: ArmConfig,
    difficulty: DifficultyConfig | None,
    seed: int,
) -> Cell:
    cell = _cell_name(arm, difficulty, seed)
    recipe = load_recipe(
        base,
        [
            *_settings(config.set),
            *_overrides(difficulty, arm),
            f"seed={seed}",
            f"name={toml_value(cell.id)}",
            f"question={toml_value(config.question)}",
        ],
    )
    if config.command == "sft" and recipe.sft is not None:
        sft = recipe.sft.model_copy(update={"steps": config.budget.amount})
        recipe = recipe.model_copy(update={"sft": sft})
    else:
        algorithm = recipe.algorithm.model_copy(update=_length(config.budget, recipe.algorithm))
        recipe = recipe.model_copy(update={"algorithm": algorithm})
    return Cell(cell.id, cell.arm, cell.difficulty, cell.seed, recipe, config.command)


def _length(budget: BudgetConfig, algorithm: AlgorithmConfig) -> dict[str, Any]:
    """What makes a recipe as long as the budget: `steps`, and a budget of the run's own."""
    if budget.kind == "updates":
        # A remainder is an error of `_unpaired`, which names the arm.
        return {"steps": max(1, budget.amount // algorithm.updates_per_step), "budget": None}
    # More steps than any run can do: a rollout has a token, a step takes more than 10 ms.
    least = {"tokens": algorithm.problems_per_step * algorithm.group_size, "seconds": 0.01}
    steps = math.ceil(budget.amount / least[budget.kind])
    return {"steps": steps, "budget": SpendConfig(kind=budget.kind, amount=budget.amount)}


def _unpaired(config: AblationConfig, cells: Sequence[Cell]) -> Iterator[str]:
    """Arms that would not start from the same weights and problems, or spend another budget."""
    first: dict[tuple[str, int], Cell] = {}
    places = {arm.name: f"arms[{i}] ({arm.name})" for i, arm in enumerate(config.arms)}
    for cell in cells:
        where = places[cell.arm]
        updates = cell.recipe.algorithm.updates_per_step
        counted = config.command == "train" and config.budget.kind == "updates"
        if counted and config.budget.amount % updates:
            yield (
                f"budget.amount: {config.budget.amount} updates cannot be made in whole steps of "
                f"{where}, whose algorithm.updates_per_step is {updates}"
            )
        reference = first.setdefault((cell.difficulty, cell.seed), cell)
        for field in PAIRED[config.command]:
            if _at(cell.recipe, field) != _at(reference.recipe, field):
                yield (
                    f"{where}: {field} differs from that of {places[reference.arm]}, so the arms "
                    "would not be paired; set it in the base recipe, or as [[difficulties]]"
                )


def _at(recipe: Recipe, field: str) -> Any:
    found: Any = recipe
    for part in field.split("."):
        found = getattr(found, part)
    return found


def _leaves(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(below, (*at, key))
    elif isinstance(value, list | tuple) and value:
        for i, below in enumerate(value):
            yield from _leaves(below, (*at, i))
    else:
        yield dotted(at), list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- what an arm is ----------------------------------------------------------------------------


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
    found = {}
    for arm in config.arms:
        sft = plain | {
            key.removeprefix("sft."): value for key, value in flat(arm.set) if key[:4] == "sft."
        }
        others = {key for key, _ in flat(arm.set)} - {"sft.balance", "sft.perception_weight"}
        if sft.get("balance") == "fixed" and not others:
            found[arm.name] = float(sft.get("perception_weight", 0.5))
    return found
