"""Surrogates: rewards for seeing that need no perception labels.

| term | what it takes as evidence of a right perception |
|---|---|
| `GroupAgreement` | the other rollouts of the group saw the same |
| `SelfConsistency` | the own answer follows from it |
| `BlindSolver` | the task's exact solver gets from it to a right answer |
| `BlindPolicy` | a model without the image gets from it to a right answer |
| `ImageDependence` | the image made its tokens likelier |

None of them looks at `p*`. The blind ones check an answer, as the outcome does; the others need
no truth at all. An unreadable perception earns 0 everywhere and is never sent to a model.

Guards: every term takes `max_perception_tokens` (tags included). The blind ones take
`leakage_check`: a perception that states the answer would earn everything without having been
seen (see `rewards/leaks.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from rewards.leaks import leaks
from rewards.settings import ARGUMENTS
from rollout.record import Group, Rollout, SampleRequest, Sampling, ScoreRequest
from tasks.core import SEGMENTS, HasPerceptionItems, Problem, Solves, Task, need
from tasks.fields import Amount, Count, Positive, Rate
from tasks.files import expanded
from tasks.images import blank_like, mask_patches
from tasks.responses import line_ends, without_preamble

PERCEPTION = SEGMENTS.index("perception")
NO_SOLVER = "blind_policy needs a language model instead"


@dataclass(config=ARGUMENTS, kw_only=True)
class Capped:
    """What all surrogates share.

    Args:
        max_perception_tokens: a longer perception earns 0; 0 is no cap.
    """

    reads_perception = True
    max_perception_tokens: Count = 0

    def readable(self, rollout: Rollout) -> Any | None:
        """The own perception, None where it is unreadable or too long."""
        length = int((rollout.segments == PERCEPTION).sum())
        too_long = 0 < self.max_perception_tokens < length
        return None if too_long else rollout.parsed.perception


@dataclass(config=ARGUMENTS, kw_only=True)
class Blind(Capped):
    """What the surrogates share that answer from the perception alone.

    Args:
        leakage_check: a perception that states the answer earns 0.
    """

    leakage_check: bool = True

    def usable(self, task: Task, problem: Problem, rollout: Rollout) -> Any | None:
        """The perception to answer from, None where it would earn nothing."""
        perception = self.readable(rollout)
        if perception is None or not self.leakage_check:
            return perception
        return None if leaks(task, problem, perception, rollout.parsed.answer) else perception


@dataclass(config=ARGUMENTS)
class GroupAgreement(Capped):
    """How far the own perception is the group's: self-consistency voting, used as a reward.

    Majority voting over samples is arXiv 2203.11171, as a reward TTRL (arXiv 2504.16084); that
    the vote is on the perception, and the soft form, are ours. With G rollouts:

    - `plurality`: 1 where the own perception is in a largest cluster of equal perceptions with
      at least 2 members; tied clusters all count.
    - `soft`: with w(e) the share of the *other* rollouts whose perception holds item e,
      r_i = 2 Σ_{e∈i} w(e) / (|i| + Σ_e w(e)), the F1 of the own items against the others' votes;
      0 where that is 0/0. The items are the task's (`HasPerceptionItems`).

    A rollout that cannot be read votes for nothing, but counts among the G − 1 others: where few
    can be read there is little evidence, and little is paid. A perception above
    `max_perception_tokens` earns nothing; it still votes, as it has been read.

    Raises DataError for `soft` on a task without `perception_items`.
    """

    name = "group_agreement"
    mode: Literal["plurality", "soft"] = "plurality"

    @property
    def needs(self) -> tuple[type, ...]:
        """Of a task, by mode."""
        return (HasPerceptionItems,) if self.mode == "soft" else ()

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in [0, 1]; perceptions must compare with `==`."""
        perceptions = [rollout.parsed.perception for rollout in group.rollouts]
        if self.mode == "soft":
            feature = 'group_agreement: mode = "soft"'
            has_items = need(task, HasPerceptionItems, feature, 'add it, or set mode = "plurality"')
            agreement = _soft(
                [None if p is None else has_items.perception_items(p) for p in perceptions]
            )
        else:
            agreement = _plurality(perceptions)
        return [
            0.0 if self.readable(rollout) is None else value
            for rollout, value in zip(group.rollouts, agreement, strict=True)
        ]


@dataclass(config=ARGUMENTS)
class SelfConsistency(Capped):
    """1 where the answer is valid for the own perception, whatever the image shows.

    The judge that `acc/self_consistency` uses, as a reward. It never looks at the image: a
    policy can earn it in full by inventing a problem and solving that.
    """

    name = "self_consistency"
    needs = (Solves,)

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in {0, 1}."""
        judge = need(task, Solves, self.name, NO_SOLVER)
        return [float(self._holds(judge, group.problem, rollout)) for rollout in group.rollouts]

    def _holds(self, task: Solves, problem: Problem, rollout: Rollout) -> bool:
        perception, answer = self.readable(rollout), rollout.parsed.answer
        if perception is None or answer is None:
            return False
        return bool(task.consistent(problem, perception, answer))


@dataclass(config=ARGUMENTS)
class BlindSolver(Blind):
    """1 where the task's exact solver gets a right answer out of the own perception.

    R_p = check(solve(p)): a perception is good if it suffices for the answer, as in RACRO
    (arXiv 2506.04559) and MoCA (arXiv 2605.14054), whose solvers are language models. An exact
    solver never errs, so what is left to be wrong is the perception. It pays some wrong ones:
    a clue overlooked that the others imply, an edge that changes no colour.
    """

    name = "blind_solver"
    needs = (Solves,)

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in {0, 1}; equal perceptions are solved once."""
        task = need(task, Solves, self.name, NO_SOLVER)
        solved: list[tuple[Any, float]] = []
        values = []
        for rollout in group.rollouts:
            perception = self.usable(task, group.problem, rollout)
            if perception is None:
                values.append(0.0)
                continue
            value = next((v for known, v in solved if known == perception), None)
            if value is None:
                answer = task.solve(group.problem, perception)
                value = float(answer is not None and bool(task.check(group.problem, answer)))
                solved.append((perception, value))
            values.append(value)
        return values


@dataclass(config=ARGUMENTS)
class BlindPolicy(Blind):
    """1 where a model that is shown no image answers right from the own perception.

    The perception segment is forced as the start of a response to the prompt alone; the model
    goes on from where the reasoning begins. Vision-SR1 (arXiv 2508.19652) asks the policy
    itself, MoCA (arXiv 2605.14054) and RACRO (arXiv 2506.04559) a frozen model. Nothing but the
    segment is forced: text around it could carry the answer past the parser.

    Args:
        model: checkpoint of the frozen model that answers; "" is the current policy.
        max_tokens: of the continuation; one that is cut has no answer and earns 0.
        temperature: 0 is greedy.
    """

    name = "blind_policy"
    model: Annotated[str, AfterValidator(expanded)] = ""
    max_tokens: Positive = 256
    temperature: Amount = 0.0

    def ask(self, task: Task, group: Group, other: Problem | None) -> list[SampleRequest]:
        """One request for each different perception text that may earn something."""
        return [
            SampleRequest(
                group_id=f"{group.group_id}/{self.name}-{i}",
                problem=group.problem,
                n=1,
                sampling=Sampling(temperature=self.temperature, max_tokens=self.max_tokens),
                kind="blind",
                view="none",
                prefix=prefix,
            )
            for i, prefix in enumerate(different(self._prefixes(task, group)))
        ]

    def score(self, task: Task, group: Group, replies: Sequence[Group | np.ndarray]) -> list[float]:
        """float [G] in {0, 1}."""
        prefixes = self._prefixes(task, group)
        distinct = different(prefixes)
        expect_replies(self.name, len(distinct), replies)
        values: dict[str | None, float] = {None: 0.0}
        for prefix, reply in zip(distinct, replies, strict=True):
            if not isinstance(reply, Group) or len(reply.rollouts) != 1:
                raise ValueError(f"{self.name}: expected a group of one rollout as a reply")
            answer = reply.rollouts[0].parsed.answer
            values[prefix] = float(answer is not None and bool(task.check(group.problem, answer)))
        return [values[prefix] for prefix in prefixes]

    def _prefixes(self, task: Task, group: Group) -> list[str | None]:
        """What is forced for each rollout, None where it earns nothing anyhow."""
        return [
            None
            if self.usable(task, group.problem, rollout) is None
            else blind_prefix(task, rollout)
            for rollout in group.rollouts
        ]


@dataclass(config=ARGUMENTS)
class ImageDependence(Capped):
    """clip(g, 0, cap) / cap, g the mean log-prob gain of the perception tokens by the image.

    g = mean_t [log π(t | image) − log π(t | altered image)] over the tokens of the perception
    segment, in nats a token: a sample of KL(π(· | image) ‖ π(· | masked image)), which PAPO
    (arXiv 2507.06448) adds to the loss. Both sides are scored by one model in one way, so the
    sampling temperature has no part in it. It tells whether the perception came from the image,
    not whether it is right. Of several images all are altered; without one there is no gain.

    Args:
        view: what the image is altered to: `masked`, random patches black; `blank`, its mean
            colour; `swapped`, another problem's image.
        cap: gain in nats a token that earns 1.
        patch_size: of `masked`, in pixels; PAPO's 14 is one patch of Qwen2.5-VL.
        share: of `masked`, of the patches.
    """

    name = "image_dependence"
    one_turn = True
    """It scores response tokens behind the problem's images alone."""
    model = ""
    view: Literal["masked", "blank", "swapped"] = "masked"
    cap: Rate = 1.0
    patch_size: Positive = 14
    share: Annotated[Rate, Field(le=1)] = 0.6

    def ask(self, task: Task, group: Group, other: Problem | None) -> list[ScoreRequest]:
        """Two requests, images and altered images, for each different run of tokens.

        Raises ValueError where the view is `swapped` and there are no other images.
        """
        runs = different(self._runs(group))
        if not runs:
            return []
        problem = group.problem
        views = {"image": problem.images, self.view: self._altered(problem, other)}
        return [
            ScoreRequest(
                request_id=f"{group.group_id}/{self.name}-{i}-{label}",
                problem=problem,
                response_ids=np.frombuffer(run, dtype=np.int32),
                images=images,
            )
            for i, run in enumerate(runs)
            for label, images in views.items()
        ]

    def score(self, task: Task, group: Group, replies: Sequence[Group | np.ndarray]) -> list[float]:
        """float [G] in [0, 1]."""
        run_of = self._runs(group)
        runs = different(run_of)
        expect_replies(self.name, 2 * len(runs), replies)
        gains: dict[bytes, np.ndarray] = {}
        for run, original, altered in zip(runs, replies[::2], replies[1::2], strict=True):
            gains[run] = self._logprobs(run, original) - self._logprobs(run, altered)
        values = []
        for rollout, own_run in zip(group.rollouts, run_of, strict=True):
            if own_run is None:
                values.append(0.0)
                continue
            gain = gains[own_run][rollout.segments[: len(gains[own_run])] == PERCEPTION].mean()
            values.append(float(np.clip(gain, 0.0, self.cap) / self.cap))
        return values

    def _runs(self, group: Group) -> list[bytes | None]:
        """int32 response tokens up to the end of the perception, None where nothing is earned."""
        runs: list[bytes | None] = []
        for rollout in group.rollouts:
            seeing = np.flatnonzero(rollout.segments == PERCEPTION)
            if not group.problem.images or self.readable(rollout) is None or not len(seeing):
                runs.append(None)
            else:
                ids = rollout.response_ids[: seeing[-1] + 1]
                runs.append(np.asarray(ids, dtype=np.int32).tobytes())
        return runs

    def _altered(self, problem: Problem, other: Problem | None) -> tuple[bytes, ...]:
        if self.view == "masked":
            return tuple(mask_patches(i, self.patch_size, self.share) for i in problem.images)
        if self.view == "blank":
            return tuple(map(blank_like, problem.images))
        if other is None:
            raise ValueError(
                f'{self.name}: view = "swapped" needs another problem of the task in the step, '
                "and there is none; raise algorithm.problems_per_step, or set view to "
                '"masked" or "blank"'
            )
        return other.images

    def _logprobs(self, run: bytes, reply: Group | np.ndarray) -> np.ndarray:
        """float64 [T] of a reply."""
        count = len(run) // np.dtype(np.int32).itemsize
        if not isinstance(reply, np.ndarray) or reply.shape != (count,):
            raise ValueError(f"{self.name}: expected {count} log-probs as a reply")
        return reply.astype(np.float64)


def blind_prefix(task: Task, rollout: Rollout) -> str:
    """A rollout's readable perception segment and the line ends after it.

    Prose in front of a JSON perception is left out where the task reads the rest the same.
    Raises ValueError where the task's parser does not say where the perception lies.
    """
    if "perception" not in rollout.parsed.spans:
        raise ValueError(
            f"blind_policy: `parse` of task {task.name!r} read a perception without saying where "
            'it is; put it into `Parsed.spans["perception"]`'
        )
    start, end = rollout.parsed.spans["perception"]
    text = rollout.prefix + rollout.text
    segment, ending = text[start:end], line_ends(text, end)
    bare = without_preamble(segment) + ending
    return bare if task.parse(bare).perception == rollout.parsed.perception else segment + ending


def _plurality(perceptions: Sequence[Any | None]) -> list[float]:
    """1 for the members of the largest clusters with at least 2 members; [G]."""
    sizes = [
        0 if perception is None else sum(p is not None and p == perception for p in perceptions)
        for perception in perceptions
    ]
    largest = max(sizes, default=0)
    return [float(size == largest >= 2) for size in sizes]


def _soft(claims: Sequence[frozenset[Any] | None]) -> list[float]:
    """F1 of each rollout's items against the others' votes; [G].

    In whole numbers up to the one division: equal claims get equal values to the last bit, in
    whatever order the rollouts come, so that a group that agrees has exactly no variance.
    """
    votes = Counter(item for items in claims if items is not None for item in items)
    total = sum(votes.values())
    values = []
    for items in claims:
        # Both terms of the fraction times G − 1.
        shared = 0 if items is None else sum(votes[item] - 1 for item in items)
        size = 0 if items is None else len(items)
        below = size * (len(claims) - 1) + total - size
        values.append(2 * shared / below if shared else 0.0)
    return values


def different(keys: Sequence[Any | None]) -> list[Any]:
    """The distinct keys in order of first appearance, without None."""
    return list(dict.fromkeys(key for key in keys if key is not None))


def expect_replies(name: str, count: int, replies: Sequence[Any]) -> None:
    if len(replies) != count:
        raise ValueError(f"{name}: asked {count} requests and got {len(replies)} replies")
