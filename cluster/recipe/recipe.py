"""Recipes: the one TOML file that says what is trained, on what, how and where.

`load_recipe` reads a file and the command line's `--set` overrides into a frozen `Recipe`, or
raises a `RecipeError` that lists everything wrong with it at once, one line each: file, field,
what was wrong, what to do. `resolved_toml` writes a recipe back, every default spelled out, as
TOML that loads to an equal `Recipe`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.recipe.algorithm import AlgorithmConfig
from cluster.recipe.errors import Location, dotted, explain
from cluster.recipe.gpus import paired, refuse_gpus
from cluster.recipe.sections import (
    TOOL_PASSES,
    EvalConfig,
    JobConfig,
    OutputConfig,
    PlacementConfig,
    WatchConfig,
)
from cluster.recipe.toml_writer import table_lines
from learner.settings import CheckpointConfig, LearnerConfig, SftConfig
from rewards.settings import RewardConfig
from rollout.settings import EnvironmentConfig, ModelConfig, SamplerConfig, TransferConfig
from tasks.fields import Count, Name, Section, refusal, refuse
from tasks.settings import TaskConfig

Say = Callable[[str], None]
"""What a line is told with that a person should read."""


class UserError(Exception):
    """Something the user can put right; the command line prints the message and no traceback."""


class RunFailed(RuntimeError):
    """A run that one of its actors ended; the message starts with the actor's own error."""


class RecipeError(UserError):
    """A recipe that cannot be used; the message has one line for each thing wrong with it."""


class Recipe(Section):
    """Everything a run is made from; the sections are documented one by one."""

    name: Name
    """Of the run, and of its folder."""
    question: str | None = None
    """What the run should answer, in the user's words."""
    seed: Count = 0
    """Decides problems, their order and what is sampled."""
    model: ModelConfig
    """The policy."""
    tasks: Annotated[tuple[TaskConfig, ...], Field(strict=False)]
    """Where problems come from; at least one entry."""
    sampler: SamplerConfig = SamplerConfig()
    """The engines."""
    environment: EnvironmentConfig | None = None
    """What answers the policy between its turns."""
    reward: RewardConfig = RewardConfig()
    """What is rewarded."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """A step."""
    learner: LearnerConfig = LearnerConfig()
    """The ranks that learn."""
    transfer: TransferConfig = TransferConfig()
    """How weights reach the samplers."""
    placement: PlacementConfig = PlacementConfig()
    """On which nodes of a cluster."""
    watch: WatchConfig = WatchConfig()
    """What is done about a run that hangs."""
    eval: EvalConfig = EvalConfig()
    """What is measured, and when."""
    sft: SftConfig | None = None
    """Needed by `equipoise sft`."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When a run is saved."""
    output: OutputConfig = OutputConfig()
    """Where it is written."""
    job: JobConfig = JobConfig()
    """What a job of a Ray cluster takes along."""

    @property
    def paired(self) -> bool:
        """Whether each sampler shares a GPU with the learner rank of its number."""
        return paired(self.sampler, self.transfer, self.placement)

    @field_validator("tasks")
    @classmethod
    def _some_task(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        if not tasks:
            raise refusal('needs at least one entry; add [[tasks]] with name = "sudoku"')
        return tasks

    @model_validator(mode="before")
    @classmethod
    def _eager_attention_pads(cls, data: Any) -> Any:
        """Where nothing is said of the layout, the one that the attention can take."""
        match data:
            case {"model": {"attention": "eager"}, **rest}:
                learner = rest.get("learner", {})
                if isinstance(learner, dict) and "layout" not in learner:
                    return data | {"learner": learner | {"layout": "padded"}}
        return data

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Recipe:
        """Of what does not go together the first is told, at the field that is to be changed."""
        model, sampler, learner, sft = self.model, self.sampler, self.learner, self.sft
        algorithm, transfer = self.algorithm, self.transfer
        composed = self.reward.compose == "normalize_then_sum"
        refuse(
            composed and algorithm.advantage != "grpo",
            "reward.compose",
            '"normalize_then_sum" normalises as GRPO does, and algorithm.advantage is '
            f'"{algorithm.advantage}"; use "grpo" or "sum_then_normalize"',
        )
        refuse(
            composed and algorithm.dynamic_sampling,
            "reward.compose",
            '"normalize_then_sum" compares all groups of a step, and extra groups of '
            'algorithm.dynamic_sampling are scored after the others; use "sum_then_normalize"',
        )
        of_step = [i for i, term in enumerate(self.reward.terms) if term.scope == "step"]
        if of_step and algorithm.dynamic_sampling:
            raise refusal(
                'got "step", which is one call for all groups of a step, and extra groups of '
                'algorithm.dynamic_sampling are scored after the others; use "group"',
                *("reward", "terms", of_step[0], "scope"),
            )
        refuse(
            algorithm.epochs and (len(self.tasks) > 1 or self.tasks[0].data is None),
            "algorithm.epochs",
            f"got {algorithm.epochs}, and epochs are those of one data set: give one [[tasks]] "
            "entry with `data`, or say how many steps",
        )
        strategy = algorithm.curriculum.strategy
        refuse(
            strategy != "uniform" and len(self.tasks) < 2,
            "algorithm.curriculum.strategy",
            f'got "{strategy}", and there is one [[tasks]] entry, so nothing to choose from; '
            "give an entry for each difficulty",
        )
        refuse(
            sampler.max_tokens >= model.max_model_len,
            "sampler.max_tokens",
            f"got {sampler.max_tokens}, which leaves no room for the prompt in "
            f"model.max_model_len = {model.max_model_len}; lower it or raise that",
        )
        longest = self.eval.sampling.max_tokens or 0
        refuse(
            longest > sampler.max_tokens,
            "eval.sampling.max_tokens",
            f"got {longest}, above sampler.max_tokens = {sampler.max_tokens}, which problems are "
            "measured for; raise that, or lower this",
        )
        compared = [name for name in self.eval.passes or () if name in TOOL_PASSES]
        refuse(
            compared and self.environment is None,
            "eval.passes",
            f'got "{"".join(compared[:1])}", which compares with [environment], and there is none; '
            "leave it out, or add that section",
        )
        patience = sampler.request_timeout_seconds
        refuse(
            self.environment and self.environment.seconds >= patience,
            "environment.seconds",
            f"got {self.environment.seconds if self.environment else 0:g}, and a sampler counts as "
            f"hanging after sampler.request_timeout_seconds = {patience:g}; lower it or raise that",
        )
        refuse(
            sft and sft.call_share and not self.environment,
            "sft.call_share",
            f"got {sft.call_share if sft else 0:g}, and without [environment] there is nothing to "
            "call; name one, or leave this out",
        )
        refuse(
            learner.lora and transfer.transport != "host",
            "transfer.transport",
            f'"{transfer.transport}" loads weights as they come, and with [learner.lora] '
            'only adapters are sent; use "host", which works on GPUs of one machine too',
        )
        refuse(
            learner.lora and sft and sft.norm_every and sft.norm_of == "head",
            "sft.norm_of",
            'got "head", and [learner.lora] freezes the LM head; "all" measures the adapters',
        )
        refuse(
            learner.lora and sft and sft.vision_warmup_steps,
            "sft.vision_warmup_steps",
            f"got {sft.vision_warmup_steps if sft else 0}, and warming up changes the weights that "
            "the adapters of [learner.lora] are of; warm up in a recipe without it first",
        )
        refuse_gpus(sampler, learner, transfer, self.placement, algorithm.max_staleness)
        refuse(
            transfer.overlap and not algorithm.max_staleness,
            "transfer.overlap",
            "got true with algorithm.max_staleness = 0, where the learner waits for samples of "
            "the new weights and has nothing to do meanwhile; use false, or raise that",
        )
        refuse(
            transfer.overlap and transfer.transport != "host",
            "transfer.overlap",
            f'got true with transport "{transfer.transport}", which sends from the '
            'learner\'s own memory while it stands still; use false, or transport "host"',
        )
        refuse(
            model.attention == "flash" and (not learner.gpus or model.dtype != "bfloat16"),
            "model.attention",
            f'"flash" needs a GPU and bfloat16; learner.gpus is {learner.gpus:g} and model.dtype '
            f'"{model.dtype}"; use "sdpa"',
        )
        refuse(
            model.attention == "eager" and learner.layout != "padded",
            "learner.layout",
            f'got "{learner.layout}", which "eager" attention cannot take; use "padded", '
            'or model.attention = "sdpa"',
        )
        return self


def read_toml(path: Path) -> dict[str, Any]:
    """A recipe file as a user's editor left it, with or without a byte order mark.

    Raises RecipeError: not there, not UTF-8, not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file{_near_file(path)}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: is UTF-16 or no text ({error.reason}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number too long for int
        raise RecipeError(f"{path}: not valid TOML: {error}") from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `overrides` (`"a.b=c"`, as after `--set`).

    Raises RecipeError, its message one line for each thing wrong.
    """
    return check_recipe(read_toml(Path(path)), overrides, str(path))


def check_recipe(data: dict[str, Any], overrides: Sequence[str], source: str) -> Recipe:
    """The recipe that a TOML table is, with `overrides` put into it; `source` is named in errors.

    Raises RecipeError, as `load_recipe`.
    """
    lines, set_paths = [], []
    for override in overrides:
        try:
            set_paths.append(_apply_override(data, override))
        except RecipeError as error:
            lines.append(str(error))
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        lines += [
            f"{source}: {dotted(loc)}: {message}{_set_note(loc, set_paths)}"
            for loc, message in explain(error.errors(include_url=False), Recipe)
        ]
    if lines:
        raise RecipeError("\n".join(lines))
    return recipe


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `key=value`; the value is read as TOML and falls back to plain text.

    Raises RecipeError when there is no `=` or no key.
    """
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key:
        raise RecipeError(f"--set {text}: expected key=value, such as learner.learning_rate=1e-5")
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return key, raw
    return key, parsed["value"] if len(parsed) == 1 else raw


def task_of(name: str, settings: Sequence[str] = ()) -> TaskConfig:
    """A task named on the command line, with its knobs as `"key=value"` settings.

    Raises RecipeError, its message one line for each thing wrong.
    """
    knobs = dict(map(parse_setting, settings))
    return _named_task({"name": name, "knobs": knobs})


def data_task(
    data: str, name: str = "", settings: Sequence[str] = (), like: Recipe | None = None
) -> TaskConfig:
    """Questions of a user's own, all of them held out, as the `vqa` entry of `like` reads its own.

    `settings`: fields of the entry (`"form=boxed"`, `"columns.answer=gold"`). Raises RecipeError.
    """
    entry = next((c for c in like.tasks if c.name == "vqa"), None) if like else None
    values = entry.model_dump(exclude_defaults=True) if entry else {}
    values |= {"name": name or "vqa", "data": {"test": data}}
    for setting in settings:
        _apply_override(values, setting)
    return _named_task(values)


def _named_task(values: dict[str, Any]) -> TaskConfig:
    try:
        return TaskConfig.model_validate(values)
    except ValidationError as error:
        lines = []
        for loc, message in explain(error.errors(include_url=False), TaskConfig):
            at = dotted(loc[1:] if loc[0] == "knobs" else loc)
            lines.append(f"{'--task' if loc[0] == 'name' else f'--set {at}'}: {message}")
        raise RecipeError("\n".join(lines)) from None


def resolved_toml(recipe: Recipe) -> str:
    """The recipe as TOML with every default spelled out; loads to an equal recipe."""
    return "\n".join(table_lines(recipe.model_dump(exclude_none=True))).strip() + "\n"


# --- overrides -------------------------------------------------------------------------------


def _apply_override(data: dict[str, Any], override: str) -> Location:
    """Set one value in `data`; unknown keys are left for validation to name."""
    key, value = parse_setting(override)
    parts: list[str | int] = []
    for piece in key.split("."):
        match = re.fullmatch(r"([^\[\]]*)((?:\[\d{1,6}\])*)", piece)
        if match is None or not piece:
            raise RecipeError(
                f"--set {override}: cannot read the path {key}; write it like "
                "learner.learning_rate or tasks[0].knobs.noise"
            )
        if match[1]:
            parts.append(match[1])
        parts += [int(index) for index in re.findall(r"\d+", match[2])]
    table: Any = data
    for i, part in enumerate(parts):
        if isinstance(table, list) and isinstance(part, str) and re.fullmatch(r"\d{1,6}", part):
            part = parts[i] = int(part)
        at = dotted(parts[:i]) if i else "the recipe"
        if isinstance(table, list):
            if not isinstance(part, int) or part >= len(table):
                raise RecipeError(
                    f"--set {override}: {at} is a list with {len(table)} entries, "
                    f"and {part!r} is not an index into it"
                )
        elif not isinstance(table, dict) or isinstance(part, int):
            raise RecipeError(f"--set {override}: {at} has nothing below it to set")
        if i == len(parts) - 1:
            table[part] = value
        elif isinstance(table, dict):
            table = table.setdefault(part, {})
        else:
            table = table[part]
    return tuple(parts)


def _set_note(loc: Location, set_paths: Sequence[Location]) -> str:
    touched = any(loc[: len(p)] == p or p[: len(loc)] == loc for p in set_paths)
    return " (from --set)" if touched else ""


def _near_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.toml")]
    near = get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
