"""Recipe section [algorithm] and the sections below it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from learner.loss_settings import LossConfig, SegmentWeights
from rewards.advantages import ESTIMATORS
from rollout.settings import StalenessConfig
from tasks.fields import OneOf, Positive, Section, refuse


class DynamicSamplingConfig(Section):
    """[algorithm.dynamic_sampling] New groups for those without variance (DAPO)."""

    max_rounds: Positive = 4
    """How often a step may ask the samplers for more."""
    max_groups: Positive
    """How many extra groups a step may sample in all its rounds."""


class CurriculumConfig(Section):
    """[algorithm.curriculum] How often each `[[tasks]]` entry comes, by past success on it."""

    strategy: Annotated[str, OneOf(("uniform", "success_band"))] = "uniform"
    """`uniform`: by the entries' weights. `success_band`: more where about half of the answers
    are right. Or `"module:Class"`, see `cluster.run.curriculum.Strategy`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the strategy's class."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """What an entry's running success keeps of itself at each new group."""


class SpendConfig(Section):
    """[algorithm.budget] What a run may spend: sampled tokens, or seconds of its steps."""

    kind: Literal["tokens", "seconds"]
    """What is counted."""
    amount: Positive
    """How much of it."""


class AlgorithmConfig(LossConfig, StalenessConfig):
    """[algorithm] One step: sample, score, learn, send the weights back."""

    advantage: Annotated[str, OneOf(ESTIMATORS)] = "grpo"
    """How rewards become advantages; the formulas are in docs/learning.md. Or a function of your
    own, `"file.py:name"` or `"module:name"`: docs/your_algorithm.md."""
    advantage_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of your own `advantage`."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses to one problem."""
    steps: Positive = 40
    """Of the run; worked out where `epochs` is given."""
    epochs: Positive | None = None
    """How often each row of the data set comes, in an order of its own each time; the last step is
    filled up from the next epoch. For one [[tasks]] entry with `data`."""
    budget: SpendConfig | None = None
    """Ends the run before `steps` when it is spent, and is what schedules go by."""
    drop_zero_variance: bool = True
    """Leave out groups whose rewards are all equal; they have no gradient."""
    segment_weights: SegmentWeights = SegmentWeights()
    """What a token's loss is multiplied by, by its segment."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Extra groups in place of those without variance."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """How often each `[[tasks]]` entry comes."""
    on_mismatch: Literal["warn", "stop"] = "warn"
    """Where sampler and learner disagree by more than arithmetic explains: say so, or end the
    run with an error (the limits: `cluster/record/mismatch.py`)."""

    @model_validator(mode="before")
    @classmethod
    def _stale_tokens_are_corrected(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        stale = isinstance(versions := data.get("max_staleness", 0), int) and versions > 0
        return ({"correction": {"kind": "token_tis"}} if stale else {}) | data

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> AlgorithmConfig:
        """Of what does not go together the first is told, at the field that is to be changed."""
        updates, stale, strategy = (
            self.updates_per_step,
            self.max_staleness,
            self.curriculum.strategy,
        )
        refuse(
            self.kl_weight and updates == 1 and stale == 0,
            "kl_weight",
            f"got {self.kl_weight:g}, but with one update a step the learner still is the "
            "policy that sampled, and the KL to it has no gradient; raise updates_per_step, "
            "or leave kl_weight out",
        )
        refuse(
            strategy != "uniform" and stale,
            "curriculum.strategy",
            f'got "{strategy}" with max_staleness = {stale}; problems are drawn ahead then, before '
            'the success on earlier ones is known; use "uniform" or max_staleness = 0',
        )
        refuse(
            self.dynamic_sampling and self.advantage not in ("grpo", "dr_grpo", "rloo"),
            "advantage",
            f'extra groups are scored after the others, and "{self.advantage}" compares all '
            'groups of a batch; use "grpo", "dr_grpo" or "rloo"',
        )
        refuse(
            self.dynamic_sampling and not self.drop_zero_variance,
            "drop_zero_variance",
            "got false, and dynamic_sampling puts new groups in the place of those that are "
            "dropped; leave one of them out",
        )
        refuse(
            self.advantage_args and self.advantage in ESTIMATORS,
            "advantage_args",
            f'"{self.advantage}" takes none; leave them out',
        )
        refuse(
            updates > self.problems_per_step,
            "updates_per_step",
            f"got {updates}, more than problems_per_step = {self.problems_per_step}; a minibatch "
            "needs at least one group",
        )
        return self
