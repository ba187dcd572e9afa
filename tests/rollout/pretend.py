"""Groups and requests without an engine, for tests of the pool."""

from __future__ import annotations

import numpy as np

from rollout.record import Group, Rollout, SampleRequest, Sampling, ScoreRequest
from tasks.core import Parsed, Problem

VOCABULARY = 50


def problem(name: str) -> Problem:
    return Problem(
        id=name,
        task="sudoku",
        image=f"image of {name}".encode(),
        prompt="p",
        perception="",
        truth={},
        symmetry_key=name,
        knobs={},
    )


def request(name: str, of: str = "", n: int = 4, max_tokens: int = 8) -> SampleRequest:
    return SampleRequest(name, problem(of or name), n, Sampling(max_tokens=max_tokens))


def score_request(name: str, tokens: int = 3) -> ScoreRequest:
    return ScoreRequest(name, problem("p"), np.zeros(tokens, np.int32), None)


def group(asked: SampleRequest, sampler: str = "sampler-0") -> Group:
    """A group as a healthy sampler returns it; its tokens hang on the group's id alone."""
    rng = np.random.default_rng(list(asked.group_id.encode()))
    return Group(
        asked.group_id,
        asked.problem,
        tuple(
            Rollout(
                rollout_id=f"{asked.group_id}/{place}",
                group_id=asked.group_id,
                kind=asked.kind,
                view=asked.view,
                prompt_ids=np.zeros(2, np.int32),
                response_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
                logprobs=-rng.random(length).astype(np.float32),
                versions=np.zeros(length, np.int32),
                segments=np.zeros(length, np.int8),
                prefix="",
                text="",
                parsed=Parsed(None, "", None, {}, ()),
                finish_reason="stop",
                seconds=0.0,
                sampler=sampler,
            )
            for place, length in enumerate(rng.integers(0, asked.sampling.max_tokens + 1, asked.n))
        ),
    )
