"""The update, on real DeepSpeed ranks: the same whatever the split, the stage and the ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from learner.batch import Layout, TrainBatch, TrainSequence
from learner.collate import Collator
from learner.families import FAMILIES as FAMILY
from learner.loss_settings import EntropyWeights, LossConfig, PapoConfig
from learner.losses import BalancedLoss
from learner.policy import load_policy
from learner.policy_loss import PolicyLoss
from learner.tiny import FAMILIES
from learner.weights import in_buckets, layer_groups
from tasks.images import mask_patches
from tests.support.plain import plain_logprobs
from tests.support.ranks import Job, Outcome, run_ranks, setup
from tests.support.samples import CliffLoss, mixed_batch

RATE = 1e-3
PART_OF = FAMILY["qwen3_vl"].part_of
CLIP = 0.5
LOSS = PolicyLoss(LossConfig(entropy_weight=0.01))
EVERY_TERM = PolicyLoss(
    LossConfig(
        loss="gspo",
        clip_low=0.05,
        clip_high=0.08,
        kl_weight=0.1,
        kl_estimator="k2",
        reference_kl_weight=0.2,
        entropy_weights=EntropyWeights(perception=0.5, reasoning=0.2),
        papo=PapoConfig(weight=0.5, entropy_weight=0.3, patch_size=8, share=0.6),
    )
)
# One family with M-RoPE and one without go through every setting, the others through both ends.
TWO = {
    "qwen3_vl": (
        "0",
        "1",
        "2",
        "3",
        "2 whole",
        "3 every term in turns",
        "2 whole every term",
        "3 whole packed",
        "3 whole shared_prefix every term",
    ),
    "internvl": ("0", "3", "3 packed"),
    "qwen2_5_vl": ("3", "3 whole every term"),
    "idefics3": ("3", "3 whole every term"),
}
ONE = {
    "qwen3_vl": ("0", "0 whole", "0 every term", "0 whole shared_prefix"),
    "internvl": ("0 whole", "0 every term"),
    "qwen2_5_vl": ("0 whole", "0 every term"),
    "idefics3": ("0 whole", "0 every term"),
}
OPTIONS = {
    1: ("0 frozen", "2 frozen by turns"),
    2: (
        "1 offload optimizer",
        "2 frozen offload optimizer",
        "3 offload all recompute",
        "3 frozen recompute",
        "2 by turns",
        "3 offload optimizer by turns",
    ),
}
"""Of the engine, which change where and what it computes."""
FREEZE = ("vision", "*.layers.1.*", "*.layers.2.self_attn.q_proj.weight")
RATES = {"merger": 0.25, "*.layers.3.*": 3.0}
FROZEN = [f"{r}/options/{case}" for r, cases in OPTIONS.items() for case in cases if "froz" in case]
WHOLE = [f"2/options/{case}" for case in OPTIONS[2] if "frozen" not in case]
BALANCED = {1: ("0 whole", "0 whole plain"), 2: ("2", "3")}
"""Measured before each update, but for `plain`."""
REFUSING = (0, 2, 3)
SAVED = ("2/qwen3_vl/3", "1/qwen3_vl/0", "2/internvl/3", "1/internvl/0 whole")
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


class Ranks:
    """Outcomes by `<ranks>/<family>/<stage and split>`, and what they started from."""

    def __init__(self, folder: Path, tiny_models: dict[str, Path]) -> None:
        self.folder, self.paths, self.bases = folder, {}, tiny_models
        self.batches: dict[str, tuple[TrainBatch, ...]] = {}
        for family in FAMILIES:
            policy, processor = load_policy(str(tiny_models[family]))
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            self.paths[family] = folder / family
            policy.model.save_pretrained(self.paths[family])  # type: ignore[operator]
            processor.save_pretrained(self.paths[family])
            mixed = mixed_batch(processor)
            # In the second update one rank sees an image while the other reads blind.
            self.batches[family] = (mixed, TrainBatch(mixed.sequences[1:3]))
        self.outcomes: dict[str, Outcome] = {}
        for ranks, chosen in ((2, TWO), (1, ONE)):
            groups = {**chosen, "options": OPTIONS[ranks], "balanced": BALANCED[ranks]}
            jobs = {
                f"{ranks}/{group}/{case}": self.job(f"{ranks}/{group}/{case}")
                for group, cases in groups.items()
                for case in cases
            }
            if ranks == 1:
                jobs |= {f"refused {stage}": self.refused(stage) for stage in REFUSING}
            out = folder / f"ranks-{ranks}"
            out.mkdir()
            self.outcomes |= run_ranks(ranks, jobs, out, seconds=900)

    def job(self, name: str) -> Job:
        _, group, case = name.split("/")
        family = group if group in FAMILIES else "qwen3_vl"
        frozen = "frozen" in case
        chosen = setup(
            str(self.bases[family]),
            zero_stage=int(case[0]),
            micro_batch_tokens=10_000 if "whole" in case else 600 if group == "options" else 1,
            max_grad_norm=CLIP,
            layout=next((x for x in get_args(Layout) if x in case), "padded"),
            # A few tokens a turn: their logits are made again in the backward pass.
            logits_mib=0.01 if "turns" in case else 256.0,
            freeze=FREEZE if frozen else (),
            rates=RATES if frozen else {},
            activation_checkpointing="recompute" in case,
            offload="optimizer" if "optimizer" in case else "all" if "all" in case else "none",
        )
        # Training starts elsewhere than at the reference.
        every_term = "every term" in case
        chosen = replace(chosen, folder=str(self.paths[family]), reference=every_term)
        batches = self.batches[family]
        if group == "balanced":
            updates = tuple((batch, BalancedLoss(0.3)) for batch in reversed(batches))
            return Job(chosen, updates, RATE, measure=() if "plain" in case else ("all", "head"))
        save = str(self.folder / name.replace("/", "-")) if name in SAVED else None
        loss = EVERY_TERM if every_term else LOSS
        updates = tuple((b, loss) for b in batches)
        return Job(chosen, updates, RATE, save, turns="by turns" in case)

    def refused(self, stage: int) -> Job:
        """Two updates to refuse: one for its gradient, one for its loss."""
        clean = self.job(f"1/qwen3_vl/{stage}")
        batch, _ = clean.updates[0]
        updates = ((batch, CliffLoss()), (batch, CliffLoss(math.nan)))
        return replace(clean, updates=updates, save=None)

    def stored(self, folder: Path) -> dict[str, torch.Tensor]:
        with safe_open(str(folder / "model.safetensors"), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def reference(self, family: str, every_term: bool) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and float64 gradients of the first update: plain model, a sequence at a time."""
        policy, processor = load_policy(str(self.paths[family]))
        policy.double()
        base, _ = load_policy(str(self.bases[family]))
        base.double()
        batch = self.batches[family][0]
        total = torch.zeros(())
        for s in batch.sequences:
            logprobs, entropies = plain_logprobs(policy, processor, s)
            if every_term:
                images = tuple(mask_patches(image, 8, 0.6) for image in s.images)
                masked = plain_logprobs(policy, processor, replace(s, images=images))
                with torch.no_grad():
                    known, _ = plain_logprobs(base, processor, s)
                total = total + every_term_reference(s, logprobs, entropies, *masked, known, batch)
                continue
            ratio = (logprobs - torch.from_numpy(s.sampler_logprobs)).exp()
            gain = torch.minimum(
                ratio * torch.from_numpy(s.advantages),
                ratio.clamp(0.8, 1.28) * torch.from_numpy(s.advantages),
            )
            total = total - (gain + 0.01 * entropies).sum() / batch.response_tokens()
        total.backward()
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in policy.model.named_parameters()
        }
        return float(total.detach()), gradients


def every_term_reference(
    s: TrainSequence,
    logprobs: torch.Tensor,
    entropies: torch.Tensor,
    masked: torch.Tensor,
    masked_entropies: torch.Tensor,
    known: torch.Tensor,
    batch: TrainBatch,
) -> torch.Tensor:
    """A sequence's share of `EVERY_TERM`."""
    gap = logprobs - torch.from_numpy(s.sampler_logprobs)
    advantages, found = torch.from_numpy(s.advantages), torch.zeros((), dtype=torch.float64)
    ratio = float(gap.detach().mean().exp())
    for t in range(len(gap)):
        a = float(advantages[t])
        if not (ratio > 1.08 and a > 0) and not (ratio < 0.95 and a < 0):
            # The token form of GSPO: the sequence's ratio, a gradient for each token of its own.
            found = found - ratio * a * (1 + logprobs[t] - logprobs[t].detach())
        else:
            found = found - min(max(ratio, 0.95), 1.08) * a
        found = found + 0.1 * gap[t] ** 2 / 2
        away = known[t] - logprobs[t]
        found = found + 0.2 * (away.exp() - away - 1)
    found = found / len(gap) / len(batch.sequences)
    for index, weight in ((0, 0.5), (1, 0.2)):
        count = sum(int((other.segments == index).sum()) for other in batch.sequences)
        own = torch.from_numpy(s.segments == index)
        found = found - weight * entropies[own].sum() / max(1, count)
    r = (masked - logprobs).exp()
    image_terms = 0.3 * (entropies + masked_entropies) - 0.5 * (r - 1 - r.log())
    return found + image_terms.sum() / batch.response_tokens()


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


def test_layer_groups_hold_every_name_once_and_a_layer_together() -> None:
    names = ["a.w", "m.layers.0.q", "m.layers.0.mlp.1.k", "m.layers.10.q", "v.blocks.0.q", "b"]
    groups = layer_groups(names)
    assert sorted(n for group in groups for n in group) == sorted(names)
    assert ["m.layers.0.q", "m.layers.0.mlp.1.k"] in groups
    assert ["m.layers.10.q"] in groups


def test_buckets_join_neighbours_within_their_size_and_lose_none() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        sizes = rng.integers(1, 40, rng.integers(0, 30)).tolist()
        groups = [[f"{place}.a", f"{place}.b"] for place in range(len(sizes))]
        limit = int(rng.integers(0, 80))

        def size(names: list[str], sizes: list[int] = sizes) -> int:
            return sum(sizes[int(place)] for place in {name.split(".")[0] for name in names})

        buckets = in_buckets(groups, size, limit)
        assert [name for bucket in buckets for name in bucket] == [n for g in groups for n in g]
        for bucket, following in itertools.zip_longest(buckets, buckets[1:]):
            assert size(bucket) <= limit or len(bucket) == 2
            # Full: what comes next had no room. A layer is never split.
            if following:
                assert size(bucket) + size(following[:2]) > limit
                assert following[0].split(".")[0] != bucket[-1].split(".")[0]


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
