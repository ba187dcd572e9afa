"""Ablations: the TOML file that names a question, a base recipe, arms, seeds and a budget.

Cells are runs of `equipoise train` or, with `command = "sft"`, of `equipoise sft`.

`load_ablation` reads it into an `Ablation` with one resolved recipe a cell (arm × difficulty ×
seed), or raises a `RecipeError` with one line for each thing wrong, as `load_recipe` does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.ablation.settings import (
    IDLE,
    NOT_AN_ARMS,
    PAIRED,
    AblationConfig,
    ArmConfig,
    BudgetConfig,
    CellCommand,
    DifficultyConfig,
    Settings,
    flat,
)
from cluster.recipe.algorithm import AlgorithmConfig, SpendConfig
from cluster.recipe.errors import dotted, explain
from cluster.recipe.recipe import Recipe, RecipeError, load_recipe, read_toml
from cluster.recipe.toml_writer import toml_value


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
        base = self.base.model_dump(mode="json", exclude={"job", "watch"})
        return config | {"budget": budget, "base": base}


def load_ablation(path: str | Path) -> Ablation:
    """Read an ablation file and resolve the recipe of every cell.

    Raises RecipeError, its message one line for each thing wrong.
    """
    source = Path(path)
    config = _read_config(source)
    base_path = source.parent / config.base
    try:
        base = load_recipe(base_path, _settings(config.set))
    except RecipeError as error:
        # The loader marks what did not come from the base recipe.
        mark = " (from --set)"
        _refuse(
            source,
            (
                f"set: {line.removesuffix(mark).removeprefix(f'{base_path}: ')}"
                if line.endswith(mark)
                else f"base: {line}"
                for line in str(error).splitlines()
            ),
        )
        raise
    unfit = _unfit_for_sft(base) if config.command == "sft" else ()
    _refuse(source, [*_misplaced(config), *unfit])
    _refuse(source, _refused(config, base_path))
    cells = tuple(
        _cell(config, base_path, arm, difficulty, seed) for arm, difficulty, seed in _grid(config)
    )
    _refuse(source, _unpaired(config, cells))
    return Ablation(source.stem, config, base, cells)


def _refuse(source: Path, faults: Iterable[str]) -> None:
    """Raise RecipeError if there are any, each once."""
    if lines := [f"{source}: {fault}" for fault in faults]:
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def _grid(config: AblationConfig) -> Iterator[tuple[ArmConfig, DifficultyConfig | None, int]]:
    for seed in config.seeds:
        for difficulty in config.difficulties or (None,):
            yield from ((arm, difficulty, seed) for arm in config.arms)


def stored_ablation(identity: Mapping[str, Any]) -> tuple[AblationConfig, tuple[CellName, ...]]:
    """The file and the cells behind an `Ablation.identity` that was read back, recipes left out.

    Raises ValidationError for what no ablation has written.
    """
    config = AblationConfig.model_validate({**identity, "base": "ablation.json"})
    return config, tuple(_cell_name(*which) for which in _grid(config))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two `Ablation.identity` dicts: `budget.amount: 40 -> 60`."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    differences = []
    for key in dict.fromkeys([*before, *after]):
        if before.get(key, ...) != after.get(key, ...):
            was = _as_toml_text(before[key]) if key in before else "not there"
            now = _as_toml_text(after[key]) if key in after else "gone"
            differences.append(f"{key}: {was} -> {now}")
    return differences


def _read_config(source: Path) -> AblationConfig:
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
        _refuse(source, (f"{dotted(at)}: {message}" for at, message in lines))
        raise


def _overrides(*parts: ArmConfig | DifficultyConfig | None) -> list[str]:
    """What `load_recipe` takes, in order: later ones win."""
    overrides = []
    for part in parts:
        if isinstance(part, ArmConfig) and part.reward is not None:
            overrides.append(f"reward={toml_value(part.reward)}")
        if part is not None:
            overrides += _settings(part.set)
    return overrides


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
    alone = [(where, (part,)) for where, part in _named(config)]
    arms, harder = alone[: len(config.arms)], alone[len(config.arms) :]
    together = [
        (f"{arm} with {difficulty}", (*its, *their))
        for arm, their in arms
        for difficulty, its in harder
    ]
    any_refused = False
    for group in (alone, together):
        for where, parts in group:
            try:
                load_recipe(base, [*_settings(config.set), *_overrides(*parts)])
            except RecipeError as error:
                any_refused = True
                for line in str(error).splitlines():
                    message = line.removeprefix(f"{base}: ").removesuffix(" (from --set)")
                    yield f"{where}: {message.removeprefix('--set ')}"
        if any_refused:
            return


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
    entry_of = {arm.name: f"arms[{i}] ({arm.name})" for i, arm in enumerate(config.arms)}
    for cell in cells:
        where = entry_of[cell.arm]
        updates = cell.recipe.algorithm.updates_per_step
        counted = config.command == "train" and config.budget.kind == "updates"
        if counted and config.budget.amount % updates:
            yield (
                f"budget.amount: {config.budget.amount} updates cannot be made in whole steps of "
                f"{where}, whose algorithm.updates_per_step is {updates}"
            )
        reference = first.setdefault((cell.difficulty, cell.seed), cell)
        for field in PAIRED[config.command]:
            ours, theirs = (reduce(getattr, field.split("."), c.recipe) for c in (cell, reference))
            if ours != theirs:
                yield (
                    f"{where}: {field} differs from that of {entry_of[reference.arm]}, so the arms "
                    "would not be paired; set it in the base recipe, or as [[difficulties]]"
                )


def _leaves(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(below, (*at, key))
    elif isinstance(value, list | tuple) and value:
        for i, below in enumerate(value):
            yield from _leaves(below, (*at, i))
    else:
        yield dotted(at), list(value) if isinstance(value, tuple) else value


def _as_toml_text(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
