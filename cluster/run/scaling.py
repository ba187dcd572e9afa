"""`equipoise scale`: how many samplers a run has that goes on, from another process.

The wish is a file in the run folder, since all that a process on this machine needs to know of a
run is its folder. The driver reads it before each step.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

from cluster.recipe.nodes import lacking
from cluster.recipe.recipe import UserError
from cluster.record.terminal import Progress
from cluster.run.nodes import live_nodes
from cluster.run.runtime import LivePolicy
from tasks.files import put_text

WISH = "scale.json"


def ask(run: Path, samplers: int) -> None:
    """Leave the wish for `samplers` samplers. Raises UserError where no process runs `run`."""
    if not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run folder (it has no recipe.toml)")
    if not _is_held(run):
        raise UserError(
            f"{run}: no process is running it; to go on with it: equipoise train --resume {run} "
            f"--set sampler.count={samplers}"
        )
    put_text(run / WISH, json.dumps({"samplers": samplers}))


def requested(run: Path) -> int | None:
    """The number of samplers that was asked for since the last call, if any was.

    Raises UserError for a file that `ask` did not write.
    """
    wish = run / WISH
    taken_file = run / f".{WISH}.taken"
    try:
        wish.replace(taken_file)
    except FileNotFoundError:
        return None
    text = taken_file.read_text(encoding="utf-8")
    taken_file.unlink()
    try:
        samplers = json.loads(text)["samplers"]
    except (ValueError, KeyError, TypeError):
        samplers = None
    if not isinstance(samplers, int) or isinstance(samplers, bool) or samplers < 1:
        raise UserError(
            f'{wish}: expected {{"samplers": N}} with N of 1 or more, got {text[:80]!r}'
        )
    return samplers


def scale_as_asked(live: LivePolicy, run: Path, progress: Progress) -> None:
    """Do what was asked of a run since the last call; what cannot be done is said and left."""
    try:
        samplers = requested(run)
        if samplers is None or samplers == live.samplers.size():
            return
        if live.recipe.paired:
            raise UserError("each sampler shares the GPU of a learner rank: there can be no more")
        sampler = live.recipe.sampler.model_copy(update={"count": samplers})
        rescaled = live.recipe.model_copy(update={"sampler": sampler})
        if missing := lacking(rescaled, "train", live_nodes()):
            raise UserError(missing)
    except UserError as error:
        progress.say(f"warning: not scaled: {error}")
        return
    progress.say(f"samplers: {live.samplers.size()} -> {samplers}")
    live.samplers.resize(samplers)


def _is_held(run: Path) -> bool:
    """Whether a live process holds the run folder (see `cluster.recipe.machine.claimed`)."""
    try:
        with (run / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
