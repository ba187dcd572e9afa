"""The update, on real DeepSpeed ranks: the same whatever the split, the stage and the ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learner.batch import TrainBatch
from learner.collate import Collator
from learner.policy import load_policy
from learner.tiny import FAMILIES
from tests.support.rank_matrix import (
    CLIP,
    LOSS,
    OPTIONS,
    PART_OF,
    RATE,
    RATES,
    REFUSING,
    SAVED,
    Ranks,
)
from tests.support.ranks import Job, Outcome, run_ranks, setup
from tests.support.samples import mixed_batch

FROZEN = [f"{r}/options/{case}" for r, cases in OPTIONS.items() for case in cases if "froz" in case]
WHOLE = [f"2/options/{case}" for case in OPTIONS[2] if "frozen" not in case]
NAMES = {
    "internvl": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}


def checkpoint_name(family: str, name: str) -> str:
    """A module's parameter as the family's published checkpoints name it; most are the same."""
    for old, new in NAMES.get(family, {}).items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@pytest.fixture(scope="module")
def ranks(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"), tiny_models)


def outcomes(ranks: Ranks, family: str, every_term: bool = False) -> dict[str, Outcome]:
    return {
        name: outcome
        for name, outcome in ranks.outcomes.items()
        if f"/{family}/" in name and every_term == ("every term" in name)
    }


@pytest.mark.parametrize("every_term", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_model_however_split(
    ranks: Ranks, family: str, every_term: bool
) -> None:
    loss, gradients = ranks.reference(family, every_term)
    norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
    assert norm > 2 * CLIP
    found = outcomes(ranks, family, every_term)
    assert found
    for name, outcome in found.items():
        assert outcome.metrics[0]["loss"] == pytest.approx(loss, abs=2e-6), name
        assert outcome.gradients.keys() == gradients.keys()
        for parameter, expected in gradients.items():
            gap = (outcome.gradients[parameter].double() - expected).norm()
            assert gap < 2e-5 * norm, (name, parameter)


@pytest.mark.parametrize("every_term", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_do_not_depend_on_the_split(ranks: Ranks, family: str, every_term: bool) -> None:
    first, *others = outcomes(ranks, family, every_term).values()
    skip = ("seconds", "padding_share", "shared_share")
    for other in others:
        for update in range(2):
            a, b = first.metrics[update], other.metrics[update]
            assert a.keys() == b.keys()
            for name in a.keys() - set(skip):
                # The second update follows a sign-like first step of AdamW: rounding shows more.
                assert b[name] == pytest.approx(a[name], rel=2e-5 * 20**update, abs=2e-5), name
    tokens = {n: v for n, v in first.metrics[0].items() if n.startswith("tokens/")}
    assert sum(tokens.values()) == ranks.batches[family][0].response_tokens()


def test_an_update_sends_each_token_through_the_model_once(ranks: Ranks) -> None:
    """Once more for a second view; padded to the longest of like length. No seconds: counts."""
    batches = ranks.batches["qwen3_vl"]
    lengths = [[len(s) - 1 for s in batch.sequences] for batch in batches]
    prompt_twice = len(batches[0].sequences[0].prompt_ids)
    for case, expected in {
        "0": [sum(of) for of in lengths],
        "0 every term": [2 * sum(of) for of in lengths],
        "0 whole": [2 * lengths[0][3] + 3 * lengths[0][0], sum(lengths[1])],
        "0 whole shared_prefix": [sum(lengths[0]) - prompt_twice, sum(lengths[1])],
    }.items():
        assert ranks.outcomes[f"1/qwen3_vl/{case}"].forwarded == expected, case


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_norm_is_that_of_this_update_before_clipping(
    ranks: Ranks, family: str
) -> None:
    for name, outcome in outcomes(ranks, family).items():
        told = [m["grad_norm"] for m in outcome.metrics]
        assert told == pytest.approx(outcome.norms, rel=1e-4), name
        assert abs(told[0] - told[1]) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_is_adamw_on_the_clipped_gradient(ranks: Ranks, family: str) -> None:
    start = ranks.stored(ranks.paths[family])
    for name, outcome in outcomes(ranks, family).items():
        assert outcome.after_first.keys() == start.keys()
        scale = CLIP / outcome.norms[0]
        for parameter, gradient in outcome.gradients.items():
            moment = outcome.moments[parameter] / (1 - 0.9)
            assert (moment - gradient * scale).norm() < 1e-4 * CLIP, (name, parameter)
            at = checkpoint_name(family, parameter)
            expected = start[at] - RATE * moment / (moment.abs() + 1e-8)
            gap = (outcome.after_first[at] - expected).abs().max()
            assert gap < 2e-3 * RATE, (name, parameter)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_go_by_their_checkpoint_names_and_metadata_says_so_before(
    ranks: Ranks, family: str
) -> None:
    stored = ranks.stored(ranks.paths[family])
    for outcome in outcomes(ranks, family).values():
        assert outcome.weights.keys() == stored.keys()
        assert outcome.metadata == [
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in outcome.weights.items()
        ]
        assert all(outcome.weights[name].shape == stored[name].shape for name in stored)


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_folder_is_the_learner_that_wrote_it(ranks: Ranks, name: str) -> None:
    family = name.split("/")[1]
    folder, outcome = ranks.folder / name.replace("/", "-"), ranks.outcomes[name]
    stored = ranks.stored(folder)
    assert stored.keys() == ranks.stored(ranks.paths[family]).keys()
    assert all(torch.equal(stored[n], outcome.weights[n]) for n in stored)
    changed = [n for n in stored if not torch.equal(stored[n], outcome.after_first[n])]
    assert len(changed) > len(stored) / 2
    policy, processor = load_policy(str(folder))
    assert processor.chat_template == load_policy(str(ranks.paths[family]))[1].chat_template
    assert (folder / "chat_template.jinja").exists()
    with torch.no_grad():
        found, _ = policy.eval().run(
            Collator(policy, processor)(ranks.batches[family][0].sequences)
        )
    told = np.concatenate(outcome.logprobs)
    np.testing.assert_allclose(found.numpy(), told, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_computes_its_share_of_log_probs_and_all_come_back(
    ranks: Ranks, family: str
) -> None:
    sequences = ranks.batches[family][0].sequences
    tokens = sum(len(s.response_ids) for s in sequences)
    for name, outcome in outcomes(ranks, family).items():
        assert [len(found) for found in outcome.logprobs] == [
            len(s.response_ids) for s in sequences
        ]
        alone = name.startswith("1/")
        assert outcome.computed == tokens if alone else 0 < outcome.computed < tokens, name


@pytest.mark.parametrize("stage", REFUSING)
def test_an_update_that_is_not_finite_is_refused_whole(ranks: Ranks, stage: int) -> None:
    outcome = ranks.outcomes[f"refused {stage}"]
    gradient, loss = outcome.errors
    assert "gradient norm" in gradient and "not applied" in gradient
    assert "loss of micro-batch 0 is nan" in loss and "not applied" in loss
    stored = ranks.stored(ranks.paths["qwen3_vl"])
    assert all(torch.equal(stored[name], outcome.weights[name]) for name in stored)


def is_frozen(name: str) -> bool:
    return (
        PART_OF(name) == "vision"
        or ".layers.1." in name
        or name.endswith("layers.2.self_attn.q_proj.weight")
    )


def assert_alike(found: Outcome, expected: Outcome) -> None:
    assert len(found.metrics) == len(expected.metrics) == 2
    for update, (new, old) in enumerate(zip(found.metrics, expected.metrics, strict=True)):
        for name in ("loss", "grad_norm", "entropy/perception"):
            # AdamW's first steps are nearly signs: rounding shows more after each.
            assert new[name] == pytest.approx(old[name], rel=1e-4 * 5**update, abs=1e-5), name
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() < 1e-4 * expected.norms[0], name
    assert found.weights.keys() == expected.weights.keys()


@pytest.mark.parametrize("name", WHOLE)
def test_where_and_when_it_is_computed_changes_nothing(ranks: Ranks, name: str) -> None:
    assert_alike(ranks.outcomes[name], ranks.outcomes["1/qwen3_vl/0"])


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_have_no_gradient_no_state_and_are_not_sent(
    ranks: Ranks, name: str
) -> None:
    start = ranks.stored(ranks.paths["qwen3_vl"])
    found, whole = ranks.outcomes[name], ranks.outcomes["1/qwen3_vl/0"]
    trained = {n for n in start if not is_frozen(n)}
    assert trained < start.keys()
    assert found.gradients.keys() == trained
    for parameter in trained:
        gap = (found.gradients[parameter] - whole.gradients[parameter]).norm()
        assert gap < 1e-4 * whole.norms[0], parameter
    elements = sum(start[n].numel() for n in trained)
    size = int(name[0])
    assert elements / size <= found.state_elements <= elements / size + 1000 * len(trained)
    assert found.state_elements < 0.8 * sum(t.numel() for t in start.values()) / size
    # A layer with anything trained is sent whole, since samplers fuse q, k and v.
    sent = {n for n in start if n in trained or n.endswith("layers.2.self_attn.q_proj.weight")}
    without_layer = {n for n in start if PART_OF(n) == "vision" and ".blocks." not in n}
    assert sent <= found.weights.keys() <= sent | without_layer
    for parameter, tensor in found.weights.items():
        assert torch.equal(tensor, start[parameter]) == is_frozen(parameter), parameter
    assert [m[0] for m in found.metadata] == list(found.weights)


@pytest.mark.parametrize("name", FROZEN)
def test_rates_multiply_the_step_of_their_parameters(ranks: Ranks, name: str) -> None:
    start, found = ranks.stored(ranks.paths["qwen3_vl"]), ranks.outcomes[name]
    for parameter, moment in found.moments.items():
        moment = moment / (1 - 0.9)
        rate = RATE
        if PART_OF(parameter) == "merger":
            rate *= RATES["merger"]
        elif ".layers.3." in parameter:
            rate *= RATES["*.layers.3.*"]
        expected = start[parameter] - rate * moment / (moment.abs() + 1e-8)
        gap = (found.after_first[parameter] - expected).abs().max()
        assert gap < 5e-3 * rate, parameter
    assert_alike(found, ranks.outcomes["1/options/0 frozen"])


def test_norms_are_the_same_for_every_stage_split_and_number_of_ranks(ranks: Ranks) -> None:
    expected = ranks.outcomes["1/balanced/0 whole"].measured
    assert len(expected) == 4
    for name in ("2/balanced/2", "2/balanced/3"):
        for place, (a, b) in enumerate(zip(expected, ranks.outcomes[name].measured, strict=True)):
            # After the first, sign-like step of AdamW rounding shows more.
            rel = 2e-5 if place < 2 else 2e-3
            assert b.perception == pytest.approx(a.perception, rel=rel), (name, place)
            assert b.reasoning == pytest.approx(a.reasoning, rel=rel), (name, place)
            assert b.cosine == pytest.approx(a.cosine, abs=5 * rel), (name, place)


def test_measuring_changes_no_update(ranks: Ranks) -> None:
    measured = ranks.outcomes["1/balanced/0 whole"]
    plain = ranks.outcomes["1/balanced/0 whole plain"]
    assert plain.measured == []
    assert measured.weights.keys() == plain.weights.keys()
    assert all(torch.equal(measured.weights[n], plain.weights[n]) for n in plain.weights)
    names = measured.metrics[0].keys() - {"seconds"}
    for a, b in zip(measured.metrics, plain.metrics, strict=True):
        assert [a[n] for n in names] == [b[n] for n in names]


def test_the_whole_gradient_is_the_weighted_sum_of_the_parts(ranks: Ranks) -> None:
    for name, outcome in outcomes(ranks, "balanced").items():
        for update, told in enumerate(outcome.measured[::2]):
            p, r = 0.3 * told.perception, 0.7 * told.reasoning
            whole = (p * p + r * r + 2 * p * r * told.cosine) ** 0.5
            assert outcome.metrics[update]["grad_norm"] == pytest.approx(whole, rel=1e-4), name


@pytest.fixture(scope="module")
def low_precision(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Outcome]]:
    """(where they start, what the mixed one saved, outcomes by job)."""
    path, folder = str(tiny_models["internvl"]), tmp_path_factory.mktemp("low")
    _, processor = load_policy(path)
    one = mixed_batch(processor).sequences[0]
    jobs = {
        f"{stage} {count}": Job(
            setup(path, "bfloat16", zero_stage=stage, micro_batch_tokens=1),
            ((TrainBatch((one,) * count), LOSS),),
            RATE,
        )
        for stage in (2, 3)
        for count in (1, 8)
    }
    saved = folder / "mixed"
    mixed = setup(path, "mixed", zero_stage=0, freeze=("language",))
    jobs["mixed"] = Job(mixed, ((TrainBatch((one,)), LOSS),), RATE, save=str(saved))
    return Path(path), saved, run_ranks(1, jobs, folder, 300)


def test_a_mixed_learner_keeps_float32_and_sends_bfloat16(
    low_precision: tuple[Path, Path, dict[str, Outcome]],
) -> None:
    start, saved, outcomes = low_precision
    found = outcomes["mixed"]
    old, new = (load_file(folder / "model.safetensors") for folder in (start, saved))
    assert old.keys() == new.keys() and {t.dtype for t in new.values()} == {torch.float32}
    moved = [name for name, weight in new.items() if not torch.equal(old[name], weight)]
    assert len(moved) > 0.8 * len(found.weights)
    assert not [name for name in moved if "language_model" in name or "lm_head" in name]
    assert found.weights.keys() >= set(moved)
    for name, sent in found.weights.items():
        assert sent.dtype == torch.bfloat16 and torch.equal(sent, new[name].bfloat16()), name


def test_bfloat16_gradients_of_many_micro_batches_add_up_in_float32(
    low_precision: tuple[Path, Path, dict[str, Outcome]],
) -> None:
    """8 equal parts of a mean add up to any of them, if nothing is rounded on the way."""
    _, _, found = low_precision
    for stage in (2, 3):
        whole, parts = (found[f"{stage} {count}"].gradients for count in (1, 8))
        for name, gradient in whole.items():
            gap = float((parts[name] - gradient).norm())
            assert gap <= 1e-5 * float(gradient.norm()), (stage, name)
