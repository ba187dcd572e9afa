"""A Ray head as its job server is reached: the thin part over Ray's job SDK, errors in one line."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cluster.jobs.request import OVER, Job, Request, latest, read_record
from cluster.jobs.travel import Luggage
from cluster.recipe.machine import require_answer
from cluster.recipe.recipe import UserError

POLL_SECONDS = 0.5
SETTLES_SECONDS = 60.0
"""After the end of a job's log, by when Ray says how it ended."""
ANSWER_SECONDS = 300.0
"""For a command at the head that only looks."""


class Head:
    """The job server of a Ray cluster. Every method raises UserError where it cannot be used."""

    def __init__(self, address: str) -> None:
        """`address`: of the dashboard, `http://HEAD:8265`."""
        if not address.startswith(("http://", "https://")):
            raise UserError(
                f"--address {address}: expected the address of the cluster's dashboard, "
                "http://HEAD:8265"
            )
        self.address = address
        require_answer(address)
        from ray.job_submission import JobSubmissionClient

        with self._errors_in_words(), _without("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            self._client: Any = JobSubmissionClient(address)

    def submit(
        self, request: Request, luggage: Luggage, runtime_env: Mapping[str, Any], words: str
    ) -> None:
        """Start a job under `request.id` with what travels."""
        ours = {"submission_id": request.id, "metadata": request.record()}
        self._start(luggage, runtime_env, words, **ours)

    def said(self, job: Job, luggage: Luggage, command: Sequence[str]) -> tuple[bool, str]:
        """Whether `python -m cluster COMMAND` ended well where a job runs, and what it printed.

        It is a job of its own, of the same Python and environment, and is forgotten afterwards.
        """
        with self._errors_in_words():
            first = self._client.get_job_info(job.request.id)
        words = shlex.join([shlex.split(first.entrypoint)[0], "-m", "cluster", *command])
        env = dict(first.runtime_env or {})
        wide = {"COLUMNS": str(shutil.get_terminal_size((132, 24)).columns)}
        name = self._start(luggage, {**env, "env_vars": {**env.get("env_vars", {}), **wide}}, words)
        status = self._over(name, f"equipoise {shlex.join(command)}", ANSWER_SECONDS).status
        with self._errors_in_words():
            log = str(self._client.get_job_logs(name))
            self._client.delete_job(name)
        # What Ray says of a job stands above, and ends with the words.
        return _word(status) == "SUCCEEDED", log.partition(f"{words}\n")[2] or log

    def _start(
        self, luggage: Luggage, runtime_env: Mapping[str, Any], words: str, **more: Any
    ) -> str:
        with tempfile.TemporaryDirectory(prefix="equipoise-job-") as staging:
            # In a folder of their own no .gitignore says which of them stay.
            for relative, file in luggage.files.items():
                target = Path(staging, relative)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            with self._errors_in_words():
                env = {**runtime_env, "working_dir": staging}
                return str(self._client.submit_job(entrypoint=words, runtime_env=env, **more))

    def jobs(self) -> list[Job]:
        """The jobs of ours, each name's last life, by when they were started."""
        with self._errors_in_words():
            listed = self._client.list_jobs()
        return latest([job for job in map(_job, listed) if job is not None])

    def job(self, name: str) -> Job:
        """The last life of a job; `name` as `jobs` shows it."""
        jobs = {job.request.name: job for job in self.jobs()}
        if name in jobs:
            return jobs[name]
        near = get_close_matches(name, jobs, n=1)
        hint = f"did you mean {near[0]}?" if near else "`equipoise jobs` shows those of this head"
        raise UserError(f"{name}: no such job at {self.address}; {hint}")

    def log(self, job: Job) -> str:
        """All that a job has printed."""
        with self._errors_in_words():
            return str(self._client.get_job_logs(job.request.id))

    def follow(self, request: Request, write: Callable[[str], object]) -> Job:
        """Hand on what a job prints until it ends; how it ended."""

        async def read() -> None:
            async for part in self._client.tail_job_logs(request.id):
                write(part)

        with self._errors_in_words():
            asyncio.run(read())
        return self.ended(request, SETTLES_SECONDS)

    def stop(self, job: Job) -> None:
        """Ask a job to end; it is given the time that it was submitted with."""
        with self._errors_in_words():
            self._client.stop_job(job.request.id)

    def ended(self, request: Request, seconds: float) -> Job:
        """The job once it is over."""
        job = _job(self._over(request.id, request.name, seconds))
        if job is None:
            raise UserError(f"{request.name}: is no job of `equipoise submit` any more")
        return job

    def _over(self, job_id: str, name: str, seconds: float) -> Any:
        """What Ray knows of a job once it is over."""
        deadline = time.monotonic() + seconds
        while True:
            with self._errors_in_words():
                details = self._client.get_job_info(job_id)
            if _word(details.status) in OVER:
                return details
            if time.monotonic() > deadline:
                raise UserError(
                    f"{name}: is {_word(details.status)} after {seconds:.0f} s; look again by "
                    f"`equipoise jobs --address {self.address}`"
                )
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        """What Ray's SDK raises, as one line."""
        from ray.exceptions import AuthenticationError

        at = f"--address {self.address}"
        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"{at}: asks for the cluster's token, and it was not given or is another; set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file)"
            ) from None
        except OSError as error:  # ConnectionError, and all of requests'
            raise UserError(f"{at}: cannot be reached: {_first_line(error)}") from None
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{at}: Ray refuses: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    """What is wrong, without the traceback of Ray's server."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "Traceback" in lines[0]:
        return lines[-1]
    return lines[0] if lines else type(error).__name__


def _word(status: Any) -> str:
    """Ray's status as a word: it may be an enumeration's member."""
    return str(getattr(status, "value", status))


def _job(details: Any) -> Job | None:
    """A job of ours out of Ray's own words for it."""
    request = read_record(details.metadata)
    if request is None:
        return None
    started, ended = ((stamp or 0) / 1000 for stamp in (details.start_time, details.end_time))
    return Job(request, _word(details.status), details.message or "", started, ended)


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Within, the environment lacks these: Ray would take them before any address given to it."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
