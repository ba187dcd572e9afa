"""Recipe sections of the run itself: [placement], [watch], [eval], [output] and [job]."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from rewards.settings import Place
from tasks.fields import Amount, Count, PathText, Positive, Section, Text, refusal
from tasks.files import expanded

_Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$")]
Labels = dict[_Label, _Label]
"""Name and value, as Ray takes them; not the operators that it takes in place of a value."""


class PlacementConfig(Section):
    """[placement] Who shares GPUs with whom, and on which nodes of a cluster (`--address`) a run's
    actors are: those with all of these labels. `ray start --labels=role=sampler` gives a node what
    `{ role = "sampler" }` asks.
    """

    mode: Literal["disaggregated", "colocated"] = "disaggregated"
    """`colocated`: samplers and learner take turns. While one works the other's memory is in main
    memory, so that each has nearly all of a GPU (docs/step.md); on-policy only, a sampler on the
    GPU of each learner rank. On CPUs they take turns and free nothing. `disaggregated`: each has
    its GPUs, or its part of one, all the time."""
    learner: Labels = Field(default_factory=dict)
    """Nodes that the learner's ranks may be on; {}: any. All are on one where one has room for
    them, which is the driver's if it has, else on few."""
    samplers: Labels = Field(default_factory=dict)
    """Nodes that the engines may be on, those of frozen models too. An engine never straddles
    nodes, however many GPUs it has."""
    reward_workers: Labels = Field(default_factory=dict)
    """Nodes that reward workers may be on; they are spread over those of these that have no GPU,
    or over all where each has one."""
    spread_samplers: bool = False
    """Rather an engine a node than a node full of them."""
    wait_seconds: Amount = 120.0
    """How long a run waits for nodes that are not there yet, or full, before it is refused."""

    @property
    def by_turns(self) -> bool:
        """Whether samplers and learner work by turns."""
        return self.mode == "colocated"


class WatchConfig(Section):
    """[watch] What is done about a run that does not get on: none of its actors answers."""

    stall_seconds: Amount = 1800.0
    """After so long the stacks of the driver and of all actors are written to the run's folder,
    below `stacks/`; longer than the longest single call takes, an update of the learner say.
    0: never."""
    on_stall: Literal["warn", "stop"] = "warn"
    """`warn`: it is also said, and the deadlines of what is waited for decide. `stop`: the run
    fails, and goes on from its last checkpoint under `checkpoint.restarts`."""


EvalPass = Literal[
    "greedy",
    "sampled",
    "oracle",
    "oracle_blank",
    "blind",
    "greedy_alone",
    "oracle_tool",
    "returns_blank",
    "returns_other",
    "returns_elsewhere",
]
"""`greedy` and `sampled` are free rollouts; the others are greedy. `oracle_blank`: `p*` forced
and the image blanked; `blind`: prompt text only. Those below need [environment]."""
TOOL_PASSES: tuple[EvalPass, ...] = get_args(EvalPass)[5:]


class EvalSampling(Section):
    """[eval.sampling] How tokens are drawn in an evaluation; what is left out is as in training."""

    temperature: Amount | None = None
    """Of the pass `sampled`; the others are greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the pass `sampled`: only the likeliest tokens that together have this probability."""
    top_k: Count = 0
    """Of the pass `sampled`: only so many of the likeliest tokens; 0: all."""
    max_tokens: Positive | None = None
    """Of a response in any pass; not above `sampler.max_tokens`, which problems were measured
    for."""


class EvalConfig(Section):
    """[eval] The held-out measurement before, after and, if `every` > 0, between steps."""

    problems: Positive = 512
    """Held-out problems of each `[[tasks]]` entry; all of an entry whose data holds fewer rows."""
    seed: Count = 1234567
    """Of these problems."""
    samples: Positive = 1
    """Sampled responses a problem, for avg@k and pass@k."""
    sampling: EvalSampling = EvalSampling()
    """How tokens are drawn."""
    every: Count = 0
    """Steps between measurements; 0: only before and after."""
    passes: (
        Annotated[
            tuple[EvalPass, ...],
            Field(strict=False, min_length=1),
        ]
        | None
    ) = None
    """`greedy` gives a and a_p, `oracle` a_r; `equipoise eval` always runs them all. Without it
    `greedy`, `oracle` of problems with a perception label, and beside [environment] `greedy_alone`.
    What compares with [environment] (docs/diagnosis.md): `greedy_alone` is `greedy` without it,
    `oracle_tool` is `oracle` with it; `returns_blank`, `returns_other` and `returns_elsewhere` show
    other pictures than it returns."""

    text: bool = False
    """Measure what the policy keeps of language too: `text_loss`, on ten passages written for this
    purpose, and `text_right`, the share of 40 questions without a picture whose right answer is the
    likeliest of four (docs/pretrained.md)."""
    reader: Annotated[str, AfterValidator(expanded)] = ""
    """Checkpoint of a frozen text-only reader that is asked the questions again, with the policy's
    own perceptions (of the pass `greedy`) in place of the images: `sufficiency`, `used` and the
    reader's floor and ceiling (docs/diagnosis.md). It has an engine of its own. "": none."""
    reader_place: Place = "prompt"
    """Where it finds a perception: `prompt`, before the question, for any instructed model; or
    `prefix`, as the start of its own response, for a checkpoint of the policy."""

    @model_validator(mode="after")
    def _reader_reads_something(self) -> EvalConfig:
        if self.reader and "greedy" not in self.pass_names:
            raise refusal('it reads what the pass "greedy" wrote; add it to passes', "reader")
        return self

    @property
    def pass_names(self) -> tuple[EvalPass, ...]:
        """The passes, by default too; what forces `p*` is asked of problems with a label only."""
        return self.passes or ("greedy", "oracle")


class OutputConfig(Section):
    """[output] Where runs are written, `folder/<name>-...`, and which rollouts stay there."""

    folder: PathText = "runs"
    """Where the folder of a new run is made."""
    rollouts_every: Count = 1
    """Steps between those whose rollouts are stored; 0: none. Step 1's always are."""
    rollouts_keep: Count = 0
    """Of the stored steps but the first, the last so many stay, with their images; 0: all."""
    rollout_tokens: bool = True
    """With the token arrays (ids, log-probs, versions, segments), which `train --replay` and
    `diagnose --rescore` need."""
    mirror: Text | Literal[""] = ""
    """URI of a folder (`s3://bucket/runs`, `gs://…`, `file:///…`) below which the run's folder is
    copied after each step, by a thread; `--resume URI/NAME` goes on from there on any machine
    (docs/runs.md). What `fsspec` reads: `pip install "equipoise[s3]"` for S3. "": none."""
    trackers: Annotated[
        tuple[Literal["wandb", "mlflow", "swanlab", "trackio", "ray"], ...], Field(strict=False)
    ] = ()
    """Where the numbers of docs/metrics.md go beside the run folder and its TensorBoard. `ray`: the
    metrics agents of the Ray cluster, for Prometheus and deploy/grafana.json. The others are
    optional extras: `pip install "equipoise[wandb]"`. Nothing else leaves."""
    project: Text = "equipoise"
    """What the trackers file the run under."""
    tracked_rollouts: Count = 0
    """How many rollouts of each stored step the trackers get too: task, prompt, response, reward
    and terms, as text."""


KEYS = {"key", "keys", "apikey", "token", "tokens", "secret", "secrets", "password", "passwd",
        "credential", "credentials"}  # fmt: skip
KEYS_STAY = (
    "has the name of a key, and Ray keeps what goes along in the job's record and its logs; set it "
    "in the environment of the cluster's nodes"
)


def is_key(name: str) -> bool:
    """Whether a variable's name says that it holds a key: `HF_TOKEN`, `OPENAI_API_KEY`."""
    return not KEYS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


class JobConfig(Section):
    """[job] Of `equipoise submit` only: what a job of a Ray cluster takes along."""

    include: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Files and folders, relative to the working folder, that travel beside what does by itself."""
    travel_mib: Positive = 64
    """How much may travel."""
    env: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Names of environment variables whose values go along; no others do. No keys: Ray keeps the
    values in the job's record and its logs."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray's runtime environment: `pip`, `conda`, `image_uri`, `env_vars`, ..., as Ray documents."""
    python: Text = "python"
    """The Python of the head that has what we need."""
    stop_seconds: Positive = 600
    """What `equipoise stop` gives a run to end its step and write a checkpoint."""

    @field_validator("env")
    @classmethod
    def _no_keys(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for i, name in enumerate(names):
            if is_key(name):
                raise refusal(f"{name} {KEYS_STAY}", i)
        return names

    @field_validator("runtime_env")
    @classmethod
    def _files_are_chosen(cls, environment: dict[str, Any]) -> dict[str, Any]:
        for key in ("working_dir", "py_modules", "excludes"):
            if key in environment:
                raise refusal("is made of what travels; name files in job.include", key)
        variables = environment.get("env_vars", {})
        if not isinstance(variables, dict) or not all(
            isinstance(value, str) for value in variables.values()
        ):
            raise refusal('expected a table of text, { NAME = "value" }', "env_vars")
        for name in variables:
            if is_key(name):
                raise refusal(KEYS_STAY, "env_vars", name)
        return environment
