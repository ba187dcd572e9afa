"""Replacing files and folders: killed at any moment, what is found is whole, old or new."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks import files
from tasks.files import put_text, recover, replacing
from tests.support.killed import contents, killed_before


def write(folder: Path, text: str) -> None:
    with replacing(folder) as fresh:
        (fresh / "part").mkdir()
        for name in ("one", "part/two"):
            (fresh / name).write_text(text)


def whole(text: str) -> dict[str, bytes]:
    return dict.fromkeys(("one", "part/two"), text.encode())


@pytest.mark.parametrize("exchanges", [True, False])
def test_killed_at_any_moment_a_folder_is_whole(
    tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "flush", lambda _: None)  # hundreds of writes
    if not exchanges:  # as on a file system that has no such call
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    first, died = 0, True
    while died:
        folder = tmp_path / str(first) / "checkpoint"
        write(folder, "0")
        died = killed_before(first, lambda folder=folder: write(folder, "1"))
        for second in (first // 2, 5 - first % 5):
            killed_before(second, lambda folder=folder: write(folder, "2"))
            if exchanges:
                assert folder.is_dir()  # also for a reader that knows nothing of ours
            recover(folder)
            assert contents(folder) in [whole(text) for text in "012"]
        write(folder, "3")
        assert contents(folder) == whole("3")
        assert os.listdir(folder.parent) == ["checkpoint"]
        first += 1
    assert first > 5  # it was killed in all of that


def test_what_a_link_points_to_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "checkpoint").symlink_to(tmp_path / "big disk")
    write(tmp_path / "checkpoint", "1")
    write(tmp_path / "checkpoint", "2")
    assert (tmp_path / "checkpoint").is_symlink()
    assert contents(tmp_path / "big disk") == whole("2")


def test_killed_at_any_moment_a_file_is_whole(tmp_path: Path) -> None:
    file, change = tmp_path / "evaluation.json", 0
    put_text(file, "old")
    while killed_before(change, lambda: put_text(file, "new")):
        assert file.read_text() in ("old", "new")
        change += 1
    assert file.read_text() == "new" and change > 1
    with pytest.raises(UnicodeEncodeError):
        put_text(file, "\ud800")
    assert os.listdir(tmp_path) == ["evaluation.json"]
