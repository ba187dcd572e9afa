"""How a job is asked for: the words it runs, its environment, its record. Pure of Ray.

Values of environment variables stand in Ray's runtime environment alone: neither in the words,
which Ray writes at the head of the job's log, nor in the record that `resume` reads.
"""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from cluster.recipe.recipe import UserError
from cluster.recipe.sections import KEYS_STAY, JobConfig, is_key

JobCommand = Literal["train", "sft", "ablate"]
RECORD = "equipoise"
"""The entry of a job's metadata that holds its `Request`."""
OVER = ("STOPPED", "SUCCEEDED", "FAILED")
"""Ray's words for jobs that run no more."""


@dataclass(frozen=True)
class Request:
    """What was asked for, all of it but values of variables.

    Attributes:
        recipe: the file as it was named; place: its path in the job's working folder.
        output: the run's or ablation's folder, on the cluster.
        env: names of variables whose values go along; include: further files.
        life: 1, and one more each time the job is gone on with.
        stop_seconds: what it gets to end, from SIGTERM to SIGKILL.
    """

    name: str
    command: JobCommand
    recipe: str
    place: str
    output: str
    settings: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    life: int = 1
    stop_seconds: int = 600

    @property
    def id(self) -> str:
        """What Ray calls the job."""
        return self.name if self.life == 1 else f"{self.name}.{self.life}"

    def again(self) -> Request:
        """The next life of this job."""
        return replace(self, life=self.life + 1)

    def words(self, python: str, changed: Sequence[str] = ()) -> str:
        """The shell command that the job runs; a further life goes on in the folder of the first.

        `changed`: settings of this life alone. An ablation goes on by the same words.
        """
        words = [python, "-m", "cluster", self.command]
        if self.life == 1 or self.command == "ablate":
            words += [self.place, "--output", self.output]
            changed = self.settings
        else:
            words += ["--resume", self.output]
        for setting in changed:
            words += ["--set", setting]
        return shlex.join(words)

    def record(self) -> dict[str, str]:
        """The job's metadata; `read_record` reads it back."""
        return {RECORD: json.dumps(asdict(self))}


def read_record(metadata: Mapping[str, str] | None) -> Request | None:
    """The request behind a job; None of a job that is none of ours."""
    try:
        record = json.loads((metadata or {})[RECORD])
        lists = {name: tuple(map(str, record[name])) for name in ("settings", "env", "include")}
        texts = {n: str(record[n]) for n in ("name", "command", "recipe", "place", "output")}
        if texts["command"] not in get_args(JobCommand):
            return None
        counts = {name: int(record[name]) for name in ("life", "stop_seconds")}
        return Request(**texts, **lists, **counts)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None


def runtime_env(job: JobConfig, names: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """Ray's runtime environment: the recipe's, and the variables `names` of `environ`.

    Raises UserError for a variable that is not set here, or has the name of a key.
    """
    env = copy.deepcopy(job.runtime_env)
    # Ray's supervisor of the job reads it there.
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(job.stop_seconds)} | env.get("env_vars", {})
    for name in names:
        if is_key(name):
            raise UserError(f"--env {name}: {KEYS_STAY}")
        if name not in environ:
            raise UserError(f"--env {name}: is not set here; export it, or leave it out")
        variables[name] = environ[name]
    return env | {"env_vars": variables}


@dataclass(frozen=True)
class Job:
    """A job of ours on a head. Times are seconds since the epoch, 0 where there is none yet."""

    request: Request
    status: str
    message: str
    started: float
    ended: float

    @property
    def over(self) -> bool:
        """Whether it runs no more."""
        return self.status in OVER

    @property
    def failed(self) -> bool:
        """Whether it ended by itself and not well."""
        return self.status == "FAILED"


def latest(jobs: Sequence[Job]) -> list[Job]:
    """Of each name the last life, in the order in which they were started."""
    newest: dict[str, Job] = {}
    for job in jobs:
        known = newest.get(job.request.name)
        if known is None or job.request.life > known.request.life:
            newest[job.request.name] = job
    return sorted(newest.values(), key=lambda job: job.started)
