"""Training checkpoints: whole, or refused by name; what was told to be kept is kept."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

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
from learner.state import own_part
from tasks.files import replacing


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
