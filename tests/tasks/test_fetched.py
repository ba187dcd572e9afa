"""What is named by URI is on each node once, whole, and of the one content that was pinned."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tasks.core import DataError
from tasks.fetched import PIN, fetched, local, pinned

URI = "memory://bucket/policy"
MODEL = {"config.json": b"{}", "model.safetensors": b"w" * 900, "tokenizer.json": b"t"}


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    node(monkeypatch, tmp_path, "a")
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


def node(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> Path:
    """From now on this process is on a node with a disk of its own; its cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / f"node-{name}"))
    return folder / f"node-{name}" / "equipoise" / "fetched"


def put(files: dict[str, bytes], uri: str = URI) -> None:
    memory = fsspec.filesystem("memory")
    root = uri.removeprefix("memory:/")
    if memory.exists(root):
        memory.rm(root, recursive=True)
    for name, content in files.items():
        memory.pipe_file(f"{root}/{name}", content)


def here(place: str) -> dict[str, bytes]:
    folder = Path(fetched(place))
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def quiet(_: str) -> None:
    pass


@pytest.fixture
def got(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that travelled."""
    paths: list[str] = []
    get_file = MemoryFileSystem.get_file

    def counted(self: Any, remote: str, *args: Any, **options: Any) -> None:
        paths.append(remote)
        get_file(self, remote, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    return paths


def test_any_tree_arrives_as_it_is_and_its_pin_is_of_its_content() -> None:
    rng, pins = random.Random(0), dict[str, dict[str, bytes]]()
    for _ in range(20):
        names = [
            f"{rng.choice('ab')}/{rng.choice('cd')}{n}.jsonl" for n in range(rng.randint(1, 4))
        ]
        tree = {name: rng.randbytes(rng.choice((0, 1, 1))) for name in names}
        put(tree)
        place = pinned(URI, quiet)
        assert here(place) == tree
        assert pins.setdefault(place, tree) == tree
    assert len(pins) == len({str(sorted(tree.items())) for tree in pins.values()})


def test_a_file_keeps_its_name_and_a_folder_too() -> None:
    put({"rows.jsonl": b"{}"}, "memory://bucket/train")
    one, all_ = (pinned(f"memory://bucket/train{rest}", quiet) for rest in ("/rows.jsonl", ""))
    assert Path(fetched(one)).read_bytes() == b"{}" and one != all_
    assert (Path(fetched(one)).name, Path(fetched(all_)).name) == ("rows.jsonl", "train")


def test_it_is_fetched_once_and_again_only_when_it_changed(got: list[str]) -> None:
    put(MODEL)
    first = pinned(URI, quiet, weights=True)
    assert pinned(URI, quiet) == pinned(first, quiet) == first and len(got) == 3
    put(MODEL | {"tokenizer.json": b"T"})
    second = pinned(URI, quiet)
    assert second != first and len(got) == 6
    assert here(first)["tokenizer.json"] == b"t" and here(second)["tokenizer.json"] == b"T"


def test_two_nodes_read_one_content_or_one_of_them_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(MODEL)
    place = pinned(URI, quiet)
    node(monkeypatch, tmp_path, "b")
    assert local(place) == place and here(place) == MODEL and local(place) != place
    put(MODEL | {"model.safetensors": b"W" * 900})
    node(monkeypatch, tmp_path, "c")
    with pytest.raises(DataError, match=f"^{URI}: other content lies there .*; put that back"):
        fetched(place)
    node(monkeypatch, tmp_path, "b")
    assert here(place) == MODEL


@pytest.mark.parametrize("harm", ["shorter", "gone", "all gone", "no record"])
def test_a_copy_that_is_torn_is_fetched_again(tmp_path: Path, harm: str) -> None:
    put(MODEL)
    place = pinned(URI, quiet)
    folder = Path(local(place))
    if harm == "shorter":
        (folder / "model.safetensors").write_bytes(b"w" * 899)
    elif harm == "gone":
        (folder / "config.json").unlink()
    elif harm == "all gone":
        shutil.rmtree(folder)
    else:
        folder.parent.with_suffix(".json").write_text("{")
    assert local(place) == place
    assert here(pinned(URI, quiet)) == MODEL


@pytest.mark.parametrize("times", [1, 2, 3])
def test_bytes_that_do_not_all_come_are_asked_again_and_then_told(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(MODEL)
    get_file, left = MemoryFileSystem.get_file, [times]

    def half(self: Any, remote: str, target: str, **options: Any) -> None:
        get_file(self, remote, target, **options)
        if remote.endswith(".safetensors") and left[0]:
            left[0] -= 1
            Path(target).write_bytes(b"w" * 450)

    monkeypatch.setattr(MemoryFileSystem, "get_file", half)
    if times < 3:
        assert here(pinned(URI, quiet)) == MODEL
        return
    with pytest.raises(DataError, match=r"policy: model.safetensors: 450 of 900 bytes came"):
        pinned(URI, quiet)
    assert here(pinned(URI, quiet)) == MODEL


def test_nothing_is_left_of_a_fetch_that_broke_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(MODEL)
    cache = node(monkeypatch, tmp_path, "a")
    (cache / ".coming-killed").mkdir(parents=True)
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "get_file", lambda *_, **__: 1 / 0)
        with pytest.raises(DataError, match=f"{URI}: ZeroDivisionError"):
            pinned(URI, quiet)
    assert [path.name for path in cache.iterdir()] == [".lock"]
    assert here(pinned(URI, quiet)) == MODEL


def test_what_changes_while_it_is_fetched_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    put(MODEL)
    get_file = MemoryFileSystem.get_file

    def slow(self: Any, remote: str, target: str, **options: Any) -> None:
        get_file(self, remote, target, **options)
        self.pipe_file(remote, b"x" * Path(target).stat().st_size)

    with monkeypatch.context() as changing:
        changing.setattr(MemoryFileSystem, "get_file", slow)
        with pytest.raises(DataError, match="it was changed while it was fetched"):
            pinned(URI, quiet)
    assert set(here(pinned(URI, quiet))["model.safetensors"]) == {ord("x")}


def test_without_a_network_a_pin_that_is_here_will_do_and_else_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(MODEL)
    place = pinned(URI, quiet)

    def down(*_: Any, **__: Any) -> None:
        raise OSError("Could not connect to the endpoint URL\nTraceback ...")

    monkeypatch.setattr(MemoryFileSystem, "find", down)
    assert pinned(place, quiet, weights=True) == place and here(place) == MODEL
    for uri in (URI, f"{URI}#sha256={'0' * 64}"):
        with pytest.raises(DataError) as refused:
            pinned(uri, quiet)
        assert str(refused.value) == (
            f"{URI}: OSError: Could not connect to the endpoint URL; is the address right, the "
            "network up, and are its keys in the environment?"
        )


def test_who_comes_second_waits_for_the_first(
    got: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(MODEL)
    counted, told, places = MemoryFileSystem.get_file, list[str](), list[str]()

    def slow(*args: Any, **options: Any) -> None:
        time.sleep(0.1)
        counted(*args, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow)
    work = [
        threading.Thread(target=lambda: places.append(pinned(URI, told.append))) for _ in range(3)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(got) == 3 and len(places) == 3 and len(set(places)) == 1
    assert sum("fetching 3 files" in line for line in told) == 1


def test_of_a_model_only_what_is_read_of_it_comes() -> None:
    """Pickles and Python never; of a training checkpoint not the optimizer's state."""
    more = {"pytorch_model.bin": b"p", "modeling_x.py": b"p", "training/rank-0.safetensors": b"s"}
    put(MODEL | more | {".cache/x": b"h", "chat_template.jinja": b"c"})
    assert here(pinned(URI, quiet, weights=True)) == MODEL | {"chat_template.jinja": b"c"}


@pytest.mark.parametrize(
    ("files", "weights", "why"),
    [
        ({}, False, "nothing is there; is the address right"),
        ({"config.json": b"{}", "pytorch_model.bin": b"p"}, True, "no folder of a model"),
        ({"rows.jsonl": b"{}"}, True, "no folder of a model"),
    ],
)
def test_what_will_not_do_is_refused_before_a_byte_travels(
    files: dict[str, bytes], weights: bool, why: str, got: list[str]
) -> None:
    put(files)
    with pytest.raises(DataError, match=f"^{URI}: {why}"):
        pinned(URI, quiet, weights=weights)
    assert not got


def test_a_name_that_leads_out_is_refused(monkeypatch: pytest.MonkeyPatch, got: list[str]) -> None:
    found = {"/bucket/policy/../../x": {"size": 1, "type": "file"}}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: found)
    with pytest.raises(DataError, match="leads out of its folder"):
        pinned(URI, quiet)
    assert not got


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("s3://AKIA:planted@bucket/x", "keys in a URI would be stored"),
        ("https://host/x.parquet?X-Amz-Signature=planted", "keys in a URI would be stored"),
        ("zip://x::memory://bucket/x.zip", "one protocol upon another"),
        ("nowhere://x", "Protocol not known: nowhere"),
    ],
)
def test_uris_that_hold_keys_or_unpack_are_refused(uri: str, why: str) -> None:
    with pytest.raises(DataError, match=why) as refused:
        pinned(uri, quiet)
    assert "planted" not in str(refused.value)


def test_a_disk_without_room_is_told_of_before_a_byte_travels(
    monkeypatch: pytest.MonkeyPatch, got: list[str]
) -> None:
    put(MODEL)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=900))
    with pytest.raises(DataError, match=r"MiB are free in .*XDG_CACHE_HOME"):
        pinned(URI, quiet)
    assert not got


def test_size_and_progress_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    put({"a.jsonl": b"x" * 2**21, "b.jsonl": b"y" * 2**21})
    monkeypatch.setattr("tasks.fetched.TELL_SECONDS", 0.0)
    told: list[str] = []
    place = pinned(URI, told.append)
    assert told[0].startswith(f"{URI}: fetching 2 files, 4 MiB, into ")
    assert f"{URI}: 4 of 4 MiB" in told and PIN.fullmatch(place)
    assert told[1:] == sorted(told[1:])
