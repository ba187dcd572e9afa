"""From what was asked for to what is sent: the recipe is read, and what was left open chosen."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.ablation.grid import load_ablation
from cluster.jobs.request import Request, runtime_env
from cluster.jobs.travel import ROOMS, Luggage, inside, pack
from cluster.recipe.hardware import gib
from cluster.recipe.recipe import Recipe, UserError, load_recipe, read_toml


@dataclass(frozen=True)
class Packed:
    """A whole request, the recipe whose [job] it follows, and what travels."""

    request: Request
    recipe: Recipe
    luggage: Luggage

    def again(self) -> Packed:
        """The same for the job's next life."""
        return replace(self, request=self.request.again())

    def words(self, changed: Sequence[str] = ()) -> str:
        """The shell command of the job."""
        return self.request.words(self.recipe.job.python, changed)

    def runtime_env(self, environ: Mapping[str, str]) -> dict[str, Any]:
        """Ray's, but for the files. Raises UserError for a variable that cannot go along."""
        return runtime_env(self.recipe.job, self.request.env, environ)

    def described(self) -> Iterator[str]:
        """What would travel and run, line by line."""
        own_files = [path for path in self.luggage.files if path.partition("/")[0] in ROOMS]
        for path, file in self.luggage.files.items():
            if path not in own_files:
                yield f"travels: {path} ({file.stat().st_size:,} bytes)"
        size = gib(self.luggage.size)
        yield f"travels: {len(own_files)} files of Equipoise itself; {size} in all"
        yield f"variables: {', '.join(self.request.env) or 'none'}"
        yield f"job {self.request.id}: {self.words()}"


def packed(request: Request, root: Path, search: Sequence[str]) -> Packed:
    """All of a request whose name, place and output may be left open.

    `root`: the folder whose paths are the recipe's; `search`: where modules are found after it.
    Raises UserError for what cannot travel, and as reading a recipe or an ablation does.
    """
    file = root / request.recipe
    near = os.path.relpath(os.path.abspath(file), root)
    recipe_path = file.name if near.partition("/")[0] == ".." else near
    recipes = {recipe_path: file}
    if request.command == "ablate":
        if request.settings:
            raise UserError("--set: of an ablation its own file says what is set; write it there")
        ablation = load_ablation(file)
        named = ablation.config.base
        base = inside(f"{request.recipe}: base", os.path.join(os.path.dirname(recipe_path), named))
        recipes[base] = file.parent / named
        loaded = [ablation.base, *(cell.recipe for cell in ablation.cells)]
        name = ablation.name
    else:
        loaded = [load_recipe(file, request.settings)]
        name = loaded[0].name
    job = loaded[0].job
    luggage = pack(recipes, loaded, (*job.include, *request.include), root, search)
    name = request.name or f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}", name):
        raise UserError(f"--name {name}: use at most 120 letters, digits, dots and dashes")
    output = request.output or f"{loaded[0].output.folder}/{name}"
    if not os.path.isabs(output):
        field = "--output" if request.output else f"{request.recipe}: output.folder"
        raise UserError(
            f"{field}: {request.output or loaded[0].output.folder}: is relative, and a job's "
            "working folder goes with it; give --output an absolute path that the cluster keeps"
        )
    complete = replace(
        request,
        name=name,
        place=recipe_path,
        output=output,
        env=tuple(dict.fromkeys((*job.env, *request.env))),
        stop_seconds=job.stop_seconds,
    )
    return Packed(complete, loaded[0], luggage)


def is_ablation(file: Path) -> bool:
    """Whether a file is an ablation and no recipe. Raises RecipeError for what is no TOML."""
    return "arms" in read_toml(file)
