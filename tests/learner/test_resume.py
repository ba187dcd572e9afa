"""Learners that were ended go on as if they had not been, on real DeepSpeed ranks; of LoRA too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from learner.batch import TrainBatch
from learner.checkpoint import check, checkpoint_folder, checkpoint_folders
from learner.collate import Collator
from learner.lora import ADAPTER, Adapters
from learner.loss_settings import LossConfig
from learner.policy import Policy, load_policy
from learner.policy_loss import PolicyLoss
from learner.settings import CheckpointConfig
from rollout.tokens import ModelError
from tests.learner.test_lora import LORA
from tests.support.ranks import Job, Outcome, run_killed, run_ranks, setup
from tests.support.samples import mixed_batch

RANKS = 2
FURTHER = 3
"""Updates after the checkpoint."""
RATE, DECAY = 1e-3, 0.1
LOSS = PolicyLoss(LossConfig(entropy_weight=0.01, reference_kl_weight=0.05))
SAVED_AFTER = 2
KILLED = f"{RANKS}/3"
"""Goes on from what a life that was killed left behind."""
BACKGROUND = (KILLED, "1/0")
RESUMING = {
    f"{RANKS}/3": (f"{RANKS}/3", f"{RANKS}/1", "1/0", "1/2"),
    f"{RANKS}/0": (f"{RANKS}/2",),
    "1/0": ("1/0", "1/3"),
    "1/0 bf16": ("1/0 bf16", "1/2 bf16"),
    "1/3 bf16": ("1/3 bf16", "1/0 bf16"),
    f"{RANKS}/3 lora": (f"{RANKS}/3 lora", "1/0 lora"),
    "1/0 lora": ("1/0 lora",),
    "1/0 bf16 lora": (),
}
ALL = [(start, end) for start, ends in RESUMING.items() for end in ends]
RESUMED = [pair for pair in ALL if "lora" not in pair[0]]
ADAPTED = [pair for pair in ALL if "lora" in pair[0]]
# Another stage adds up in another order, and how far two orders of bfloat16 come apart in a few
# updates is the processor's affair: float32 shows what belongs where.
SAME_UPDATES = [pair for pair in RESUMED if pair[0] == pair[1] or "bf16" not in pair[0]]


class Lives:
    """What uninterrupted learners did, and those that went on from their checkpoints."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, str(model)
        _, processor = load_policy(self.model)
        mixed = mixed_batch(processor)
        # Some updates have no image on one rank or another.
        one, two = TrainBatch(mixed.sequences[1:3]), TrainBatch(mixed.sequences[::2])
        kinds = (mixed, one, two, mixed, one)
        self.batches = tuple(kinds[i % len(kinds)] for i in range(SAVED_AFTER + FURTHER))
        self.whole: dict[str, Outcome] = {}
        self.resumed: dict[tuple[str, str], Outcome] = {}
        (folder / "killed").mkdir()
        job = self.job(KILLED)
        assert job.checkpoint
        killed = replace(job, checkpoint=(SAVED_AFTER, str(self.left_by_the_killed())))
        run_killed(RANKS, killed, folder / "killed", seconds=600)
        for ranks in (RANKS, 1):
            whole = {name: self.job(name) for name in RESUMING if name[0] == str(ranks)}
            resumed = {
                f"{start} > {end}": self.resume(start, end)
                for start, ends in RESUMING.items()
                for end in ends
                if end[0] == str(ranks)
            }
            out = folder / f"ranks-{ranks}"
            out.mkdir()
            for name, outcome in run_ranks(ranks, whole | resumed, out, seconds=600).items():
                start, _, end = name.partition(" > ")
                if end:
                    self.resumed[start, end] = outcome
                else:
                    self.whole[name] = outcome

    def checkpoint(self, name: str) -> Path:
        return checkpoint_folder(self.folder / name.replace("/", "-").replace(" ", "-"), 2)

    def saved(self, name: str) -> Path:
        return self.folder / f"saved-{name.replace('/', '-').replace(' ', '-')}"

    def stored(self, start: str) -> dict[str, torch.Tensor]:
        """What a checkpoint's files hold, by the names of `Outcome.state_at_start`."""
        folder = self.left_by_the_killed() if start == KILLED else self.checkpoint(start)
        weights = load_file(folder / "model.safetensors")
        found = {f"weights/{name}": tensor for name, tensor in weights.items()}
        for path in (folder / "training").glob("optimizer-*.safetensors"):
            found |= load_file(path)
        return found

    def left_by_the_killed(self) -> Path:
        return checkpoint_folder(self.folder / "killed", 2)

    def job(self, name: str) -> Job:
        bf16, lora = "bf16" in name, "lora" in name
        chosen = setup(
            self.model,
            "bfloat16" if bf16 else "float32",
            zero_stage=int(name[2]),
            logits_mib=0.05 if bf16 else 256.0,  # a float32 head in turns
            weight_decay=0.0 if lora else DECAY,
            lora=LORA if lora else None,
            rates={"vision": 0.5} if lora else {},
        )
        background = CheckpointConfig(background=name in BACKGROUND)
        chosen = replace(chosen, checkpoint=background, reference=True)
        at = (SAVED_AFTER, str(self.checkpoint(name)))
        updates = tuple((batch, LOSS) for batch in self.batches[: 4 if lora else None])
        save = str(self.saved(name)) if lora else None
        return Job(chosen, updates, 1e-2 if lora else RATE, save, checkpoint=at)

    def resume(self, start: str, end: str) -> Job:
        job = self.job(end)
        left = self.left_by_the_killed() if start == KILLED else self.checkpoint(start)
        chosen = replace(job.setup, folder=str(left), resume=True)
        return Job(chosen, job.updates[SAVED_AFTER:], job.learning_rate)


@pytest.fixture(scope="module")
def lives(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Lives:
    return Lives(tmp_path_factory.mktemp("lives"), tiny_models["qwen3_vl"])


def assert_alike(
    found: Outcome, expected: Outcome, first: int, loose: float, weights: float
) -> None:
    """`found` is as `expected` from its update `first` on: relative, and the weights at the end."""
    for new, old in zip(found.metrics, expected.metrics[first:], strict=True):
        for name in ("loss", "grad_norm", "entropy/perception", "reference_kl"):
            assert new[name] == pytest.approx(old[name], rel=loose, abs=min(1e-5, loose)), name
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert (found.weights[name].float() - tensor.float()).abs().max() <= weights, name


@pytest.mark.parametrize(("start", "end"), RESUMED)
def test_a_resumed_learner_has_what_was_stored_to_the_bit(
    lives: Lives, start: str, end: str
) -> None:
    """Whatever stage and ranks wrote it: weights, float32 weights, both moments, steps taken."""
    stored = lives.stored(start)
    found = lives.resumed[start, end].state_at_start
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    names = [name for name in stored if name.startswith("steps/")]
    assert names and all(stored[name] == SAVED_AFTER for name in names)
    masters = [name for name in stored if name.startswith("master/")]
    assert len(masters) == (len(names) if "bf16" in start else 0)


@pytest.mark.parametrize(("start", "end"), RESUMED)
def test_a_resumed_learner_steps_from_what_was_stored(lives: Lives, start: str, end: str) -> None:
    """Its first update is AdamW's on its own gradients, whatever rounding gave these."""
    stored, outcome = lives.stored(start), lives.resumed[start, end]
    found, steps = outcome.state_after_first, SAVED_AFTER + 1
    scale = min(1.0, 1 / outcome.norms[0])
    own = "master" if "bf16" in start else "weights"
    for name, gradient in outcome.gradients.items():
        gradient = gradient.float() * scale
        mean, square, weight = (found[f"{k}/{name}"] for k in ("exp_avg", "exp_avg_sq", own))
        told = (mean - 0.9 * stored[f"exp_avg/{name}"]) / 0.1
        rounding = 1e-6 * float(stored[f"exp_avg/{name}"].norm())
        assert (told - gradient).norm() <= 1e-4 * gradient.norm() + rounding, name
        expected = 0.999 * stored[f"exp_avg_sq/{name}"] + 0.001 * told.square()
        assert (square - expected).norm() <= 1e-4 * expected.norm(), name
        step = mean / (1 - 0.9**steps) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
        expected = stored[f"{own}/{name}"] * (1 - RATE * DECAY) - RATE * step
        assert (weight - expected).abs().max() <= 1e-3 * RATE, name
        assert found[f"steps/{name}"] == steps
        assert torch.equal(found[f"weights/{name}"], weight.to(found[f"weights/{name}"].dtype))


@pytest.mark.parametrize(("start", "end"), SAME_UPDATES)
def test_a_resumed_learner_goes_on_as_the_uninterrupted_one(
    lives: Lives, start: str, end: str
) -> None:
    whole, found, same = lives.whole[start], lives.resumed[start, end], start == end
    assert len(found.metrics) == FURTHER
    assert_alike(found, whole, SAVED_AFTER, 1e-6 if same else 1e-4, 1e-7 if same else 1e-4)
    moved = [w.float() - whole.after_first[name].float() for name, w in whole.weights.items()]
    assert max(float(change.norm()) for change in moved) > 0.01


def test_a_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before(lives: Lives) -> None:
    whole, left = lives.checkpoint(KILLED), lives.left_by_the_killed()
    assert checkpoint_folders(lives.folder / "killed") == [left]
    assert [p.name for p in left.parent.iterdir() if p != left] == [".step-000003.partial"]
    assert check(left) == check(whole) == {"updates": SAVED_AFTER}
    weights, others = (load_file(folder / "model.safetensors") for folder in (left, whole))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_what_is_written_in_the_background_is_of_the_step_it_names(lives: Lives) -> None:
    """All writing came after the next update; the learner that wrote at once is the measure."""
    at_once = load_file(lives.checkpoint(f"{RANKS}/0") / "model.safetensors")
    for name in BACKGROUND:
        found = load_file(lives.checkpoint(name) / "model.safetensors")
        after_first = lives.whole[name].after_first
        assert found.keys() == at_once.keys()
        for parameter, expected in at_once.items():
            # An update moves a weight by about the rate; orders of adding up do not.
            assert (found[parameter] - expected).abs().max() < RATE / 10, (name, parameter)
        moved = [(found[n] - after_first[n]).abs().max() > RATE / 10 for n in found]
        assert sum(moved) > len(moved) / 2


def test_every_random_stream_goes_on(lives: Lives) -> None:
    for start, end in RESUMED:
        outcome = lives.resumed[start, end]
        went_on = lives.whole[start].draw_at_checkpoint == outcome.draw_at_start
        assert went_on == (start[0] == end[0]), (start, end)


@pytest.mark.parametrize("name", ("1/0", f"{RANKS}/3", "1/3 bf16"))
def test_a_checkpoint_is_a_plain_hugging_face_folder_too(lives: Lives, name: str) -> None:
    folder = lives.checkpoint(name)
    assert check(folder) == {"updates": SAVED_AFTER}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    start = load_file(Path(lives.model) / "model.safetensors")
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == start.keys()
    changed = [n for n in start if not torch.equal(start[n].float(), saved[n].float())]
    assert len(changed) > 0.9 * len(start)
    assert model.dtype == (torch.bfloat16 if "bf16" in name else torch.float32)
    assert AutoProcessor.from_pretrained(folder).chat_template


# --- LoRA ------------------------------------------------------------------------------------


def test_the_stage_and_the_ranks_change_nothing(lives: Lives) -> None:
    one = lives.whole["1/0 lora"]
    assert one.metrics[0]["loss"] != pytest.approx(one.metrics[3]["loss"], rel=1e-2)
    two = lives.whole[f"{RANKS}/3 lora"]
    assert_alike(two, one, 0, 2e-3, 2e-3)
    for parameter, gradient in one.gradients.items():
        assert (two.gradients[parameter] - gradient).norm() < 1e-4 * one.norms[0], parameter


def test_optimizer_state_and_gradients_are_of_adapters_only(lives: Lives) -> None:
    policy, _ = load_policy(lives.model)
    layers = Adapters(policy, LORA, lives.model).layers
    elements = sum(LORA.rank * sum(shape) for shape in layers.values())
    learners = {name: outcome for name, outcome in lives.whole.items() if "lora" in name}
    learners |= {end: lives.resumed[start, end] for start, end in ADAPTED}
    for name, outcome in learners.items():
        ranks = int(name[0])
        assert all(".lora_" in parameter for parameter in outcome.gradients)
        assert elements / ranks <= outcome.state_elements < 1.1 * elements / ranks + 1000, name


@pytest.mark.parametrize("name", RESUMING)
def test_the_reference_is_the_policy_before_the_first_update(lives: Lives, name: str) -> None:
    # That resumed lives tell the same KL to it as uninterrupted ones is in `assert_alike`.
    first, *others = (m["reference_kl"] for m in lives.whole[name].metrics)
    assert abs(first) < 1e-6 and min(others) > 1e-5
    total = lives.whole[name].metrics[-1]
    assert total["loss/reference_kl"] == pytest.approx(0.05 * total["reference_kl"], rel=1e-5)


@pytest.mark.parametrize(("start", "end"), ADAPTED)
def test_a_resumed_learner_goes_on_with_its_adapters(lives: Lives, start: str, end: str) -> None:
    loose = 1e-6 if start == end else 2e-3
    assert_alike(lives.resumed[start, end], lives.whole[start], SAVED_AFTER, loose, loose)


@pytest.mark.parametrize("name", (f"{RANKS}/3 lora", "1/0 lora", "1/0 bf16 lora"))
def test_what_is_saved_is_a_plain_folder_of_the_policy_and_its_adapters(
    lives: Lives, name: str
) -> None:
    folder, outcome = lives.saved(name), lives.whole[name]
    check(lives.checkpoint(name))
    loose = 0.1 if "bf16" in name else 1e-4  # bfloat16 rounds the sum of W and the update
    told = np.concatenate(outcome.logprobs)
    policy, processor = load_policy(str(folder), "bfloat16" if "bf16" in name else "float32")
    batch = Collator(policy, processor)(lives.batches[0].sequences)
    start = load_policy(lives.model)[0]
    with torch.no_grad():
        found = policy.eval().run(batch)[0].float().numpy()
        before = start.eval().run(batch)[0].numpy()
    np.testing.assert_allclose(found, told, rtol=0, atol=loose)
    assert np.abs(before - told).max() > 3 * loose
    stored = load_file(Path(lives.model) / "model.safetensors")
    assert load_file(folder / "model.safetensors").keys() == stored.keys()
    # PEFT itself reads the adapters, onto the model they were trained on.
    base = AutoModelForImageTextToText.from_pretrained(lives.model, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, folder / ADAPTER).merge_and_unload()
    with torch.no_grad():
        again = Policy(peft).eval().run(batch)[0].numpy()
    np.testing.assert_allclose(again, told, rtol=0, atol=loose)


def test_adapters_of_other_layers_are_not_taken_over(lives: Lives) -> None:
    policy, _ = load_policy(lives.model)
    adapters = Adapters(policy, LORA.model_copy(update={"rank": 8}), lives.model)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: holds other adapters"):
        adapters.load(lives.saved("1/0 lora") / ADAPTER)
