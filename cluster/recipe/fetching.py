"""A recipe's models and data that are named by URI: pinned to a content, which this node then has.

Before anything else is asked of a recipe. What is named by path or hub name stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from cluster.recipe.machine import settle_environment
from cluster.recipe.recipe import Recipe, Say
from tasks.core import DataError
from tasks.fetched import is_uri, pinned

Change = Callable[[str, str, bool], str]
"""(field, URI, whether it is a model's) -> what is to stand there."""


def pinned_recipe(
    recipe: Recipe, say: Say, *, dry_run: bool = False, known: dict[str, str] | None = None
) -> Recipe:
    """The recipe with `#sha256=…` behind every URI, whose content is in this node's cache.

    Args:
        recipe: what is pinned in it already is fetched where it is not here, and never asked of
            the network where it is.
        say: told size and progress of what is fetched.
        dry_run: data is fetched, a model that is not here is not, and stays as it is.
        known: pins of recipes before, by URI, which count here too and are added to.

    Raises DataError, which names field, URI and remedy.
    """
    pins = {} if known is None else known

    def pin(field: str, uri: str, weights: bool) -> str:
        if uri not in pins:
            try:
                if not pins:  # the cache may need another place
                    for line in settle_environment(os.environ):
                        say(line)
                pins[uri] = pinned(uri, say, weights=weights, fetch=not (dry_run and weights))
            except DataError as error:
                raise DataError(f"{field}: {error}") from error
        return pins[uri]

    return _changed(recipe, pin)


def model_uris(recipe: Recipe) -> list[str]:
    """The URIs of models, each once: what actors on other nodes will read too."""
    uris: dict[str, None] = {}

    def note(field: str, uri: str, weights: bool) -> str:
        if weights:
            uris[uri] = None
        return uri

    _changed(recipe, note)
    return [*uris]


def _changed(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with every URI of a model or of data changed."""

    def at(field: str, value: Any, weights: bool) -> Any:
        if isinstance(value, dict):
            return {k: at(f"{field}.{k}", inner, weights) for k, inner in value.items()}
        return change(field, value, weights) if isinstance(value, str) and is_uri(value) else value

    model = recipe.model.model_copy(update={"path": at("model.path", recipe.model.path, True)})
    tasks = tuple(
        task.model_copy(update={"data": at(f"tasks[{i}].data", task.data, False)})
        for i, task in enumerate(recipe.tasks)
    )
    reader = at("eval.reader", recipe.eval.reader, True)
    terms = tuple(
        term.model_copy(
            update={"args": term.args | _model_of(term.args, f"reward.terms[{i}].args.model", at)}
        )
        for i, term in enumerate(recipe.reward.terms)
    )
    return recipe.model_copy(
        update={
            "model": model,
            "tasks": tasks,
            "eval": recipe.eval.model_copy(update={"reader": reader}),
            "reward": recipe.reward.model_copy(update={"terms": terms}),
        }
    )


def _model_of(args: dict[str, Any], field: str, at: Callable[[str, Any, bool], Any]) -> Any:
    return {"model": at(field, args["model"], True)} if "model" in args else {}
