"""Whole runs of every loop over parts that pretend: what each leaves, and where it goes on.

The parts answer at once; the records, the groups' way and the loops are real. So every name that
a loop logs is held to the table of metrics here, too.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.recipe.problems import open_sources
from cluster.recipe.recipe import Recipe
from cluster.record.stored import read_metrics, read_scored, stored_steps
from cluster.report.diagnose import load_scores, task_reports
from cluster.report.run_report import build, read_run
from cluster.run.checkpoints import Position, Resumed
from cluster.run.evaluate import evaluate_all
from cluster.run.replay import recorded, run_replay, run_sampling
from cluster.run.runtime import sampler_metrics
from cluster.run.sft import run_sft
from cluster.run.train import run_training, train_batches
from learner.balance import SegmentGradients
from learner.batch import TrainBatch
from rewards.compose import Composition, compose_groups
from rewards.scored import ScoredGroup
from rewards.settings import OnFailure
from rewards.terms import Outcome, Perception
from rollout.record import Group, SampleRequest
from rollout.transfer import TransferReport
from tests.support.recipes import TOY, UNLABELLED, made_recipe
from tests.support.toys import graded, group, score

SEGMENTS = ("perception", "reasoning", "answer", "other")


class Learner:
    """Its loss is the number of its update; what it saves is remembered."""

    def __init__(self) -> None:
        self.updates, self.rates, self.states = 0, [], []  # type: ignore[var-annotated]
        self.stop_in = 0

    def update(self, batch: TrainBatch, loss: Any, rate: float) -> dict[str, float]:
        self.updates += 1
        self.rates.append(rate)
        if self.updates == self.stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        told = {f"{name}/{s}": 1.0 for name in ("tokens", "nll", "entropy") for s in SEGMENTS}
        return told | {"loss": float(self.updates), "seconds": 0.0}

    def logprobs(self, batch: TrainBatch) -> list[np.ndarray]:
        return [s.sampler_logprobs for s in batch.sequences]

    def segment_gradients(self, batch: TrainBatch, of: str) -> SegmentGradients:
        return SegmentGradients(1.0, 1.0, 0.0)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text(str(self.updates))

    def save_training(self, folder: Path, state: dict[str, Any], *_: Any) -> None:
        self.states.append(state)

    def finish_saving(self) -> None: ...


class Samplers:
    """Answers at once: of a group one response in two is right, under the weights sent last."""

    def __init__(self) -> None:
        self.version, self.asked = 0, []  # type: ignore[var-annotated]
        self._done: list[Group] = []

    def sample(self, requests: Sequence[SampleRequest]) -> list[Group]:
        self.asked += [r.group_id for r in requests]
        return [self._answer(r) for r in requests]

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        self._done += self.sample(requests)

    def collect(self, count: int, timeout: float | None = None) -> list[Group]:
        taken, self._done = self._done[:count], self._done[count:]
        return taken

    def abort(self, group_ids: Any) -> None: ...

    def pending(self) -> int:
        return len(self._done)

    def behind(self) -> list[str]:
        return []

    def counts(self) -> dict[str, float]:
        return {"asked": 1.0, "count": 1.0, "idle_seconds/sampler-0": 0.0}

    def weight_checksums(self) -> dict[str, dict[str, str]]:
        return {"sampler-0": {"w": "same"}}

    def _answer(self, request: SampleRequest) -> Group:
        n = request.problem.truth["n"]
        texts = [f"{n};{2 * n + i % 2};" for i in range(request.n)]
        rollouts = [
            replace(r, group_id=request.group_id, versions=np.full_like(r.versions, self.version))
            for r in group(n, *texts).rollouts
        ]
        return Group(request.group_id, request.problem, tuple(rollouts))


LEAVE: dict[str, OnFailure] = {"perception": "zero"}


class Parts:
    """What `running`, `sampling_and_scoring`, `learning`, `tuning` and `session` give a loop."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.sources = recipe, open_sources(recipe.tasks)
        self.samplers, self.learner = Samplers(), Learner()
        self.parts = SimpleNamespace(first_held={})
        self.scoring = SimpleNamespace(score=self.score)

    def score(
        self, groups: Sequence[Group], share: float
    ) -> tuple[list[ScoredGroup], dict[str, float]]:
        found = [score(g, Outcome(), Perception()) for g in groups]
        weights = {"outcome": 1.0, "perception": 0.0}
        composed = compose_groups(groups, found, Composition(weights, on_failure=LEAVE))
        return composed, {"reward/worker_restarts": 0.0, "reward/judge/calls/requests": 1.0}

    def send_weights(self, version: int) -> TransferReport:
        self.samplers.version = version
        return TransferReport(0.0, 1, 1, 1)

    renew_weights = send_weights

    def settle_weights(self) -> None: ...

    def news(self) -> list[str]:
        return []

    def counts(self) -> dict[str, float]:
        return sampler_metrics(self.samplers, {"m": self.samplers})  # type: ignore[arg-type, dict-item]

    def evaluate(self) -> dict[str, Any]:
        return evaluate_all(self.samplers, self.sources, self.recipe)  # type: ignore[arg-type]


RECIPE = (
    *("algorithm.group_size=4", "algorithm.problems_per_step=3", "algorithm.steps=5"),
    *("algorithm.updates_per_step=2", "eval.problems=2", "eval.every=2", "checkpoint.every=2"),
    'eval.passes=["greedy", "sampled", "oracle", "oracle_blank", "blind"]',
)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the parts of a recipe's next loop."""

    def make(recipe: Recipe) -> Parts:
        made = Parts(recipe)

        def gives(value: Any) -> Any:
            @contextmanager
            def context(*_: Any, **__: Any) -> Iterator[Any]:
                yield value

            return context

        @contextmanager
        def session(asked: Recipe, *_: Any) -> Iterator[Any]:
            yield SimpleNamespace(recipe=asked, sources=made.sources, processor=None)

        for command in ("replay", "sft"):
            monkeypatch.setattr(f"cluster.run.{command}.session", session)
        for name, value in {
            "train.running": made,
            "replay.learning": made.learner,
            "replay.sampling_and_scoring": (made.samplers, made.scoring),
            "sft.tuning": (made.learner, made if recipe.eval.every else None),
        }.items():
            monkeypatch.setattr(f"cluster.run.{name}", gives(value))
        return made

    return make


def logged(run: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in read_metrics(run).to_pylist():
        found.setdefault(row["name"], {})[row["step"]] = row["value"]
    return found


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_that_was_stopped_goes_on_and_is_replayed_as_if_it_had_not_been(
    tmp_path: Path, parts: Any, staleness: int
) -> None:
    recipe = made_recipe(*RECIPE, f"algorithm.max_staleness={staleness}", tasks=TOY)
    whole = parts(recipe)
    run_training(recipe, output=tmp_path / "whole")
    expected = logged(tmp_path / "whole")
    assert set(expected["eval/tests.support.toys:Doubling/a_r"]) == {0, 2, 4, 5}
    assert expected["policy/version"] == {step: 2.0 * step for step in range(1, 6)}
    assert set(expected["policy/lag_max"].values()) == ({0.0} if not staleness else {0.0, 2.0})
    assert [s["step"] for s in whole.learner.states] == [2, 4, 5]
    assert (tmp_path / "whole" / "checkpoint" / "weights").read_text() == "10"

    first = parts(recipe)
    first.learner.stop_in = 5
    run_training(recipe, output=tmp_path / "run")
    (_, state) = first.learner.states
    assert state["step"] == 3 and not (tmp_path / "run" / "evaluation.json").exists()
    second = parts(recipe)
    second.learner.updates = 6
    at = Position.from_dict(state)
    run_training(recipe, resumed=Resumed(tmp_path / "run", tmp_path, at))
    found = logged(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name in ("learner/loss", "response/tokens", "spent/tokens", "policy/version"):
        assert found[name] == expected[name]
    own = [name for name in first.samplers.asked + second.samplers.asked if "eval" not in name]
    assert {n for n in whole.samplers.asked if "eval" not in n} == set(own)
    assert stored_steps(tmp_path / "run") == [1, 2, 3, 4, 5]

    again = parts(recipe)
    _, source = recorded(tmp_path / "whole")
    run_replay(recipe, source, output=tmp_path / "replay")
    told = logged(tmp_path / "replay")
    assert told["learner/loss"] == expected["learner/loss"]
    assert again.learner.rates == whole.learner.rates
    assert (tmp_path / "replay" / "checkpoint" / "weights").read_text() == "10"


def test_sampling_asks_what_training_would(tmp_path: Path, parts: Any) -> None:
    recipe = made_recipe(*RECIPE, tasks=TOY)
    made = parts(recipe)
    run_sampling(recipe, 2, output=tmp_path / "sampled")
    sampled = made.samplers.asked
    made = parts(recipe)
    run_training(recipe, output=tmp_path / "run")
    assert sampled == [n for n in made.samplers.asked if n.startswith(("step-1/", "step-2/"))]
    assert stored_steps(tmp_path / "sampled") == [1, 2]
    one, two = (read_scored(tmp_path / name, 1) for name in ("sampled", "run"))
    assert [g.totals.tolist() for g in one] == [g.totals.tolist() for g in two]


def test_a_task_without_labels_beside_one_with_them(tmp_path: Path, parts: Any) -> None:
    recipe = made_recipe(
        *RECIPE[:-1], "algorithm.problems_per_step=8", tasks=f"{TOY}, {UNLABELLED}"
    )
    made = parts(recipe)
    run_training(recipe, output=tmp_path / "run")
    known, bare = (f"tests.support.toys:{name}" for name in ("Doubling", "Unlabelled"))
    oracle = [name for name in made.samplers.asked if name.startswith("eval/oracle/")]
    assert oracle and not [name for name in oracle if name.startswith("eval/oracle/u-")]
    found = logged(tmp_path / "run")
    assert set(found[f"eval/{known}/a_r"]) == set(found[f"eval/{bare}/a"]) == {0, 2, 4, 5}
    evaluated = {name.removeprefix(f"eval/{bare}/") for name in found if f"eval/{bare}/" in name}
    assert evaluated == {"a"}
    assert set(found["acc/labelled"]) and set(found["acc/a"]) == {1, 2, 3, 4, 5}
    assert set(found["acc/a_p"].values()) == {1.0}  # of those that have one, all are right

    tables = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    sizes = {row["metric"]: row["n"] for row in tables["all tasks"]["after"]["rows"]}
    assert (sizes["a"], sizes["a_p"], sizes["a_r"]) == (4, 2, 2)
    assert {row["metric"] for row in tables[bare]["change"]["rows"]} == {"a"}
    record = read_run(tmp_path / "run")
    of_bare = [view for view in record.shown.rollouts if view["task"] == bare]
    assert of_bare and all(view["saw"] is view["leak"] is None for view in of_bare)
    said = [line for line in build(record).warnings if "perception label" in line]
    assert len(said) == 1 and "of the rollouts are of problems with a perception label" in said[0]
    assert {r.task: r.phases[0].a_p for r in task_reports(load_scores(tmp_path / "run"))} == {
        known: 1.0,
        bare: None,
    }


@pytest.mark.parametrize("every", [0, 4])
def test_fine_tuning_that_was_stopped_goes_on(
    tmp_path: Path, parts: Any, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    recipe = made_recipe(
        *RECIPE,
        f"eval.every={every}",
        'sft={steps = 8, balance = "ngdiff", norm_every = 2}',
        tasks=TOY,
    )
    (batch,) = train_batches(recipe.algorithm, [graded([True, False], "a")])
    begun: list[int] = []

    def demonstrations(*_: Any) -> Iterator[Any]:
        begun.append(_[-1])
        while True:
            yield batch.sequences

    monkeypatch.setattr("cluster.run.sft.demonstrations", demonstrations)
    monkeypatch.setattr("cluster.run.sft.measure_checkpoint", lambda *_: {})
    first = parts(recipe)
    first.learner.stop_in = 5
    run_sft(recipe, output=tmp_path / "run")
    state = first.learner.states[-1]
    assert (state["step"], state["command"]) == (5, "sft")
    parts(recipe)
    at = Position.from_dict(state)
    (tmp_path / "run" / "checkpoint").mkdir(exist_ok=True)
    run_sft(recipe, resumed=Resumed(tmp_path / "run", tmp_path, at))
    assert begun == [0, 5]
    found = logged(tmp_path / "run")
    assert list(found["sft/nll/perception"]) == list(range(1, 9))
    assert (tmp_path / "run" / "checkpoint" / "README.md").exists()
    evaluated = found.get("eval/tests.support.toys:Doubling/a", {})
    assert list(evaluated) == ([0, 4, 8] if every else [])
    assert (tmp_path / "run" / "evaluation.json").exists() == bool(every)
