"""Options of the engine that change where and what it computes, on real DeepSpeed ranks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.batch import TrainBatch
from learner.engine import DeepSpeedLearner
from learner.families import FAMILIES
from learner.policy import load_policy
from learner.policy_loss import PolicyLoss
from learner.trainer import LearnerSettings, Trainer, WorldPlace
from rollout.tokens import ModelError
from tests.support.ranks import Job, Outcome, run_ranks
from tests.support.samples import mixed_batch

RATE = 1e-3
part_of = FAMILIES["qwen3_vl"].part_of
LOSS = PolicyLoss(entropy_weight=0.01)
FREEZE = ("vision", "*.layers.1.*", "*.layers.2.self_attn.q_proj.weight")
RATES = {"merger": 0.25, "*.layers.3.*": 3.0}
JOBS = {
    1: ("0", "0 frozen"),
    2: (
        "1 offload optimizer",
        "2 frozen offload optimizer",
        "3 offload all recompute",
        "3 frozen recompute",
    ),
}
FROZEN = [f"{ranks}/{case}" for ranks, cases in JOBS.items() for case in cases if "frozen" in case]
WHOLE = [f"{r}/{case}" for r, cases in JOBS.items() for case in cases if "frozen" not in case]


def settings(model: str, case: str) -> LearnerSettings:
    frozen = "frozen" in case
    return LearnerSettings(
        model=model,
        zero_stage=int(case[0]),
        micro_batch_tokens=600,
        freeze=FREEZE if frozen else (),
        rates=RATES if frozen else {},
        activation_checkpointing="recompute" in case,
        offload="optimizer" if "optimizer" in case else "all" if "all" in case else "none",
    )


@pytest.fixture(scope="module")
def start(tiny_models: dict[str, Path]) -> dict[str, torch.Tensor]:
    return load_file(tiny_models["qwen3_vl"] / "model.safetensors")


@pytest.fixture(scope="module")
def outcomes(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """By `<ranks>/<case>`: three updates each."""
    model = str(tiny_models["qwen3_vl"])
    mixed = mixed_batch(load_policy(model)[1])
    # In the second update one rank sees an image while the other reads blind.
    batches = (mixed, TrainBatch(mixed.sequences[1:3]), mixed)
    found = {}
    for ranks, cases in JOBS.items():
        jobs = {
            f"{ranks}/{case}": Job(settings(model, case), tuple((b, LOSS) for b in batches), RATE)
            for case in cases
        }
        found |= run_ranks(ranks, jobs, tmp_path_factory.mktemp(f"ranks-{ranks}"), seconds=600)
    return found


def is_frozen(name: str) -> bool:
    return (
        part_of(name) == "vision"
        or ".layers.1." in name
        or name.endswith("layers.2.self_attn.q_proj.weight")
    )


def assert_alike(found: Outcome, expected: Outcome) -> None:
    assert len(found.metrics) == len(expected.metrics) == 3
    for update, (new, old) in enumerate(zip(found.metrics, expected.metrics, strict=True)):
        for name in ("loss", "grad_norm", "entropy/perception"):
            # AdamW's first steps are nearly signs: rounding shows more after each.
            assert new[name] == pytest.approx(old[name], rel=1e-4 * 5**update, abs=1e-5), name
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() < 1e-4 * expected.norms[0], name
    assert found.weights.keys() == expected.weights.keys()


@pytest.mark.parametrize("name", WHOLE[1:])
def test_where_and_when_it_is_computed_changes_nothing(
    outcomes: dict[str, Outcome], name: str
) -> None:
    assert_alike(outcomes[name], outcomes["1/0"])


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_have_no_gradient_no_state_and_are_not_sent(
    outcomes: dict[str, Outcome], start: dict[str, torch.Tensor], name: str
) -> None:
    found, whole = outcomes[name], outcomes["1/0"]
    trained = {n for n in start if not is_frozen(n)}
    assert trained < start.keys()
    assert found.gradients.keys() == trained
    for parameter in trained:
        gap = (found.gradients[parameter] - whole.gradients[parameter]).norm()
        assert gap < 1e-4 * whole.norms[0], parameter
    elements = sum(start[n].numel() for n in trained)
    ranks = int(name[0])
    assert elements / ranks <= found.state_elements <= elements / ranks + 1000 * len(trained)
    assert found.state_elements < 0.8 * sum(t.numel() for t in start.values()) / ranks
    # A layer with anything trained is sent whole, since samplers fuse q, k and v.
    sent = {n for n in start if n in trained or n.endswith("layers.2.self_attn.q_proj.weight")}
    without_layer = {n for n in start if part_of(n) == "vision" and ".blocks." not in n}
    assert sent <= found.weights.keys() <= sent | without_layer
    for parameter, tensor in found.weights.items():
        assert torch.equal(tensor, start[parameter]) == is_frozen(parameter), parameter
    assert [m[0] for m in found.metadata] == list(found.weights)


@pytest.mark.parametrize("name", FROZEN)
def test_rates_multiply_the_step_of_their_parameters(
    outcomes: dict[str, Outcome], start: dict[str, torch.Tensor], name: str
) -> None:
    found = outcomes[name]
    for parameter, moment in found.moments.items():
        moment = moment / (1 - 0.9)
        rate = RATE
        if part_of(parameter) == "merger":
            rate *= RATES["merger"]
        elif ".layers.3." in parameter:
            rate *= RATES["*.layers.3.*"]
        expected = start[parameter] - rate * moment / (moment.abs() + 1e-8)
        gap = (found.after_first[parameter] - expected).abs().max()
        assert gap < 5e-3 * rate, parameter
    assert_alike(found, outcomes["1/0 frozen"])


def test_an_offload_that_the_stage_has_no_place_for_is_refused(
    tiny_models: dict[str, Path],
) -> None:
    for stage, offload in ((0, "optimizer"), (2, "all")):
        chosen = LearnerSettings(
            model=str(tiny_models["qwen3_vl"]), zero_stage=stage, offload=offload
        )
        with pytest.raises(ModelError, match=rf'learner\.offload: "{offload}" needs'):
            DeepSpeedLearner(chosen, WorldPlace())


def test_the_actor_asks_nothing_of_the_engine_that_a_trainer_has_not() -> None:
    trainer: type[Trainer] = DeepSpeedLearner  # what mypy checks
    source = Path("learner/actor.py").read_text()
    asked = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._trainer"
    }
    offered = {name for name in vars(Trainer) if not name.startswith("_")}
    assert asked and asked <= offered
    assert all(callable(getattr(trainer, name)) for name in offered)
