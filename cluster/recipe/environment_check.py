"""Whether a recipe's environment can be made, answers, and leaves the policy room to write."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.recipe.context import Context
from cluster.recipe.problems import ProblemSource
from cluster.recipe.recipe import Recipe, Say, UserError
from rollout.environments import EnvironmentPool
from rollout.settings import EnvironmentConfig
from tasks.core import Problem
from tasks.environments import (
    EnvironmentFailed,
    LooksElsewhere,
    Observation,
    load_environment,
)

TRIED = "I see nothing to call for."
"""The turn that an environment is tried with."""


def glance_at_environment(recipe: Recipe) -> None:
    """Make it once, in this process. Raises UserError."""
    if recipe.environment is None:
        return
    try:
        config = recipe.environment
        environment = load_environment(config.name, config.args, config.calls)
    except ValueError as error:
        raise UserError(f"environment: {error}") from error
    if "returns_elsewhere" in (recipe.eval.passes or ()) and not isinstance(
        environment, LooksElsewhere
    ):
        raise UserError(
            'eval.passes: "returns_elsewhere" shows a wrong place, and calls of environment '
            f'"{recipe.environment.name}" point at none (it has no method elsewhere); leave it out'
        )


def try_environment(
    recipe: Recipe, sources: Sequence[ProblemSource], context: Context, say: Say
) -> None:
    """Reset it and let it take a step on a problem of each source, as a sampler would.

    Raises UserError where it fails, or leaves no room for a response; `say` is told where images
    that the budgets allow will not always fit.
    """
    config = recipe.environment
    if config is None:
        return
    for source in sources:
        problem = source.problem("train" if source.spec or source.train else "test", recipe.seed, 0)
        where = f'environment: "{config.name}" on problem {problem.id}'
        try:
            opening = asyncio.run(_tried(config, problem))
        except EnvironmentFailed as error:
            raise UserError(f"{where}: {error}") from error
        opened = context.opened(problem, opening)
        if isinstance(opened, str):
            raise UserError(f"{where}: what it says first {opened}")
        if opened + context.answer > context.length:
            raise UserError(
                f"{where}: {opened:,} tokens with what it says first, and sampler.max_tokens = "
                f"{context.answer:,} do not fit in model.max_model_len = {context.length:,}; "
                "raise that"
            )
        if (most := opened + context.answer + config.image_tokens) > context.length:
            say(
                f"{where}: prompt, sampler.max_tokens and environment.image_tokens may come to "
                f"{most:,} tokens, above model.max_model_len = {context.length:,}: such a response "
                "ends by its context_budget"
            )


async def _tried(config: EnvironmentConfig, problem: Problem) -> Observation | None:
    pool = EnvironmentPool(config.model_copy(update={"workers": 1}))
    try:
        environment = pool.open("tried", problem, 0)
        opening = await environment.answer(None)
        await environment.answer(TRIED)
        return opening
    finally:
        pool.close()
