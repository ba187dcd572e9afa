"""Reward terms: named functions from a whole group to one number a rollout.

A defect scores 0 on what it spoils: the parser leaves an unreadable perception or answer as
None, and None earns nothing. Nothing here raises for what a term does: a term that fails is
a typed outcome.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from rewards.judge import Judge
from rewards.scored import (
    DIAGNOSIS,
    Diagnosis,
    FailureKind,
    ModelRequest,
    Reply,
    ScoredTerms,
    TermError,
    TermFailure,
)
from rewards.surrogates import (
    BlindPolicy,
    BlindSolver,
    GroupAgreement,
    ImageDependence,
    SelfConsistency,
)
from rewards.verbosity import Length, Repetition
from rollout.record import Group, Rollout, SampleRequest, ScoreRequest
from tasks.core import Problem, Task


class TermSpec(Protocol):
    """How a recipe names a term; `[[reward.terms]]` fits as it is."""

    @property
    def name(self) -> str:
        """`"outcome"` or `"module:Class"`."""

    @property
    def args(self) -> Mapping[str, Any]:
        """Keyword arguments of the term's class."""

    @property
    def label(self) -> str | None:
        """What metrics and records call it; None: the term's own name."""


@runtime_checkable
class RewardTerm(Protocol):
    """What a recipe names as a reward: `"outcome"`, or `"module:Class"` for a user's own.

    A term is a pure function of the group: it may be run again on the same group after a
    worker died. It sees problems with images, parsed segments, tokens and log-probs.
    """

    name: str
    """How metrics, weights and records call it."""

    def __call__(self, task: Task, group: Group) -> list[float] | np.ndarray:
        """One finite number a rollout, in the group's order."""


@runtime_checkable
class AskingTerm(Protocol):
    """A term that needs a model's answers: it asks, samplers answer, it scores.

    Both halves are pure functions that run in a reward worker; the requests between them run on
    the policy's own samplers, or on a sampler with a frozen checkpoint.
    """

    name: str
    model: str
    """Checkpoint of the frozen model that answers; "" is the current policy."""

    def ask(self, task: Task, group: Group, other: Problem | None) -> Sequence[ModelRequest]:
        """What to ask about a group. `other` is another problem of the step, of the same task,
        with another image (for swaps); None where the step has none."""

    def score(self, task: Task, group: Group, replies: Sequence[Reply]) -> list[float] | np.ndarray:
        """One finite number a rollout, from one reply a request, in the order of `ask`."""


@runtime_checkable
class RemoteTerm(Protocol):
    """A term that waits for others (a judge behind HTTP): its `__call__` is a coroutine.

    Several groups are in flight at once on one event loop, in an actor of the term's own.
    """

    name: str

    async def __call__(self, task: Task, group: Group) -> list[float] | np.ndarray:
        """One finite number a rollout, in the group's order."""


class Outcome:
    """a: 1 where the parsed answer solves the problem, else 0 (arXiv 2605.29496)."""

    name = "outcome"

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in {0, 1}."""
        return [float(_solved(task, group, rollout)) for rollout in group.rollouts]


class Perception:
    """a_p: 1 where the own perception equals `p*` exactly, else 0 (arXiv 2605.29496)."""

    name = "perception"

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in {0, 1}."""
        return [float(_seen(task, group, rollout)[0]) for rollout in group.rollouts]


class PerceptionGraded:
    """The task's graded perception score: share of cells right, edge F1, and the like."""

    name = "perception_graded"

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in [0, 1]."""
        return [float(_seen(task, group, rollout)[1]) for rollout in group.rollouts]


class Format:
    """max(0, 1 − Σ penalty(defect)) over the named defects of a response.

    Args:
        penalties: defect name -> penalty; a defect not named here costs `default`.
        default: by default one defect of any kind costs everything.
    """

    name = "format"

    def __init__(self, penalties: Mapping[str, float] | None = None, default: float = 1.0) -> None:
        self.penalties = dict(penalties or {})
        self.default = default
        for label, value in [*self.penalties.items(), ("default", default)]:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ValueError(f"{label} = {value!r}: a penalty is a finite number >= 0")

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in [0, 1]."""
        return [
            max(0.0, 1.0 - math.fsum(self.penalties.get(d, self.default) for d in r.parsed.defects))
            for r in group.rollouts
        ]


Term = RewardTerm | AskingTerm | RemoteTerm

BUILT_IN: dict[str, Callable[..., Term]] = {
    Outcome.name: Outcome,
    Perception.name: Perception,
    PerceptionGraded.name: PerceptionGraded,
    Format.name: Format,
    Length.name: Length,
    Repetition.name: Repetition,
    GroupAgreement.name: GroupAgreement,
    SelfConsistency.name: SelfConsistency,
    BlindSolver.name: BlindSolver,
    BlindPolicy.name: BlindPolicy,
    ImageDependence.name: ImageDependence,
    Judge.name: Judge,
}


def find_term(name: str) -> Callable[..., Any]:
    """What a recipe names: a built-in term's class, or a user's own by `"module:Class"`.

    Raises `TermError` for an unknown name (with a near miss if there is one), or a module or
    class that cannot be loaded.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise TermError(
                f"reward term {name!r}: cannot import {module_name!r} ({error}); "
                "put its folder on PYTHONPATH or into the job's working directory"
            ) from error
        if not hasattr(module, attribute):
            hint = _did_you_mean(attribute, [n for n in dir(module) if not n.startswith("_")])
            raise TermError(
                f"reward term {name!r}: module {module_name!r} has no {attribute!r}{hint}"
            )
        found: Callable[..., Any] = getattr(module, attribute)
        return found
    if name not in BUILT_IN:
        hint = _did_you_mean(name, list(BUILT_IN))
        raise TermError(
            f"no reward term {name!r}{hint}; there are {', '.join(BUILT_IN)}, "
            'or a term of your own as "module:Class"'
        )
    return BUILT_IN[name]


def load_term(name: str, args: Mapping[str, Any] | None = None) -> Term:
    """The term a recipe names (see `find_term`), made with `args` as keywords.

    Raises `TermError` also for arguments it does not take, or an object that is no term.
    """
    factory = find_term(name)
    try:
        term = factory(**(args or {}))
    except Exception as error:
        raise TermError(f"reward term {name!r}: args: {error}") from error
    if not isinstance(getattr(term, "name", None), str) or not isinstance(
        term, AskingTerm | RewardTerm
    ):
        raise TermError(
            f"reward term {name!r}: {type(term).__name__} is no RewardTerm; it needs "
            "a `name: str` and `__call__(task, group)`, or `model`, `ask` and `score`"
        )
    loaded: Term = term
    return loaded


def is_remote(term: Term) -> bool:
    """Whether a term waits for others: its `__call__` is a coroutine."""
    return inspect.iscoroutinefunction(type(term).__call__)


@dataclass(frozen=True)
class TermFacts:
    """What is to be known of a term where it does not work.

    `model`: whom an asking term asks, "" for the policy; None for one that asks nobody.
    """

    name: str
    model: str | None
    remote: bool


Named = TypeVar("Named", "Term", TermFacts)
_KNOWN: dict[tuple[str, str], TermFacts] = {}


def term_facts(name: str, args: Mapping[str, Any] | None = None) -> TermFacts:
    """The facts of a term, made once a process for it and let go: it may hold a model.

    Raises `TermError` as `load_term` does.
    """
    key = (name, repr(dict(args or {})))
    if key not in _KNOWN:
        term = load_term(name, args)
        model = term.model if isinstance(term, AskingTerm) else None
        _KNOWN[key] = TermFacts(term.name, model, is_remote(term))
    return _KNOWN[key]


def load_terms(specs: Sequence[TermSpec]) -> dict[str, Term]:
    """Load the terms by what metrics call them: an entry's `label`, or the term's own name.

    Raises `TermError` where two share a name, or one is no term.
    """
    return _by_name(specs, load_term)


def facts_of(specs: Sequence[TermSpec]) -> dict[str, TermFacts]:
    """The facts of the terms that `load_terms` loads (`term_facts`); raises what it raises."""
    return _by_name(specs, term_facts)


def _by_name(
    specs: Sequence[TermSpec], load: Callable[[str, Mapping[str, Any]], Named]
) -> dict[str, Named]:
    terms: dict[str, Named] = {}
    for spec in specs:
        term = load(spec.name, spec.args)
        name = spec.label or term.name
        if name == DIAGNOSIS:
            raise TermError(f"a reward term cannot be named {DIAGNOSIS!r}; give it another label")
        if name in terms:
            raise TermError(f"two reward terms are named {name!r}; give one a `label` of its own")
        terms[name] = term
    return terms


def score_group(
    task: Task,
    group: Group,
    terms: Mapping[str, Term],
    with_diagnosis: bool = True,
    other: Problem | None = None,
) -> ScoredTerms:
    """Run every term on a group, timed; a failing term is recorded and the rest still run.

    Asking terms only ask here (`requests`), see `read_replies`. `other`: see `AskingTerm.ask`.
    """
    values: dict[str, np.ndarray] = {}
    requests: dict[str, Sequence[ModelRequest]] = {}
    failures: list[TermFailure] = []
    seconds: dict[str, float] = {}
    diagnosis = None
    for name, term in terms.items():
        if isinstance(term, AskingTerm):
            asked, seconds[name] = _guarded(name, functools.partial(_ask, term, task, group, other))
            if isinstance(asked, TermFailure):
                failures.append(asked)
            else:
                requests[name] = asked
            continue
        outcome, seconds[name] = _scored(name, functools.partial(term, task, group), group)
        if isinstance(outcome, TermFailure):
            failures.append(outcome)
        else:
            values[name] = outcome
    if with_diagnosis:
        found, _ = _guarded(DIAGNOSIS, functools.partial(diagnose, task, group))
        if isinstance(found, TermFailure):
            failures.append(found)
        else:
            diagnosis = found
    return ScoredTerms(values, tuple(failures), seconds, diagnosis, requests)


def read_replies(
    task: Task, group: Group, terms: Mapping[str, Term], replies: Mapping[str, Sequence[Reply]]
) -> ScoredTerms:
    """The second half of every asking term that `replies` has answers for."""
    values: dict[str, np.ndarray] = {}
    failures: list[TermFailure] = []
    seconds: dict[str, float] = {}
    for name, answers in replies.items():
        term = terms[name]
        assert isinstance(term, AskingTerm)
        outcome, seconds[name] = _scored(
            name, functools.partial(term.score, task, group, answers), group
        )
        if isinstance(outcome, TermFailure):
            failures.append(outcome)
        else:
            values[name] = outcome
    return ScoredTerms(values, tuple(failures), seconds, None)


async def score_remote(name: str, term: RemoteTerm, task: Task, group: Group) -> ScoredTerms:
    """One remote term on a group: its values or its typed failure."""
    start = time.perf_counter()
    try:
        outcome = as_values(name, await term(task, group), len(group.rollouts))
    except (Exception, SystemExit) as error:
        outcome = failure_of(name, error)
    seconds = {name: time.perf_counter() - start}
    if isinstance(outcome, TermFailure):
        return ScoredTerms({}, (outcome,), seconds, None)
    return ScoredTerms({name: outcome}, (), seconds, None)


def _ask(
    term: AskingTerm, task: Task, group: Group, other: Problem | None
) -> tuple[ModelRequest, ...]:
    asked = tuple(term.ask(task, group, other))
    wrong = next((r for r in asked if not isinstance(r, SampleRequest | ScoreRequest)), None)
    if wrong is not None:
        raise TypeError(f"`ask` gave a {type(wrong).__name__}, no SampleRequest or ScoreRequest")
    return asked


def _scored(
    name: str, call: Callable[[], Any], group: Group
) -> tuple[np.ndarray | TermFailure, float]:
    result, seconds = _guarded(name, call)
    if not isinstance(result, TermFailure):
        result = as_values(name, result, len(group.rollouts))
    return result, seconds


def diagnose(task: Task, group: Group) -> Diagnosis:
    """Perception and reasoning truth of a group; needs labels, never used as a reward."""
    a = [_solved(task, group, rollout) for rollout in group.rollouts]
    seen = [_seen(task, group, rollout) for rollout in group.rollouts]
    consistent = [
        rollout.parsed.perception is not None
        and rollout.parsed.answer is not None
        and bool(task.consistent(group.problem, rollout.parsed.perception, rollout.parsed.answer))
        for rollout in group.rollouts
    ]
    a_bool = np.array(a, dtype=bool)
    a_p = np.array([exact for exact, _ in seen], dtype=bool)
    return Diagnosis(
        a=a_bool,
        a_p=a_p,
        a_p_graded=np.array([graded for _, graded in seen], dtype=np.float64),
        self_consistency=np.array(consistent, dtype=bool),
        leak=a_bool & ~a_p,
        defects=tuple(tuple(rollout.parsed.defects) for rollout in group.rollouts),
    )


def _solved(task: Task, group: Group, rollout: Rollout) -> bool:
    answer = rollout.parsed.answer
    return answer is not None and bool(task.check(group.problem, answer))


def _seen(task: Task, group: Group, rollout: Rollout) -> tuple[bool, float]:
    perception = rollout.parsed.perception
    if perception is None:
        return False, 0.0
    exact, graded = task.score_perception(group.problem, perception)
    return bool(exact), float(graded)


def _guarded(name: str, call: Callable[[], Any]) -> tuple[Any, float]:
    """The call's result or its typed failure, and its wall time in seconds."""
    start = time.perf_counter()
    try:
        result = call()
    except (Exception, SystemExit) as error:
        result = failure_of(name, error)
    return result, time.perf_counter() - start


def failure_of(name: str, error: BaseException) -> TermFailure:
    """What a term raised, its own code on top of the traceback."""
    # The first frame is ours that caught it.
    frames = error.__traceback__
    own = frames.tb_next if frames is not None and frames.tb_next else frames
    text = "".join(traceback.format_exception(type(error), error, own))
    message = "".join(traceback.format_exception_only(error)).strip()
    return TermFailure(name, "exception", message, text)


def as_values(name: str, result: Any, size: int) -> np.ndarray | TermFailure:
    """float64 [size] from what a term returned, or why it cannot be that."""

    def failure(kind: FailureKind, message: str) -> TermFailure:
        return TermFailure(name, kind, message)

    try:
        array = np.asarray(result)
    except Exception as error:
        return failure("not_numbers", f"returned no array of numbers: {error}")
    if array.ndim == 1 and len(array) != size:
        return failure("wrong_length", f"returned {len(array)} values for {size} rollouts")
    if array.ndim != 1 and array.dtype.kind in "biuf":
        return failure("wrong_length", f"returned shape {array.shape}, expected ({size},)")
    # An empty list has a float dtype; strings and None would be turned into numbers by a cast.
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        return failure("not_numbers", f"returned {type(result).__name__} of {array.dtype}")
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        return failure("nan", f"value {bad} of {size} is {values[bad]}")
    return values


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
