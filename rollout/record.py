"""The records that cross rooms: what is asked of a sampler, what comes back, and its weights.

Token in, token out: the ids the engine saw and made are kept as they are and are never made
again from text. Shapes: P prompt tokens (image placeholders expanded), T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from xxhash import xxh3_128_hexdigest

from rollout.settings import EnvironmentConfig
from tasks.calls import call_span
from tasks.core import ENVIRONMENT, Parsed, Problem
from tasks.images import blank_like
from tasks.returns import Returns

Kind = Literal["free", "oracle", "blind"]
"""`free`: image and prompt. `oracle`: `p*` forced as the perception prefix. `blind`: no image."""

ImageView = Literal["shown", "blank", "none"]
"""`blank`: a canvas of the same size, grey for every problem. `none`: prompt text only."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature=0` is greedy; `until` is text that ends a response too,
    as the last of it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    until: str = ""


@dataclass(frozen=True)
class SampleRequest:
    """Ask for `n` responses to one problem: one group."""

    group_id: str
    problem: Problem
    n: int
    sampling: Sampling
    kind: Kind = "free"
    view: ImageView = "shown"
    prefix: str = ""
    """Text the response is forced to start with; empty in kind `oracle`: the task's own prefix.

    It may come from a model: a special token spelled out in it is read as plain characters.
    """
    environment: EnvironmentConfig | None = None
    """What answers between turns; without it a response is one turn."""
    returns: Returns | None = None
    """What is shown in place of the pictures that it returns; None: these."""


@dataclass(frozen=True)
class ScoreRequest:
    """Ask for the log-probs of given response tokens, with these images or others.

    Attributes:
        request_id: names the request in errors.
        problem: its prompt is what the tokens answer.
        response_ids: int32 [T], the tokens to score; T may be 0. A special token that is not
            end-of-turn or padding may only be the last, as the sampler leaves it.
        images: encoded images to show in place of the problem's own, as many and in its order;
            none: prompt text only.

    The reply is float32 [T], nats at temperature 1 over the whole vocabulary: equal to a
    rollout's own log-probs where it was sampled so.
    """

    request_id: str
    problem: Problem
    response_ids: np.ndarray
    images: tuple[bytes, ...]


@dataclass(frozen=True)
class Turn:
    """A turn of the policy, and what an environment answered.

    Attributes:
        text: what the policy wrote; hostile input wherever it is shown.
        called: it was a call, understood or not; the last turn mostly is none.
        said, images: the answer's text and how many images, as far as they were shown.
        reward, defects: see `tasks.environments.Observation`.
    """

    text: str
    called: bool = False
    said: str = ""
    images: int = 0
    reward: float = 0.0
    defects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One sampled response, of one turn or several with tokens of an environment between them.

    Attributes:
        prompt_ids: int32 [P], with the engine's expanded image placeholders and the forced
            prefix, if any, at the end.
        response_ids: int32 [T], a turn's end-of-turn token included if reached; the first and
            the last token are sampled.
        images: the encoded images that the placeholders of all these tokens stand for, in order.
        logprobs: float32 [T], the sampler's processed log-probs (nats) of the sampled tokens, 0 of
            others.
        versions: int32 [T], policy version that sampled each token, or the sampled one before it.
        segments: int8 [T], index into `tasks.core.SEGMENTS`, `NO_SEGMENT`, or `ENVIRONMENT` where
            the token is not sampled.
        prefix: all forced text before the sampled text: the request's, or the kind's own.
        text: sampled text, decoded; hostile input wherever it is shown.
        parsed: `prefix + text` read by the task's parser, turn by turn (`tasks/turns.py`).
        finish_reason: the engine's word: `stop`, `length`, or `abort`; of an episode see
            `rollout.episode.End`.
        seconds: wall time from submission to completion of the group.
        turns: where an environment was there; else none.
        failure: of the environment, "kind: message"; "" where it did not fail.
    """

    rollout_id: str
    group_id: str
    kind: Kind
    view: ImageView
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    images: tuple[bytes, ...] = field(repr=False)
    logprobs: np.ndarray
    versions: np.ndarray
    segments: np.ndarray
    prefix: str
    text: str
    parsed: Parsed
    finish_reason: str
    seconds: float
    sampler: str
    turns: tuple[Turn, ...] = ()
    failure: str = ""

    @property
    def sampled(self) -> np.ndarray:
        """bool [T]: the tokens that the policy wrote."""
        from_policy: np.ndarray = self.segments != ENVIRONMENT
        return from_policy


@dataclass(frozen=True)
class Group:
    """The rollouts of one problem, in sampling order."""

    group_id: str
    problem: Problem
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class ReplyError:
    """Why a request has no reply.

    Attributes:
        request_id: the `request_id` of a ScoreRequest, the `group_id` of a SampleRequest.
        kind: `refused` by the engine or failed in reading its answer; not answered by the
            `deadline`; `sampler_died` before or while answering.
        message: names the problem or the sampler.
    """

    request_id: str
    kind: Literal["refused", "deadline", "sampler_died"]
    message: str


@dataclass(frozen=True)
class Piece:
    """One tensor of a version of the weights, as the manifest names it.

    Attributes:
        name: the checkpoint's name of it.
        dtype: torch's word, without `torch.`.
        shape: of the whole tensor.
        bytes: how many there are.
        checksum: of them, in hex.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Weights:
    """A policy version that samplers fetch: what it is made of, and where its bytes are.

    Attributes:
        manifest: the pieces of each bucket, in the order they are loaded in.
        buckets: for each an awaitable (a reference into Ray's object store) of its pieces' bytes,
            a list of uint8 arrays.
    """

    version: int
    manifest: tuple[tuple[Piece, ...], ...]
    buckets: tuple[Any, ...]


def acts(turns: Sequence[Turn]) -> list[tuple[int, int]]:
    """[start, end) of each call, in characters of what the policy wrote, turns end to end."""
    found, at = [], 0
    for turn in turns:
        if turn.called and (span := call_span(turn.text)):
            found.append((at + span[0], at + span[1]))
        at += len(turn.text)
    return found


def as_turns(prefix: str, text: str, turns: Sequence[Turn]) -> list[str]:
    """The text of a response by turns, what was forced at the start of the first."""
    if not turns:
        return [prefix + text]
    return [prefix + turns[0].text, *(turn.text for turn in turns[1:])]


def viewed(problem: Problem, view: ImageView) -> tuple[bytes, ...]:
    """What a request with this view shows of a problem's images, in the problem's order."""
    if view == "none":
        return ()
    return problem.images if view == "shown" else tuple(map(blank_like, problem.images))


def checksum(data: np.ndarray) -> str:
    """What tells two lots of bytes apart, by accident and not by malice: XXH3, 128 bits."""
    return xxh3_128_hexdigest(data.data)
