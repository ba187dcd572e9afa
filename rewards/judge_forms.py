"""What a judge is asked to give, and how what it wrote is read: a score, or a list of claims.

What the judge writes is as hostile as what it reads: the policy writes to it. A reply is JSON of
exactly the form that was asked for, or it is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["score", "claims"]

TOP = 10
"""The best score; the reward is score / TOP."""
MOST = 64
"""Claims, or things missed, in a reply; more are out of range."""

RUBRIC = """\
You compare a text with an image. The text is what somebody states to see in the image, in the \
notation that the question asks for. Give an integer from 0 to 10 for how well it describes the \
image: 10 if everything the question needs is stated and right, 5 if about half of it is, 0 if it \
is wrong throughout, empty, or no description at all. Things that are missing, wrong or made up \
all cost points. Length, confidence, explanations and answers to the question earn nothing."""
CLAIMS_RUBRIC = """\
You check a text against an image. The text is what somebody states to see in the image. First \
list every claim that it makes about the image: one fact about one thing each, in a few words of \
your own, none of them twice. Look at the image and say of each whether the image supports it; a \
claim that cannot be seen there is not supported. Then list what the text misses: each thing that \
the image shows, the question needs, and the text does not state. Explanations, conclusions and \
answers to the question are no claims."""


@dataclass(frozen=True)
class Form:
    """What a judge gives.

    Attributes:
        rubric: what to judge, where the recipe has none of its own.
        reply: how to reply, in words.
        gives: what it replies with, in one word.
        schema: of a reply.
        choices: every reply there is; None where they cannot be listed.
        max_tokens: of a reply, where the recipe does not say.
        read: from the reply's JSON to a verdict that JSON can hold; None where it has not the form.
        in_range: whether that is a verdict that can be.
        numbers: from a verdict, or None for a perception that nobody judged, to the term's `value`
            and other numbers by name.
    """

    rubric: str
    reply: str
    gives: str
    schema: Mapping[str, Any]
    choices: tuple[str, ...] | None
    max_tokens: int
    read: Callable[[Any], Any | None]
    in_range: Callable[[Any], bool]
    numbers: Callable[[Any | None], dict[str, float]]


def _object(**properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _read_score(value: Any) -> int | None:
    whole = isinstance(value, dict) and set(value) == {"score"} and type(value["score"]) is int
    return value["score"] if whole else None


def _score_in_range(verdict: Any) -> bool:
    return type(verdict) is int and 0 <= verdict <= TOP


SCORE = Form(
    rubric=RUBRIC,
    reply='{"score": n}, n an integer from 0 to 10.',
    gives="score",
    # Every server that knows schemas knows enum; bounds on integers are not universal.
    schema=_object(score={"type": "integer", "enum": list(range(TOP + 1))}),
    choices=tuple(f'{{"score": {score}}}' for score in range(TOP + 1)),
    max_tokens=64,
    read=_read_score,
    in_range=_score_in_range,
    numbers=lambda score: {"value": (score or 0) / TOP},
)


def _read_claims(value: Any) -> list[int] | None:
    """[claims supported, claims not supported, things missed], equal ones counted once.

    A claim that is listed both ways is not supported.
    """
    if not isinstance(value, dict) or set(value) != {"claims", "missed"}:
        return None
    if not isinstance(value["claims"], list) or not isinstance(value["missed"], list):
        return None
    support_of: dict[str, bool] = {}
    for entry in value["claims"]:
        if not isinstance(entry, dict) or set(entry) != {"claim", "supported"}:
            return None
        claim, supported = _normalised(entry["claim"]), entry["supported"]
        if not claim or type(supported) is not bool:
            return None
        support_of[claim] = supported and support_of.get(claim, True)
    missed = {_normalised(claim_text) for claim_text in value["missed"]}
    if "" in missed:
        return None
    supported = sum(support_of.values())
    return [supported, len(support_of) - supported, len(missed)]


def _normalised(text: Any) -> str:
    return " ".join(text.casefold().split()) if isinstance(text, str) else ""


def _claims_in_range(verdict: Any) -> bool:
    return (
        isinstance(verdict, list)
        and len(verdict) == 3
        and all(type(count) is int and count >= 0 for count in verdict)
        and max(verdict[0] + verdict[1], verdict[2]) <= MOST
    )


def _claim_numbers(verdict: list[int] | None) -> dict[str, float]:
    """With s claims supported, u not and m things missed (0/0 is what no claim at all gives).

    `supported`: s / (s + u), which making things up lowers. `missed`: m / (s + m), which leaving
    things out raises. `value`: 2s / (2s + u + m), the harmonic mean of `supported` and
    1 − `missed`.
    """
    s, u, m = verdict or (0, 0, 0)
    return {
        "value": 2 * s / (2 * s + u + m) if s else 0.0,
        "supported": s / (s + u) if s else 0.0,
        "missed": m / (s + m) if s else 1.0,
    }


CLAIMS = Form(
    rubric=CLAIMS_RUBRIC,
    reply='{"claims": [{"claim": "...", "supported": true or false}, ...], "missed": ["...", ...]}',
    gives="claims",
    schema=_object(
        claims={
            "type": "array",
            "items": _object(claim={"type": "string"}, supported={"type": "boolean"}),
        },
        missed={"type": "array", "items": {"type": "string"}},
    ),
    choices=None,
    max_tokens=1024,
    read=_read_claims,
    in_range=_claims_in_range,
    numbers=_claim_numbers,
)

FORMS: Mapping[Mode, Form] = {"score": SCORE, "claims": CLAIMS}
