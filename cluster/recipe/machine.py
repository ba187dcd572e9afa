"""What a run needs of the machine, looked at before anything is started.

Its folder, held for it alone; room on the disk and in shared memory; a home and a place for
temporary files that caches and sockets can be made in; a cluster that answers.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from cluster.recipe.hardware import GIB, gib
from cluster.recipe.memory import (
    learner_memory,
    policy_size,
    stored_weights,
    trained_of,
    width,
)
from cluster.recipe.placement import Command
from cluster.recipe.recipe import Recipe, UserError
from learner.checkpoint import checkpoint_folders

LOCK = ".lock"
MARGIN = GIB // 8
"""Of the disk, beside checkpoints: metrics, rollouts and images of a small run."""
SHARED = Path("/dev/shm")
FULL = 2**20
"""Bytes free below which shared memory, which is taken by the page, counts as full."""
RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
VLLM_SOCKET = "/00000000-0000-0000-0000-000000000000"
LONGEST_SOCKET = 107
"""Bytes of a Unix socket's path, the limit of the kernel."""
REACH_SECONDS = 10.0
HEAD_SECONDS = 60.0
"""Ray's own client would try for a quarter of an hour."""
CACHES = {
    "XDG_CACHE_HOME": "",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "MPLCONFIGDIR": "matplotlib",
}
"""What is below a folder for caches, by the variable that says where."""


# --- the folder of a run -----------------------------------------------------------------------


def new_run_folder(recipe: Recipe, output: Path | None) -> Path:
    """The folder of a new run: `output`, or `<output.folder>/<name>-<UTC time>`.

    Raises UserError where `output` already holds something: two runs must not mix.
    """
    if output is not None:
        require_free(output, "--output")
        return output
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    return Path(recipe.output.folder) / f"{recipe.name}-{stamp}"


def require_free(folder: Path, flag: str) -> None:
    """Raise UserError where a folder or file to be written already holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        occupied = "already holds something" if folder.is_dir() else "is there already"
        raise UserError(f"{flag} {folder}: {occupied}; name a new one")


@contextmanager
def claimed(run: Path, new: bool = False) -> Iterator[None]:
    """Hold a run folder for this process alone; whatever ends the process lets it go.

    One that is `new` has to be empty, and goes again where nothing was written to it. Raises
    UserError where another process holds it or it cannot be written to.
    """
    new_folders = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("w")
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"{run}: cannot be written to ({why}); {_ELSEWHERE}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run}: another process is still running it") from None
        except OSError as error:
            why = error.strerror or str(error)
            raise UserError(f"{run}: files there cannot be locked ({why}); {_ELSEWHERE}") from None
        if os.fstat(file.fileno()).st_nlink == 0:
            raise UserError(f"{run}: another process has just given it up; try again")
        try:
            if new and os.listdir(run) != [LOCK]:
                raise UserError(f"{run}: already holds something; name a new one")
            yield
        finally:
            with suppress(OSError):  # removed meanwhile, or another run was begun beside it
                if new and os.listdir(run) == [LOCK]:
                    (run / LOCK).unlink()
                    for folder in new_folders:
                        folder.rmdir()


# --- room --------------------------------------------------------------------------------------


def require_room(recipe: Recipe, command: Command, folder: Path) -> None:
    """Raise UserError where a run's folder or shared memory have no room for what it will write.

    Estimated from the policy's parameters, where they are known; see `disk_needed`.
    """
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    if not can_write(existing):
        raise UserError(f"{folder}: {existing} cannot be written to; {_ELSEWHERE}")
    free, parts = shutil.disk_usage(existing).free, disk_needed(recipe, command, folder)
    if free < sum(parts.values()) + MARGIN:
        listed = "".join(f", {gib(size)} for {name}" for name, size in parts.items())
        raise UserError(
            f"{folder}: {gib(free)} are free there, and the run needs {gib(MARGIN)} for its "
            f"records{listed}; free some, give --output on another disk, or lower checkpoint.keep"
        )
    temporary = Path(tempfile.gettempdir())
    stored = stored_weights(recipe, command)
    spilled = stored - (shutil.disk_usage(SHARED).free if SHARED.is_dir() else 0)
    needed = MARGIN + max(0, spilled)
    if (free := shutil.disk_usage(temporary).free) < needed:
        larger = f", or start the container with --shm-size={stored // GIB + 2}g"
        raise UserError(
            f"{temporary}: {gib(free)} are free there, and Ray needs {gib(needed)}"
            f"{f' for what {SHARED} has no room for' * (spilled > 0)}; free some, or set TMPDIR to "
            f"a folder on another disk{larger * (spilled > 0)}"
        )


def killed_by(number: int) -> str:
    """What a signal that ended a process says of why."""
    killed = f"killed by {signal.Signals(number).name}"
    if number != signal.SIGBUS:
        return killed
    return f"{killed}: {SHARED}, or the disk of a file that it had mapped, was full; {_LARGER}"


def full_shared_memory() -> str:
    """That /dev/shm takes no more, and what to do; "" where it does, or there is none.

    Whoever then writes there, as all do that hand something large to Ray, is killed by SIGBUS.
    """
    if not SHARED.is_dir() or (room := shutil.disk_usage(SHARED)).free >= FULL:
        return ""
    return (
        f"{SHARED} is full ({gib(room.free)} of {gib(room.total)} are free), which kills whoever "
        f"hands something on through it; {_LARGER}"
    )


def disk_needed(recipe: Recipe, command: Command, folder: Path) -> dict[str, int]:
    """Bytes of a run's checkpoints, by what they are; empty where the policy's size is unknown.

    A training checkpoint is the weights and the optimizer's state; while one is written the last
    `checkpoint.keep` are still there.
    """
    size = policy_size(recipe.model.path)
    if size is None or command not in ("train", "sft", "replay"):
        return {}
    steps = recipe.sft.steps if command == "sft" and recipe.sft else recipe.algorithm.steps
    weights = size.parameters * width(recipe.model)
    parts = {"the policy": weights}
    every = recipe.checkpoint.every
    if every and command != "replay":
        whole = recipe.learner.model_copy(update={"ranks": 1})
        trained = trained_of(recipe.model.path, recipe.learner)
        state = learner_memory(recipe.model, whole, size, trained)["optimizer"]
        checkpoints = min(recipe.checkpoint.keep + 1, -(-steps // every))
        count = max(1, checkpoints - len(checkpoint_folders(folder)))
        parts[f"{count} training checkpoints"] = count * (weights + state)
    return parts


# --- home and temporary files ------------------------------------------------------------------


def settle_environment(environment: MutableMapping[str, str]) -> list[str]:
    """Give what is started other places where HOME or TMPDIR will not do; what was done, in lines.

    Raises UserError where there is no place that will do.
    """
    notices = []
    temporary = environment.get("TMPDIR") or tempfile.gettempdir()
    wrong = "cannot be written to" if not can_write(Path(temporary)) else ""
    if too_long(temporary, VLLM_SOCKET):
        wrong = f"is too long for the paths of sockets ({len(os.fsencode(temporary))} bytes)"
    if wrong:
        short = _short_place(temporary)
        environment["TMPDIR"] = short
        if environment is os.environ:
            tempfile.tempdir = short
        notices.append(f"TMPDIR: {temporary} {wrong}; using {short}")
        temporary = short
    if too_long(environment.get("RAY_TMPDIR") or temporary, RAY_SOCKET):
        environment["RAY_TMPDIR"] = _short_place(temporary)
    home = Path(environment.get("HOME") or os.path.expanduser("~"))
    if not can_write(home) and not can_write(home / ".cache"):
        cache = f"{temporary}/equipoise-cache-{os.getuid()}"
        chosen = {name: f"{cache}/{below}" for name, below in CACHES.items()}
        if not (home / ".cache" / "huggingface").is_dir():
            chosen["HF_HOME"] = f"{cache}/huggingface"
        environment.update(
            {name: folder for name, folder in chosen.items() if not environment.get(name)}
        )
        notices.append(f"HOME: {home} cannot be written to; caches go to {cache}")
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container has no name for the number it runs as; torch asks
        environment["USER"] = str(os.getuid())
    return notices


def can_write(folder: Path) -> bool:
    """Whether a file can be made in a folder, tried."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def too_long(folder: str, socket_below: str) -> bool:
    """Whether a socket below a folder would have a longer path than there can be."""
    return len(os.fsencode(folder + socket_below)) > LONGEST_SOCKET


def _short_place(refused: str) -> str:
    for folder in ("/tmp", "/var/tmp", str(SHARED)):
        if can_write(Path(folder)):
            return folder
    most = LONGEST_SOCKET - len(RAY_SOCKET)
    raise UserError(
        f"TMPDIR: {refused} will not do for temporary files and sockets, and neither /tmp nor "
        f"/var/tmp can be written to; set it to such a folder, of a path of at most {most} bytes"
    )


# --- a cluster, and errors ---------------------------------------------------------------------


def require_answer(address: str) -> None:
    """Raise UserError where nobody answers at a cluster's address; Ray would wait for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # `auto`, or what Ray itself will refuse
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
        if "://" not in address:
            subprocess.run([sys.executable, "-c", _ASK_HEAD, address], timeout=HEAD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        why = getattr(error, "strerror", None) or f"no head of a cluster in {HEAD_SECONDS:g} s"
        raise UserError(
            f"--address {address}: nobody answers there ({why}); is the head of the cluster up? "
            "without an address a run starts a Ray of its own"
        ) from None


_ASK_HEAD = """
import os, sys
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
from ray._private.services import canonicalize_bootstrap_address_or_die as known_as
from ray._raylet import GcsClient
GcsClient(address=known_as(sys.argv[1]))
"""


def os_error_text(error: OSError) -> str:
    """An error of the operating system in one line: where, what, and what to do."""
    where = f"{error.filename}: " if error.filename is not None else ""
    reason = error.strerror or str(error).partition("\n")[0] or type(error).__name__
    return where + reason + REMEDIES.get(error.errno or 0, "")


_LARGER = "free some, or start the container with a larger --shm-size"
_ELSEWHERE = "choose another place: --output, or output.folder in the recipe"
REMEDIES = {
    errno.ENOSPC: f"; free some, or {_ELSEWHERE}",
    errno.EDQUOT: f"; free some, or {_ELSEWHERE}",
    errno.EROFS: f"; {_ELSEWHERE}",
    errno.EACCES: f"; change its permissions, or {_ELSEWHERE}",
    errno.EPERM: f"; change its permissions, or {_ELSEWHERE}",
}
