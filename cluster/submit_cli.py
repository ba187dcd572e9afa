"""`equipoise submit`, `jobs`, `logs`, `stop`, `resume`, `status NAME`: jobs of a cluster."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.record.terminal import printable

if TYPE_CHECKING:
    from cluster.jobs.head import Head
    from cluster.jobs.packing import Packed
    from cluster.jobs.request import Job, Request

At = Annotated[
    str | None,
    typer.Option(
        "--address", envvar="RAY_API_SERVER_ADDRESS", help="The dashboard: http://HEAD:8265"
    ),
]
JobName = Annotated[str, typer.Argument(help="As `equipoise jobs` shows it")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not follow the job's log")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one field of the recipe"),
]


def submit(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe, or an ablation")],
    address: At = None,
    command: Annotated[
        Literal["train", "sft", "ablate"] | None,
        typer.Option(help="What the job runs; by default ablate for an ablation, else train"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the job, instead of a new one")] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the run: an absolute path on the cluster")
    ] = None,
    set_: Settings = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME", help="A variable that goes along; no keys"),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATH", help="A file or folder that travels too"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would travel and run, and stop")
    ] = False,
    detach: Detach = False,
) -> None:
    """Run a recipe or an ablation as a job of a Ray cluster, and follow its log.

    Exit code 1 when the job failed.
    """
    from cluster.jobs.packing import is_ablation, packed
    from cluster.jobs.request import Request

    request = Request(
        name=name or "",
        command=command or ("ablate" if is_ablation(recipe) else "train"),
        recipe=str(recipe),
        place="",
        output=output or "",
        settings=tuple(set_ or ()),
        env=tuple(env or ()),
        include=tuple(include or ()),
    )
    packed_job = packed(request, Path.cwd(), sys.path)
    packed_job.runtime_env(os.environ)  # refused before anyone is asked
    for note in packed_job.luggage.notes:
        print(printable(note))
    if dry_run:
        print(printable("\n".join(packed_job.described())))
        return
    raise typer.Exit(_started(_head(address), packed_job, packed_job.words(), detach))


def jobs(address: At = None) -> None:
    """List the jobs of a cluster that `equipoise submit` started, the newest last."""
    known_jobs = _head(address).jobs()
    for job in known_jobs:
        print(_line(job))
    if not known_jobs:
        print("no jobs of `equipoise submit`")


def logs(
    name: JobName,
    address: At = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends")] = False,
) -> None:
    """Print what a job has printed; exit code 1 when it was followed and failed."""
    head = _head(address)
    job = head.job(name)
    if follow:
        raise typer.Exit(_followed(head, job.request))
    _write(head.log(job))


def stop(name: JobName, address: At = None) -> None:
    """Have a run end its step and write a checkpoint, and wait for it; `resume` goes on."""
    head = _head(address)
    job = head.job(name)
    if not job.over:
        seconds = job.request.stop_seconds
        print(f"{name}: ends its step and writes a checkpoint, in {seconds} s at most", flush=True)
        head.stop(job)
        job = head.ended(job.request, seconds + 60)
    print(f"{name}: {job.status}")


def resume(
    name: JobName, address: At = None, set_: Settings = None, detach: Detach = False
) -> None:
    """Go on with a job that is over, in its folder from its last checkpoint, as a job again.

    Run it in the folder that it was submitted from: its files travel once more, as they are now.
    """
    from cluster.jobs.packing import packed
    from cluster.recipe.recipe import UserError

    head = _head(address)
    job = head.job(name)
    if not job.over:
        raise UserError(f"{name}: is {job.status}; stop it first: equipoise stop {name}")
    if not Path(job.request.recipe).is_file():
        raise UserError(
            f"{name}: {job.request.recipe}: no such file here; run this in the folder that the "
            "job was submitted from"
        )
    packed_job = packed(job.request, Path.cwd(), sys.path).again()
    raise typer.Exit(_started(head, packed_job, packed_job.words(set_ or ()), detach))


def status_of_job(name: str, address: str) -> int:
    """Print how far a job's run is, read where it writes; the exit code."""
    from cluster.jobs.travel import Luggage, add_rooms

    head, luggage = _head(address), Luggage()
    job = head.job(name)
    print(_line(job), flush=True)
    add_rooms(luggage)
    well, text = head.said(job, luggage, ["status", job.request.output])
    _write(text)
    return int(not well)


def _head(address: str | None) -> Head:
    from cluster.recipe.recipe import UserError

    if address is None:
        raise UserError("--address: give that of the cluster's dashboard, http://HEAD:8265")
    from cluster.jobs.head import Head

    return Head(address)


def _line(job: Job) -> str:
    """What there is to say of a job in a line."""
    request = job.request
    seconds = (job.ended or time.time()) - job.started if job.started else 0.0
    start = datetime.fromtimestamp(job.started, UTC)
    life = f" (life {request.life})" if request.life > 1 else ""
    line = f"{request.name}  {job.status}  {request.command} {request.recipe}{life}"
    return printable(f"{line}  {start:%Y-%m-%d %H:%M:%S} + {seconds:.0f} s  {request.output}")


def _started(head: Head, packed_job: Packed, words: str, detach: bool) -> int:
    request = packed_job.request
    head.submit(request, packed_job.luggage, packed_job.runtime_env(os.environ), words)
    print(f"job {request.id}: writes {request.output}", flush=True)
    return 0 if detach else _followed(head, request)


def _followed(head: Head, request: Request) -> int:
    """Print a job's log to its end; the exit code."""
    try:
        job = head.follow(request, _write)
    except KeyboardInterrupt:
        print(
            f"\n{request.name}: goes on; `equipoise logs -f {request.name}` follows it again, "
            f"`equipoise stop {request.name}` ends it"
        )
        return 0
    # Ray's message goes on with the end of the log, which stands above.
    why = f": {job.message.splitlines()[0]}" if job.failed and job.message else ""
    print(printable(f"job {request.id}: {job.status}{why}"))
    return int(job.failed)


def _write(text: str) -> None:
    """A part of a log. Models write into it, and nothing of it may steer the terminal."""
    print(printable(text.replace("\r", "\n").expandtabs()), end="", flush=True)


COMMANDS: tuple[Callable[..., None], ...] = (submit, jobs, logs, stop, resume)
