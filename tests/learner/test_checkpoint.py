"""Training checkpoints: whole or refused by name; a learner goes on as if it had not stopped."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from learner.batch import TrainBatch
from learner.checkpoint import (
    CheckpointError,
    Writer,
    check,
    checkpoint_folder,
    checkpoint_folders,
    prune,
    seal,
    write_json,
)
from learner.policy import load_policy
from learner.policy_loss import PolicyLoss
from learner.state import own_part
from learner.trainer import LearnerSettings
from tasks.files import replacing
from tests.support.ranks import Job, Outcome, run_killed, run_ranks
from tests.support.samples import mixed_batch

RANKS = 2
FURTHER = 3
"""Updates after the checkpoint."""
RATE, DECAY = 1e-3, 0.1
LOSS = PolicyLoss(entropy_weight=0.01)
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
}
RESUMED = [(start, end) for start, ends in RESUMING.items() for end in ends]
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
        settings = LearnerSettings(
            model=self.model,
            dtype="bfloat16" if "bf16" in name else "float32",
            zero_stage=int(name[2]),
            micro_batch_tokens=600,
            logits_mib=0.05 if "bf16" in name else 256.0,  # a float32 head in turns
            weight_decay=DECAY,
            background_saving=name in BACKGROUND,
        )
        updates = tuple((batch, LOSS) for batch in self.batches)
        return Job(settings, updates, RATE, checkpoint=(SAVED_AFTER, str(self.checkpoint(name))))

    def resume(self, start: str, end: str) -> Job:
        job = self.job(end)
        left = self.left_by_the_killed() if start == KILLED else self.checkpoint(start)
        settings = replace(job.settings, model=str(left), resume=True)
        return Job(settings, job.updates[SAVED_AFTER:], job.learning_rate)


@pytest.fixture(scope="module")
def lives(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Lives:
    return Lives(tmp_path_factory.mktemp("lives"), tiny_models["qwen3_vl"])


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
    for old, new in zip(whole.metrics[SAVED_AFTER:], found.metrics, strict=True):
        for name in ("loss", "grad_norm", "entropy/perception"):
            assert new[name] == pytest.approx(old[name], rel=1e-6 if same else 1e-4, abs=1e-6), name
    moved = 0.0
    for name, expected in whole.weights.items():
        gap = (found.weights[name].float() - expected.float()).abs().max()
        assert gap <= (1e-7 if same else 1e-4), name
        moved = max(moved, float((expected.float() - whole.after_first[name].float()).norm()))
    assert moved > 0.01


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


def test_one_write_at_a_time_and_no_error_is_lost() -> None:
    writer, free, order = Writer(), threading.Event(), []

    def first() -> None:
        free.wait(10)
        order.append("first")

    def full() -> None:
        raise OSError("disk full")

    writer.start(first)
    assert not order
    threading.Timer(0.05, free.set).start()
    writer.start(lambda: order.append("second"))
    assert order[0] == "first"
    writer.wait()
    assert order == ["first", "second"]
    writer.start(full)
    with pytest.raises(OSError, match="disk full"):
        writer.start(lambda: order.append("third"))
    assert len(order) == 2
    writer.start(full)
    with pytest.raises(OSError, match="disk full"):
        writer.wait()
    writer.wait()


def test_every_random_stream_goes_on(lives: Lives) -> None:
    for (start, end), outcome in lives.resumed.items():
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


@pytest.mark.parametrize("ranks", (1, 2, 3, 7))
def test_parts_of_a_tensor_make_it_whole_again(ranks: int) -> None:
    for shape in ((5,), (2, 3), (1,), (4, 4)):
        value = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
        size = -(-value.numel() // ranks)
        parts = torch.cat([own_part(value, size, rank) for rank in range(ranks)])
        assert parts[: value.numel()].tolist() == value.flatten().tolist()
        assert len(parts) == size * ranks
        assert not parts[value.numel() :].any()


def written(run: Path, step: int, text: str = "some weights") -> Path:
    """A small sealed checkpoint."""
    folder = checkpoint_folder(run, step)
    with replacing(folder) as fresh:
        (fresh / "training").mkdir()
        (fresh / "model.safetensors").write_text(text)
        write_json(fresh / "training" / "state.json", {"step": step})
        seal(fresh)
    return folder


def test_any_change_is_refused_by_name(tmp_path: Path) -> None:
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-3])

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))

    place = 0
    for name in ("model.safetensors", "training/state.json", "manifest.json"):
        for harm, word in ((cut, "bytes"), (flip, "changed"), (Path.unlink, "missing")):
            folder = written(tmp_path, place := place + 1)
            assert check(folder) == {"step": place}
            harm(folder / name)  # type: ignore[operator]
            with pytest.raises(CheckpointError) as refused:
                check(folder)
            message = str(refused.value)
            assert str(folder) in message
            if name != "manifest.json":
                assert message.startswith(f"{folder / name}: ")
                assert word in message
    folder = written(tmp_path, 99)
    (folder / "model-2.safetensors").write_text("more")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: not in manifest\.json"):
        check(folder)


@pytest.mark.parametrize(
    "text", ("[]", "{}", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"a": {"bytes": 1}}}')
)
def test_a_strange_manifest_is_refused(tmp_path: Path, text: str) -> None:
    folder = written(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        check(folder)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = written(tmp_path, 5, "first")
    with pytest.raises(OSError, match="full"), replacing(folder) as fresh:
        (fresh / "model.safetensors").write_text("second")
        raise OSError("disk full")
    assert check(folder) == {"step": 5}
    assert (folder / "model.safetensors").read_text() == "first"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    # A process that died in the middle of the next write left this; it is no checkpoint.
    (folder.parent / ".step-000006.partial").mkdir()
    assert checkpoint_folders(tmp_path) == [folder]
    written(tmp_path, 6)
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["step-000005", "step-000006"]
    assert len(list(folder.parent.iterdir())) == 2


def test_the_last_few_are_kept_and_an_abandoned_line_goes(tmp_path: Path) -> None:
    for step in (2, 4, 6, 1_000_000, 1_000_008):
        written(tmp_path, step)
    assert [int(f.name[5:]) for f in checkpoint_folders(tmp_path)] == [2, 4, 6, 1000000, 1000008]
    prune(checkpoint_folder(tmp_path, 6), keep=2)
    assert [int(f.name[5:]) for f in checkpoint_folders(tmp_path)] == [4, 6]
    manifest = json.loads((checkpoint_folder(tmp_path, 6) / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["model.safetensors", "training/state.json"]
