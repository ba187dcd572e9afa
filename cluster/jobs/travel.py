"""What travels with a job, chosen file by file: recipe, our code, the user's modules, small data.

A path of a recipe that is relative is here and travels to the same path; an absolute one is the
cluster's and stays as it is written; what is no path here is a name on the hub. Hidden files,
caches of Python and virtual environments stay. Pure: it looks at files and changes nothing.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from cluster.recipe.hardware import gib
from cluster.recipe.recipe import Recipe, UserError
from tasks.fetched import is_uri
from tasks.fields import OWN_NAME

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("tasks", "rollout", "rewards", "learner", "cluster")
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
ELSEWHERE = (
    "put it where every node reads it and write its absolute path there, or its name on the hub"
)


@dataclass
class Luggage:
    """Files that travel: path in the job's working folder -> file here; and words about the rest.

    Attributes:
        mib: how much may travel, all files together.
    """

    mib: int = 64
    files: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files.values())

    def add(self, label: str, source: Path, target: str) -> None:
        """A file, or a folder with all below it. Raises UserError, which begins with `label`."""
        files = {os.path.normpath(f"{target}/{at}"): file for at, file in below(source)}
        size = sum(file.stat().st_size for file in files.values())
        if size > self.mib * 2**20:
            raise UserError(
                f"{label}: {source}: {gib(size)}, and {self.mib} MiB travel with a job; "
                f"{ELSEWHERE}, or raise job.travel_mib"
            )
        for at, file in files.items():
            if not file.samefile(self.files.setdefault(at, file)):
                raise UserError(
                    f"{label}: {file}: would lie where {self.files[at]} does, at {at} of the job's "
                    "working folder; rename one"
                )

    def note(self, line: str) -> None:
        """A line to be read, once."""
        if line not in self.notes:
            self.notes.append(line)

    def require_small(self) -> None:
        """Raise UserError where all together are too much."""
        if self.size <= self.mib * 2**20:
            return
        sizes: dict[str, int] = {}
        for path, file in self.files.items():
            top = path.partition("/")[0]
            sizes[top] = sizes.get(top, 0) + file.stat().st_size
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:4]
        raise UserError(
            f"job.travel_mib: got {self.mib}, and {gib(self.size)} would travel: "
            + ", ".join(f"{path} {gib(size)}" for path, size in largest)
            + f"; of the largest, {ELSEWHERE}, or raise this"
        )


def below(source: Path, around: frozenset[Path] = frozenset()) -> Iterator[tuple[str, Path]]:
    """(path relative to `source`, file) of all that travels of a file or folder, links followed.

    `around`: the folders it is in, so that a link to one of them ends.
    """
    if source.is_file():
        yield ".", source
        return
    resolved = source.resolve()
    if not source.is_dir() or resolved in around or (source / "pyvenv.cfg").is_file():
        return
    for child in sorted(source.iterdir()):
        if child.name[0] != "." and child.name != "__pycache__":
            for at, file in below(child, around | {resolved}):
                yield os.path.normpath(f"{child.name}/{at}"), file


def pack(
    recipes: Mapping[str, Path],
    loaded: Sequence[Recipe],
    include: Sequence[str],
    root: Path,
    search: Sequence[str] = (),
) -> Luggage:
    """All that a job of `recipes` (path -> file), read as `loaded`, takes along from `root`.

    `search`: where modules are found after `root`, as in `sys.path`. Raises UserError: too much,
    out of the folder, not there.
    """
    luggage = Luggage(max(recipe.job.travel_mib for recipe in loaded))
    add_rooms(luggage)
    for path, file in recipes.items():
        luggage.add(str(file), file, path)
    recipe_file = str(next(iter(recipes.values())))
    for recipe in loaded:
        for at, value in named_paths(recipe):
            _add_path(luggage, f"{recipe_file}: {at}", value, root, required=".args" not in at)
        for at, value in texts(recipe.model_dump(exclude={"name", "question"})):
            if OWN_NAME.fullmatch(value):
                _add_own(luggage, f"{recipe_file}: {at}", value.rpartition(":")[0], root, search)
    for name in include:
        if not (root / name).exists():
            raise UserError(f"--include {name}: no such file or folder ({root / name})")
        luggage.add(f"--include {name}", root / name, inside(f"--include {name}", name))
    luggage.require_small()
    return luggage


def add_rooms(luggage: Luggage) -> None:
    """Equipoise itself."""
    for room in ROOMS:
        luggage.add("equipoise", ROOT / room, room)


def inside(label: str, name: str) -> str:
    """A path in the working folder, normalised. Raises UserError where it leads out of it."""
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split("/")[0] == "..":
        raise UserError(
            f"{label}: {name}: lies outside of the folder that the command is run in, which is "
            "what a job's paths start from; run it from a folder that holds it"
        )
    return path


def named_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(field, value) of all that a recipe may name files by, but where it is written."""
    yield "model.path", recipe.model.path
    for i, task in enumerate(recipe.tasks):
        yield from texts(task.data, f"tasks[{i}].data")
    if recipe.eval.reader:
        yield "eval.reader", recipe.eval.reader
    for i, term in enumerate(recipe.reward.terms):
        yield from texts(term.args, f"reward.terms[{i}].args")
    if recipe.environment is not None:
        yield from texts(recipe.environment.args, "environment.args")


def texts(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """(location, text) of all text in nested tables and lists."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts(inner, f"{at}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from texts(inner, f"{at}[{i}]")


def _add_path(luggage: Luggage, label: str, value: str, root: Path, required: bool) -> None:
    """`required`: the text is a path or a name on the hub; else it may be anything."""
    if is_uri(value) or value[:1] in "/~$":
        if required:
            why = "each node fetches it" if is_uri(value) else "it must be there on the cluster"
            luggage.note(f"{label}: {value}: stays; {why}")
        return
    source = root / value
    if os.path.exists(source):
        target = inside(label, value)
        # Rows that are text name images by paths from their own folder.
        if source.suffix.lower() in (".json", ".jsonl") and os.path.dirname(target):
            source, target = source.parent, os.path.dirname(target)
        luggage.add(label, source, target)
    elif required:
        if not HUB_NAME.fullmatch(value):
            raise UserError(f"{label}: {value}: no such file or folder here, and no hub's name")
        luggage.note(f"{label}: {value}: not here, so the job asks the hub for it")


def _add_own(luggage: Luggage, label: str, module: str, root: Path, search: Sequence[str]) -> None:
    """A module or file of the user's own with the Python files and packages beside it."""
    if module.endswith(".py"):
        if os.path.isabs(module):
            luggage.note(f"{label}: {module}: stays; it must be there on the cluster")
            return
        target = os.path.dirname(inside(label, module))
        folders = [root, *map(Path, search)]
        module_file = next((p / module for p in folders if (p / module).is_file()), None)
        folder = module_file.parent if module_file else None
    else:
        top, target = module.partition(".")[0], ""
        if top in ROOMS or top in sys.stdlib_module_names:
            return
        folder = _folder_of(top, [str(root), *search])
        if folder is not None and _installed(folder):
            luggage.note(f"{label}: {module}: is installed here, and must be on the cluster too")
            return
        if folder is not None and not (folder / f"{top}.py").is_file():
            luggage.add(label, folder / top, top)
    if folder is None:
        return  # not loaded under this name: other text, or refused when the recipe was read
    for child in sorted(folder.iterdir()):
        file = child.suffix == ".py" and child.is_file()
        if child.name[0] != "." and (file or (child / "__init__.py").is_file()):
            luggage.add(label, child, os.path.join(target, child.name))


def _folder_of(top: str, search: Sequence[str]) -> Path | None:
    """The folder that a module or package lies in."""
    spec = PathFinder.find_spec(top, list(search))
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).parent
    return Path(spec.origin).parent if spec.origin and os.path.isfile(spec.origin) else None


def _installed(folder: Path) -> bool:
    known = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    return folder.resolve() in known or "site-packages" in folder.parts
