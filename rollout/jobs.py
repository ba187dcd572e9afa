"""What the pool and its dispatch speak of: jobs, commands, seats; and whether a reply can be."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from rollout.record import Group, ReplyError, SampleRequest, ScoreRequest

Request = SampleRequest | ScoreRequest
Cause = Literal["actor", "engine", "silent", "overdue", "garbage", "transfer", "start"]
"""Why a sampler is lost: its process or its engine died, it does not answer pings, its oldest
request is overdue, it returned what cannot be, it failed a weight transfer, it did not start."""
STOP_SECONDS = 10.0
"""What an engine is given to shut down."""
ROUNDING = 1e-3
"""How far above 0 a log-prob may come out by arithmetic, in nats."""


@dataclass(frozen=True)
class Died:
    """In place of a reply: the sampler's process or engine is gone."""

    cause: Cause
    message: str


@dataclass(frozen=True)
class Refused:
    """In place of a reply: the request's own error, which another sampler would raise too."""

    error: BaseException
    message: str


class PoolClient(Protocol):
    """One life of a sampler, as the pool talks to it."""

    name: str

    def call(self, method: str, *args: Any) -> Any:
        """Start a method on the sampler; returns a future."""

    def watch(self, future: Any, then: Callable[[Any], None]) -> None:
        """Call `then`, on any thread, with the result, or with `Died` or `Refused`."""

    def cancel(self, future: Any) -> None:
        """Nobody waits for this any more."""

    def kill(self) -> None:
        """End the process, whatever state it is in."""


@dataclass(eq=False)
class Job:
    """A request on its way. `outcome` is set once; then it is over.

    until: when an answer comes too late; None waits for as long as it takes.
    submitted: belongs to `SamplerPool.submit`, not to a caller that waits for this one.
    """

    request: Request
    until: float | None = None
    submitted: bool = False
    outcome: Group | np.ndarray | ReplyError | Refused | None = None
    ticket: int = 0

    @property
    def id(self) -> str:
        """The group's id, or the request's."""
        if isinstance(self.request, SampleRequest):
            return self.request.group_id
        return self.request.request_id

    @property
    def sequences(self) -> int:
        """Responses that the engine runs for it at once."""
        return self.request.n if isinstance(self.request, SampleRequest) else 1

    @property
    def tokens(self) -> int:
        """At most so many are drawn or scored: what routing goes by."""
        if isinstance(self.request, SampleRequest):
            return self.request.n * self.request.sampling.max_tokens
        return 1 + len(self.request.response_ids)

    @property
    def images(self) -> int | None:
        """The key of the images that the engine will look at, as the problem stores them."""
        if isinstance(self.request, SampleRequest):
            view, images = self.request.view, self.request.problem.images
        else:
            view, images = "shown", self.request.images
        return hash((view, images)) if images and view != "none" else None

    def group(self) -> Group:
        """The group of a job that is over, or its error raised."""
        if isinstance(self.outcome, Refused):
            raise self.outcome.error
        if not isinstance(self.outcome, Group):
            raise TypeError(f"{self.id}: expected a group, got {type(self.outcome).__name__}")
        return self.outcome

    def answer(self, lost: str) -> Group | np.ndarray | ReplyError:
        """The reply to a job; one that never will be over was `lost` with its samplers."""
        if self.outcome is None:
            return ReplyError(self.id, "sampler_died", lost)
        if isinstance(self.outcome, Refused):
            return ReplyError(self.id, "refused", self.outcome.message)
        return self.outcome


@dataclass(frozen=True)
class Command:
    """What the pool must do: to sampler `name` in its life number `life`."""

    do: Literal["start", "renew", "sleep", "wake", "kill", "retire", "send", "drop", "ping"]
    name: str
    life: int
    ticket: int = 0
    request: Request | None = None


@dataclass(eq=False)
class Seat:
    """One sampler of the pool, through all its lives (processes).

    version: of the weights that it holds; None: those of its checkpoint.
    busy: since when it fetches a version, falls asleep or wakes.
    rest: `down` is one that has no process until the samplers' turn.
    lost_at: since when it is lost; None once it has taken work again.
    """

    name: str
    life: int
    started: float
    up: bool = False
    version: int | None = None
    busy: float | None = None
    rest: Literal["awake", "falling", "asleep", "waking", "down"] = "awake"
    absent: bool = False
    retiring: bool = False
    vocabulary: int = 0
    running: dict[int, tuple[Job, float]] = field(default_factory=dict)
    sequences: int = 0
    tokens: int = 0
    heard: float = 0.0
    pinged: float | None = None
    losses: deque[float] = field(default_factory=deque)
    images: OrderedDict[int, None] = field(default_factory=OrderedDict)
    idle: float = 0.0
    idle_since: float | None = None
    lost_at: float | None = None


class News(NamedTuple):
    """What befell a sampler, for the run's record; `str` of it for a person.

    at: by the clock of the pool. recovered_seconds: of one that is back, since it was lost.
    """

    at: float
    who: str
    what: Literal["lost", "back"]
    why: str = ""
    lost: str = ""
    recovered_seconds: float | None = None

    def __str__(self) -> str:
        if self.what == "back":
            return f"sampler {self.who!r} is back after {self.recovered_seconds:.0f} s"
        return f"sampler {self.who!r} is lost: {self.why}; {self.lost} are asked again"


def not_up(sampler: str, seconds: float) -> TimeoutError:
    """The error of a sampler that did not come up."""
    return TimeoutError(
        f"sampler {sampler!r} was not up after {seconds:g} s (sampler.start_timeout_seconds); is "
        "there a node with room for it (`ray status`)? else see its log in the Ray session folder"
    )


def fault_of(reply: Any, request: Request, vocabulary: int) -> str:
    """What is wrong with a sampler's reply, in words; "" where it can be what was asked for."""
    if isinstance(request, ScoreRequest):
        if not isinstance(reply, np.ndarray) or reply.shape != request.response_ids.shape:
            return f"expected {len(request.response_ids)} log-probs, got {_type_and_shape(reply)}"
        return _bad_logprobs(reply)
    if not isinstance(reply, Group):
        return f"expected a group, got {_type_and_shape(reply)}"
    if reply.group_id != request.group_id or reply.problem.id != request.problem.id:
        return f"got the group {reply.group_id!r} of problem {reply.problem.id!r}"
    if len(reply.rollouts) != request.n:
        return f"got {len(reply.rollouts)} of {request.n} responses"
    if len({rollout.rollout_id for rollout in reply.rollouts}) != request.n:
        return "two responses have one id"
    for rollout in reply.rollouts:
        ids = rollout.response_ids
        lengths = {len(ids), len(rollout.logprobs), len(rollout.versions), len(rollout.segments)}
        if rollout.group_id != request.group_id:
            return f"a response is of group {rollout.group_id!r}"
        if len(lengths) != 1 or rollout.sampled.sum() > request.sampling.max_tokens:
            return f"token ids, log-probs, versions and segments of lengths {sorted(lengths)}"
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocabulary):
            return f"token ids from {ids.min()} to {ids.max()} in a vocabulary of {vocabulary}"
        if fault := _bad_logprobs(rollout.logprobs):
            return fault
    return ""


def _bad_logprobs(values: np.ndarray) -> str:
    if not np.isfinite(values).all():
        return "a log-prob is not finite"
    if len(values) and values.max() > ROUNDING:
        return f"a log-prob of {values.max():g}, which is a probability above 1"
    return ""


def _type_and_shape(reply: Any) -> str:
    shape = f" of shape {reply.shape}" if isinstance(reply, np.ndarray) else ""
    return type(reply).__name__ + shape


def retire(clients: Sequence[PoolClient]) -> None:
    """Let engines shut down side by side, then end their processes."""
    calls = [(client, watched(client, "shutdown")) for client in clients]
    until = time.monotonic() + STOP_SECONDS
    for client, future in calls:
        # One that cannot shut down is ended as one that can.
        with contextlib.suppress(TimeoutError):
            future.result(max(0.0, until - time.monotonic()))
        client.kill()


def watched(client: PoolClient, method: str) -> Future[Any]:
    """Call a method; the future's result is what came back, or `Died` or `Refused`."""
    future: Future[Any] = Future()
    client.watch(client.call(method), future.set_result)
    return future


def all_over(jobs: Sequence[Job]) -> Callable[[], bool]:
    """Whether all jobs have their outcome; asking costs what was finished since."""
    unfinished = deque(jobs)

    def over() -> bool:
        while unfinished and unfinished[0].outcome is not None:
            unfinished.popleft()
        return not unfinished

    return over
