"""What scoring a group gives: values or typed failures per term, advantages, and the truth.

Shapes: G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from rollout.record import Group, ReplyError, SampleRequest, ScoreRequest

FailureKind = Literal[
    "exception", "nan", "wrong_length", "not_numbers", "deadline", "worker_died", "model"
]
"""Why a term gave no values. `nan` covers every value that is not finite; `model`: the sampler
that was asked refused or died."""

ModelRequest = SampleRequest | ScoreRequest
"""What a term may ask a model: to write responses, or to score given tokens."""

Reply = Group | np.ndarray
"""A `Group` for a `SampleRequest`; float32 [T] log-probs in nats for a `ScoreRequest`."""


class Answerer(Protocol):
    """Samplers, as rewards see them (`rollout.sampler.SamplerPool`)."""

    def answer(
        self, requests: Sequence[ModelRequest], seconds: float
    ) -> Sequence[Reply | ReplyError]:
        """One reply a request, in order; what fails or is not there in time is a ReplyError."""


Values = Sequence[float] | np.ndarray | Mapping[str, Sequence[float] | np.ndarray]
"""What a term gives: one finite number a rollout. Or a mapping with these as `value` and beside
them parts by name, which are logged as `<term>.<part>` and never rewarded."""

DIAGNOSIS = "diagnosis"
"""The name under which a failing task (not a term) is reported; no term may take it."""


class TermError(ValueError):
    """A reward term that a recipe names wrongly or sets up wrongly."""


class RewardError(RuntimeError):
    """Scoring cannot go on; the message starts with the failing term's own traceback."""


@dataclass(frozen=True)
class TermFailure:
    """One term giving no usable values for one group.

    `traceback` is the term's own, "" where there is none (a deadline, a dead worker).
    """

    term: str
    kind: FailureKind
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What is true of a group whatever the recipe rewards; what nobody can tell is None, never 0.

    Attributes:
        a: bool [G], the answer solves the problem.
        defects: the parser's named defects, one tuple a rollout.
        a_p: bool [G], the own perception equals `p*` exactly; this, `a_p_graded` and `leak` are of
            problems with a perception label.
        a_p_graded: float64 [G], graded perception score in [0, 1].
        leak: bool [G], perception wrong and answer right.
        self_consistency: bool [G], the answer is valid for the own perception; of tasks that solve.
        reread_gain, reread_loss: bool [G], the perception was wrong (right) as it was first written
            and is right (wrong) as it was last; of labelled problems beside an environment.
    """

    a: np.ndarray
    defects: tuple[tuple[str, ...], ...]
    a_p: np.ndarray | None = None
    a_p_graded: np.ndarray | None = None
    leak: np.ndarray | None = None
    self_consistency: np.ndarray | None = None
    reread_gain: np.ndarray | None = None
    reread_loss: np.ndarray | None = None


def known(diagnoses: Iterable[Diagnosis], name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(`a`, the truth of that name) of each group of which it is known."""
    both = ((d.a, getattr(d, name)) for d in diagnoses)
    return [(a, truth) for a, truth in both if truth is not None]


@dataclass
class ScoredTerms:
    """What terms gave for one group: each is in `values`, `failures` or still in `requests`.

    Attributes:
        values: term name -> float64 [G].
        failures: what went wrong, one entry a failed term.
        seconds: term name -> wall time, failed terms included where it is known.
        diagnosis: None where the task itself failed (then `failures` says so).
        requests: asking terms: what a model has to answer before they can score.
    """

    values: dict[str, np.ndarray] = field(default_factory=dict)
    failures: tuple[TermFailure, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None
    requests: dict[str, Sequence[ModelRequest]] = field(default_factory=dict)

    def add(self, part: ScoredTerms) -> None:
        """Take in what other calls gave for the same group."""
        self.values |= part.values
        self.failures += part.failures
        for name, seconds in part.seconds.items():  # an asking term has two halves
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.diagnosis = self.diagnosis or part.diagnosis
        self.requests |= part.requests

    def parted(self, sizes: Sequence[int]) -> list[ScoredTerms]:
        """The terms of the rollouts of several groups together, by group.

        A failure is one of each group, and each took all the time.
        """
        cuts = np.cumsum(sizes)[:-1]
        values = {name: np.split(column, cuts) for name, column in self.values.items()}
        return [
            ScoredTerms({n: v[i] for n, v in values.items()}, self.failures, dict(self.seconds))
            for i in range(len(sizes))
        ]


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its rewards and advantages: what the learner's batch is made of.

    Attributes:
        terms: term name, or part of one -> float64 [G], raw values; a failed term is absent when
            the group is dropped and zero when failures count as zero.
        totals: float64 [G], the weighted sum of all terms behind their gates; NaN where dropped.
        advantages: float64 [G, C], a column a segment and one for tokens outside every segment
            (`rewards.advantages.CREDIT_COLUMNS`); exactly 0 where `zero_variance` or `dropped`.
        zero_variance: all its advantages are 0, so the group carries no gradient. An estimator
            with a group baseline gives that where rewards are equal in the group.
        dropped: a term failed and the recipe drops such groups.
        failures, seconds, diagnosis: as in `ScoredTerms`.
    """

    group: Group
    terms: Mapping[str, np.ndarray]
    totals: np.ndarray
    advantages: np.ndarray
    zero_variance: bool
    dropped: bool
    failures: tuple[TermFailure, ...]
    seconds: Mapping[str, float]
    diagnosis: Diagnosis | None

    @property
    def has_gradient(self) -> bool:
        """Whether the learner has anything to gain from this group."""
        return not (self.zero_variance or self.dropped)

    def measured(self) -> dict[str, np.ndarray]:
        """The terms that gave values of their own; zeros that stand for a failure are not."""
        return measured(self.terms, self.failures)


def measured(
    terms: Mapping[str, np.ndarray], failures: Iterable[TermFailure]
) -> dict[str, np.ndarray]:
    """The terms without those that failed."""
    failed = {failure.term for failure in failures}
    return {name: values for name, values in terms.items() if name not in failed}


class UnusableValues(ValueError):
    """What a term returned is not one finite number a rollout."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def as_values(result: Any, size: int) -> np.ndarray:
    """float64 [size] of what a term returned; raises UnusableValues where it cannot be that."""
    try:
        array = np.asarray(result)
    except Exception as error:
        raise UnusableValues("not_numbers", f"returned no array of numbers: {error}") from error
    if array.ndim == 1 and len(array) != size:
        raise UnusableValues("wrong_length", f"returned {len(array)} values for {size} rollouts")
    if array.ndim != 1 and array.dtype.kind in "biuf":
        raise UnusableValues("wrong_length", f"returned shape {array.shape}, expected ({size},)")
    # An empty list has a float dtype; strings and None would be turned into numbers by a cast.
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise UnusableValues("not_numbers", f"returned {type(result).__name__} of {array.dtype}")
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UnusableValues("nan", f"value {bad} of {size} is {values[bad]}")
    return values


def named_values(name: str, result: Any, size: int) -> dict[str, np.ndarray]:
    """What a term returned (`Values`): its own under its name, parts under `<name>.<part>`."""
    if not isinstance(result, Mapping):
        return {name: as_values(result, size)}
    if "value" not in result:
        raise UnusableValues("not_numbers", f'returned the parts {sorted(result)}, no "value"')
    return {
        name if part == "value" else f"{name}.{part}": as_values(values, size)
        for part, values in result.items()
    }
