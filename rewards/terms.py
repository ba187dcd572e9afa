"""Reward terms: named functions from a whole group to one number a rollout.

A defect scores 0 on what it spoils: the parser leaves an unreadable perception or answer as
None, and None earns nothing. Nothing here raises for what a term does: a term that fails is
a typed outcome.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeGuard, TypeVar, runtime_checkable

import pydantic
from pydantic import ValidationError

from rewards.diagnosis import diagnose, seen, solved
from rewards.functions import FunctionTerm, function_term
from rewards.reward_model import RewardModel
from rewards.scored import (
    DIAGNOSIS,
    ModelRequest,
    Reply,
    ScoredTerms,
    TermError,
    TermFailure,
    UnusableValues,
    Values,
    named_values,
)
from rewards.settings import ARGUMENTS, BUILT_IN, RewardTermConfig, unknown_term
from rollout.record import Group, SampleRequest, ScoreRequest
from tasks.core import Problem, ScoresPerception, Task
from tasks.fields import Amount
from tasks.load import import_named


@runtime_checkable
class RewardTerm(Protocol):
    """What a recipe names as a reward: `"outcome"`, or `"module:Class"` for a user's own.

    A term is a pure function of the group: it may be run again on the same group after a
    worker died. It sees problems with images, parsed segments, tokens and log-probs.
    """

    name: str
    """How metrics, weights and records call it."""

    def __call__(self, task: Task, group: Group) -> Values:
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

    def score(self, task: Task, group: Group, replies: Sequence[Reply]) -> Values:
        """One finite number a rollout, from one reply a request, in the order of `ask`."""


@runtime_checkable
class RemoteTerm(Protocol):
    """A term that waits for others (a judge behind HTTP): its `__call__` is a coroutine.

    Several groups are in flight at once on one event loop, in an actor of the term's own.
    """

    name: str

    async def __call__(self, task: Task, group: Group) -> Values:
        """One finite number a rollout, in the group's order."""


class Outcome:
    """a: 1 where the parsed answer solves the problem, else 0 (arXiv 2605.29496)."""

    name = "outcome"

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in {0, 1}."""
        return [float(right) for right in solved(task, group)]


class Perception:
    """a_p: 1 where the own perception equals `p*` exactly, else 0 (arXiv 2605.29496)."""

    name = "perception"
    needs = (ScoresPerception,)

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in {0, 1}."""
        return [float(exact) for exact, _ in seen(task, group)]


class PerceptionGraded:
    """The task's graded perception score: share of cells right, edge F1, and the like."""

    name = "perception_graded"
    needs = (ScoresPerception,)

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in [0, 1]."""
        return [float(graded) for _, graded in seen(task, group)]


@pydantic.dataclasses.dataclass(config=ARGUMENTS)
class Format:
    """max(0, 1 − Σ penalty(defect)) over the named defects of a response.

    Args:
        penalties: defect name -> penalty; a defect not named here costs `default`.
        default: by default one defect of any kind costs everything.
    """

    name = "format"
    penalties: dict[str, Amount] = dataclasses.field(default_factory=dict)
    default: Amount = 1.0

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in [0, 1]."""
        return [
            max(0.0, 1.0 - math.fsum(self.penalties.get(d, self.default) for d in r.parsed.defects))
            for r in group.rollouts
        ]


Term = RewardTerm | AskingTerm | RemoteTerm


def find_term(name: str) -> Callable[..., Any]:
    """What a recipe names: a built-in term's class, or a user's own class or function.

    Raises `TermError` for an unknown name (with a near miss if there is one), or one that cannot
    be loaded.
    """
    target = BUILT_IN.get(name, name)
    if ":" not in target:
        raise TermError(unknown_term(name))
    try:
        term: Callable[..., Any] = import_named(f"reward term {name!r}", target)
    except ValueError as error:
        raise TermError(str(error)) from error
    return term


def load_term(name: str, args: Mapping[str, Any] | None = None) -> Term:
    """The term a recipe names (see `find_term`): a class made with `args`, or a function of rows.

    Raises `TermError` also for arguments it does not take, or an object that is no term.
    """
    named, args = find_term(name), args or {}
    if not callable(named):
        raise TermError(f"reward term {name!r}: {type(named).__name__} object is not callable")
    try:
        if not inspect.isclass(named):
            return function_term(name.rpartition(":")[2], named, args)
        term = named(**args)
    except ValidationError as error:
        raise TermError(f"reward term {name!r}: args: {argument_errors(error)}") from error
    except Exception as error:
        raise TermError(f"reward term {name!r}: args: {error}") from error
    if not isinstance(getattr(term, "name", None), str) or not isinstance(
        term, AskingTerm | RewardTerm
    ):
        raise TermError(
            f"reward term {name!r}: {type(term).__name__} is no RewardTerm; it needs "
            "a `name: str` and `__call__(task, group)`, or `model`, `ask` and `score`; "
            "or write a function of rows"
        )
    loaded: Term = term
    return loaded


def argument_errors(error: ValidationError) -> str:
    """What is wrong with which argument, and its value where that is short."""
    said = []
    for wrong in error.errors(include_url=False):
        given = wrong["input"]
        shown = f" = {given!r}" if isinstance(given, str | int | float | None) else ""
        at = ".".join(map(str, wrong["loc"]))
        said.append(f"{at}{shown}: {wrong['msg'].removeprefix('Value error, ')}")
    return "; ".join(said)


def needs_of(term: Term) -> tuple[type, ...]:
    """What a term needs of a task beyond its core: its attribute `needs`, if it has one."""
    needs: tuple[type, ...] = getattr(term, "needs", ())
    return needs


def is_remote(term: Term) -> TypeGuard[RemoteTerm]:
    """Whether a term waits for others: its `__call__` is a coroutine."""
    return inspect.iscoroutinefunction(type(term).__call__)


@dataclasses.dataclass(frozen=True)
class TermFacts:
    """What is to be known of a term where it does not work.

    `model`: whom an asking term asks, "" for the policy; None for one that asks nobody.
    `function`: whether it can be called with the rows of a whole step. `needs`: the abilities
    (`tasks.core.ABILITIES`) that it needs of a task. `leak_checked`: whether a perception that
    states the answer earns nothing. `reads`: whether it is paid for perceptions. `one_turn`: it
    cannot be had on responses of several turns. `weights`, `cpus`, `gpus`: of a remote term that
    runs a model: which, and what its actor takes.
    """

    name: str
    model: str | None
    remote: bool
    function: bool = False
    needs: tuple[type, ...] = ()
    leak_checked: bool = False
    reads: bool = False
    one_turn: bool = False
    weights: str = ""
    cpus: float = 0.0
    gpus: float = 0.0


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
        function, needs = isinstance(term, FunctionTerm), needs_of(term)
        checked, reads, one_turn = (
            bool(getattr(term, name, False))
            for name in ("leakage_check", "reads_perception", "one_turn")
        )
        takes = (term.model, term.cpus, term.gpus) if isinstance(term, RewardModel) else ()
        _KNOWN[key] = TermFacts(
            term.name, model, is_remote(term), function, needs, checked, reads, one_turn, *takes
        )
    return _KNOWN[key]


def load_terms(entries: Sequence[RewardTermConfig]) -> dict[str, Term]:
    """Load the terms by what metrics call them: an entry's `label`, or the term's own name.

    Raises `TermError` where two share a name, or one is no term.
    """
    return _by_name(entries, load_term)


def facts_of(entries: Sequence[RewardTermConfig]) -> dict[str, TermFacts]:
    """The facts of the terms that `load_terms` loads (`term_facts`); raises what it raises.

    And TermError for `scope = "step"` on what is no plain function.
    """
    facts_of = _by_name(entries, term_facts)
    for entry, facts in zip(entries, facts_of.values(), strict=True):
        if entry.scope == "step" and not facts.function:
            raise TermError(
                f'reward term {entry.name!r}: scope = "step" is for a plain function of rows '
                "(`def`, neither a class nor `async def`); leave scope out"
            )
    return facts_of


def _by_name(
    entries: Sequence[RewardTermConfig], load: Callable[[str, Mapping[str, Any]], Named]
) -> dict[str, Named]:
    terms: dict[str, Named] = {}
    for entry in entries:
        term = load(entry.name, entry.args)
        name = entry.label or term.name
        if name == DIAGNOSIS:
            raise TermError(f"a reward term cannot be named {DIAGNOSIS!r}; give it another label")
        if name in terms:
            raise TermError(f"two reward terms are named {name!r}; give one a `label` of its own")
        terms[name] = term
    return terms


@contextmanager
def _attempt(name: str, scored: ScoredTerms) -> Iterator[None]:
    """Time what a term does, and record what it raises as its failure."""
    start = time.perf_counter()
    try:
        yield
    except UnusableValues as error:
        scored.failures += (TermFailure(name, error.kind, str(error)),)
    except (Exception, SystemExit) as error:
        scored.failures += (_failure_of(name, error),)
    scored.seconds[name] = time.perf_counter() - start


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
    scored = ScoredTerms()
    for name, term in terms.items():
        with _attempt(name, scored):
            if isinstance(term, AskingTerm):
                scored.requests[name] = _requests(term.ask(task, group, other))
            else:
                scored.values |= named_values(name, term(task, group), len(group.rollouts))
    if with_diagnosis:
        with _attempt(DIAGNOSIS, scored):
            scored.diagnosis = diagnose(task, group)
        del scored.seconds[DIAGNOSIS]
    return scored


def score_step(groups: Sequence[Group], terms: Mapping[str, Term]) -> ScoredTerms:
    """Functions of the whole step, as if it were one group: float64 [B], group after group."""
    scored, count = ScoredTerms(), sum(len(group.rollouts) for group in groups)
    for name, term in terms.items():
        assert isinstance(term, FunctionTerm)
        with _attempt(name, scored):
            scored.values |= named_values(name, term.of_step(groups), count)
    return scored


def read_replies(
    task: Task, group: Group, terms: Mapping[str, Term], replies: Mapping[str, Sequence[Reply]]
) -> ScoredTerms:
    """The second half of every asking term that `replies` has answers for."""
    scored = ScoredTerms()
    for name, answers in replies.items():
        term = terms[name]
        assert isinstance(term, AskingTerm)
        with _attempt(name, scored):
            scored.values |= named_values(
                name, term.score(task, group, answers), len(group.rollouts)
            )
    return scored


async def score_remote(name: str, term: RemoteTerm, task: Task, group: Group) -> ScoredTerms:
    """One remote term on a group: its values or its typed failure."""
    scored = ScoredTerms()
    with _attempt(name, scored):
        scored.values |= named_values(name, await term(task, group), len(group.rollouts))
    return scored


def _requests(asked: Sequence[Any]) -> tuple[ModelRequest, ...]:
    for request in asked:
        if not isinstance(request, SampleRequest | ScoreRequest):
            kind = type(request).__name__
            raise TypeError(f"`ask` gave a {kind}, no SampleRequest or ScoreRequest")
    return tuple(asked)


def _failure_of(name: str, error: BaseException) -> TermFailure:
    """What a term raised, its own code on top of the traceback."""
    # The first two frames are ours: `_attempt`, and whoever called the term under it.
    frames = error.__traceback__
    for _ in range(2):
        frames = frames.tb_next if frames is not None else None
    text = "".join(traceback.format_exception(type(error), error, frames))
    message = "".join(traceback.format_exception_only(error)).strip()
    return TermFailure(name, "exception", message, text)
