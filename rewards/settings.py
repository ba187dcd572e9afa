"""Recipe section [reward] and its [[reward.terms]]."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from tasks.core import SEGMENTS, Segment
from tasks.fields import OWN_NAME, Positive, Rate, Section, Share, Text, Weight, refusal

BUILT_IN = {
    "outcome": "rewards.terms:Outcome",
    "perception": "rewards.terms:Perception",
    "perception_graded": "rewards.terms:PerceptionGraded",
    "format": "rewards.terms:Format",
    "length": "rewards.verbosity:Length",
    "repetition": "rewards.verbosity:Repetition",
    "group_agreement": "rewards.surrogates:GroupAgreement",
    "self_consistency": "rewards.surrogates:SelfConsistency",
    "blind_solver": "rewards.surrogates:BlindSolver",
    "blind_policy": "rewards.surrogates:BlindPolicy",
    "image_dependence": "rewards.surrogates:ImageDependence",
    "view_agreement": "rewards.view_agreement:ViewAgreement",
    "blind_questions": "rewards.questions:BlindQuestions",
    "judge": "rewards.judge:Judge",
    "reward_model": "rewards.reward_model:RewardModel",
    "environment": "rewards.episodes:EnvironmentReward",
    "call_bonus": "rewards.episodes:CallBonus",
    "call_cost": "rewards.episodes:CallCost",
    "call_cap": "rewards.episodes:CallCap",
}
"""The reward terms a recipe can name without giving `module:Class`."""
OF_CALLS = ("call_bonus", "call_cost", "call_cap")
"""Of these, those that are paid for calls of [environment]."""

ARGUMENTS = ConfigDict(strict=True, extra="forbid")
"""How the arguments of a term's class are read, where pydantic reads them."""

Place = Literal["prompt", "prefix"]
"""Where a text-only reader finds a perception. `prompt`: before the question, in words that any
instructed model understands. `prefix`: it is forced as the perception segment of the reader's own
response, which only a model does well that was taught the segments (the policy, or an earlier
checkpoint of it)."""

Schedule = Literal["constant", "linear", "cosine"]
OnFailure = Literal["abort", "drop_group", "zero"]
Method = Literal["sum_then_normalize", "normalize_then_sum"]


def unknown_term(name: str) -> str:
    """Says that no reward term has this name, and which may be meant."""
    near = get_close_matches(name, BUILT_IN, n=1)
    known = f'known: {", ".join(BUILT_IN)}, or your own as "file.py:function" or "module:Class"'
    return f'no reward term "{name}"; ' + (f'did you mean "{near[0]}"?' if near else known)


class RewardTermConfig(Section):
    """[[reward.terms]] One named component of the reward."""

    name: Text
    """A built-in term, or your own: a function of rows (`"my_rewards.py:score"`,
    `"module:function"`; docs/your_reward.md) or a class (`"module:Class"`)."""
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)] | None = (
        None
    )
    """What metrics and records call it; needed where one term is in a recipe twice."""
    weight: Weight = 1.0
    """0 logs the term without rewarding it."""
    final_weight: Weight | None = None
    """The weight at the end of the schedule, where it has one."""
    schedule: Schedule = "constant"
    """How the weight goes to `final_weight`; `constant` has none."""
    schedule_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the run's steps after which `final_weight` is reached and kept."""
    segments: Annotated[tuple[Segment, ...], Field(strict=False, min_length=1)] = SEGMENTS
    """The tokens that get this term's advantage: credit by segment."""
    gate: Text | None = None
    """Another entry (its label, or its name): below `gate_threshold` this one counts as 0."""
    gate_threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    """What the value of `gate` must reach."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the term's class or function."""
    scope: Literal["group", "step"] = "group"
    """Of a function: whether one call gets the rows of a group, or of all groups of the step."""
    on_failure: OnFailure = "abort"
    """Where the term fails on a group: end the run, leave the group out, or count 0."""

    @model_validator(mode="after")
    def _schedule_goes_somewhere(self) -> RewardTermConfig:
        if (self.schedule == "constant") != (self.final_weight is None):
            missing = self.final_weight is None
            raise refusal(
                f'"{self.schedule}" needs the weight it goes to; add final_weight'
                if missing
                else 'final_weight is given, and a "constant" weight never gets there; write '
                'schedule = "linear" or "cosine"',
                "schedule",
            )
        return self

    @property
    def entry(self) -> str:
        """What other entries call this one."""
        return self.label or self.name

    def weight_at(self, progress: float) -> float:
        """The weight at a share of the run; 0 logs the term without rewarding it.

        With x the share of the schedule, clipped to [0, 1]: `linear`: start + (end − start)·x;
        `cosine`: start + (end − start)·(1 − cos πx)/2, slow at both ends.
        """
        if self.final_weight is None:
            return self.weight
        x = min(1.0, max(0.0, progress / self.schedule_share))
        share = x if self.schedule == "linear" else (1 - math.cos(math.pi * x)) / 2
        return self.weight + (self.final_weight - self.weight) * share

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        if name in BUILT_IN or OWN_NAME.fullmatch(name):
            return name
        if ":" not in name:
            raise refusal(unknown_term(name))
        raise refusal(f'expected "file.py:function" or "module:Class", got "{name}"')


class RewardConfig(Section):
    """[reward] What is rewarded. `alpha` is short for `R = alpha * a_p + (1 - alpha) * a`."""

    alpha: Share | None = None
    """Short for the terms `perception`, weighed so, and `outcome`, with the rest of 1."""
    terms: Annotated[tuple[RewardTermConfig, ...], Field(strict=False)] = ()
    """The named components; without them and `alpha` it is `outcome` alone."""
    compose: Method = "sum_then_normalize"
    """`normalize_then_sum` (GDPO) normalises each term in its group before they are added."""
    workers: Positive = 1
    """Processes that run the terms that compute; each reserves no core of its own."""
    deadline_seconds: Rate = 60.0
    """One call of the computing terms."""
    answer_seconds: Rate = 600.0
    """All that terms ask a model in a step."""
    remote_seconds: Rate = 300.0
    """One group at a remote term (a judge), its retries included."""
    remote_in_flight: Positive = 8
    """Groups that a remote term has in flight at once."""
    memory_gib: Rate = 4.0
    """What a reward worker may allocate before its term fails with a MemoryError."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> RewardConfig:
        if self.alpha is not None and self.terms:
            raise refusal(
                "alpha is short for the terms outcome and perception, and terms are given too; "
                "remove one of them",
                "alpha",
            )
        names = [term.entry for term in self.terms]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise refusal(
                    f'"{name}" is already terms[{names.index(name)}]; give it once, with the sum '
                    "of the weights, or give one of them a label",
                    "terms",
                    i,
                    "name",
                )
        return self

    @model_validator(mode="after")
    def _gates_are_other_entries(self) -> RewardConfig:
        names = [term.entry for term in self.terms]
        for i, term in enumerate(self.terms):
            if term.gate is not None and (term.gate not in names or term.gate == term.entry):
                others = ", ".join(f'"{name}"' for name in names if name != term.entry)
                raise refusal(
                    f'got "{term.gate}", which is no other entry; there is {others or "none"} '
                    "(a gate that should not be rewarded itself has weight = 0)",
                    "terms",
                    i,
                    "gate",
                )
        return self

    @model_validator(mode="after")
    def _composition_makes_sense(self) -> RewardConfig:
        if self.terms and not any(term.weight or term.final_weight for term in self.terms):
            raise refusal("all weights are 0, so nothing is rewarded; weigh one of them", "terms")
        return self

    def effective_terms(self) -> tuple[RewardTermConfig, ...]:
        """The terms that count: `terms`, or what `alpha` stands for, or outcome alone."""
        if self.alpha is None:
            return self.terms or (RewardTermConfig(name="outcome"),)
        return (
            RewardTermConfig(name="outcome", weight=1 - self.alpha),
            RewardTermConfig(name="perception", weight=self.alpha),
        )
