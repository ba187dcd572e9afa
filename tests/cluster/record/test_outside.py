"""Trackers outside the run folder: what is asked for arrives, no more leaves, no failure counts."""

from __future__ import annotations

import json
import struct
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray

import cluster.record.outside as outside
from cluster.recipe.sections import OutputConfig
from cluster.record.stored import read_metrics
from cluster.record.tracker import Tracker
from tests.support.toys import group, scored


def records(file: Path) -> Iterator[Any]:
    """What a run of wandb in offline mode would send; its file is a log of one short block."""
    from wandb.proto import wandb_internal_pb2

    data, at = file.read_bytes(), 7
    while at < len(data):
        _, size, _ = struct.unpack("<IHB", data[at : at + 7])
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + size])
        yield record
        at += 7 + size


def test_wandb_gets_the_numbers_and_a_few_rollouts_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    run = tmp_path / "my-run"
    output = OutputConfig(trackers=("wandb",), project="mine", tracked_rollouts=2)
    with Tracker(run, 'question = "kept-at-home"', output=output) as tracker:
        tracker.log(1, {"acc/a": 0.5, "reward/outcome/mean": 0.25})
        tracker.log_rollouts(1, scored(group(3, "3;6;", "3;5;<b>", ";;not-told")))
        tracker.log(2, {"acc/a": 0.75})
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    sent = list(records(file))
    (began,) = [r.run for r in sent if r.WhichOneof("record_type") == "run"]
    assert (began.project, began.display_name, began.host) == ("mine", "my-run", "")
    steps = []
    for record in sent:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            steps.append({k: v for k, v in items.items() if k[0] != "_" and k[:8] != "rollouts"})
    assert steps == [{"acc/a": 0.5, "reward/outcome/mean": 0.25}, {"acc/a": 0.75}]
    files = [path for path in (file.parent / "files").rglob("*") if path.is_file()]
    (table,) = files
    told = json.loads(table.read_text())
    assert told["columns"][:4] == ["task", "prompt", "text", "total"]
    assert [row[2] for row in told["data"]] == ["3;6;", "3;5;<b>"]
    assert b"kept-at-home" not in file.read_bytes() and b"not-told" not in table.read_bytes()


def test_the_agents_of_a_ray_cluster_serve_the_latest_numbers(tmp_path: Path) -> None:
    quick = {"metrics_report_interval_ms": 200}
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
             _system_config=quick)  # fmt: skip
    try:
        (node,) = ray.nodes()
        page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        output = OutputConfig(trackers=("ray",), project="mine", tracked_rollouts=2)
        with Tracker(tmp_path / "my-run", output=output) as tracker:
            tracker.log(1, {"acc/a": 0.5, "reward/outcome/mean": 0.25})
            tracker.log_rollouts(1, scored(group(3, "3;6;", "3;5;not-told")))
            tracker.log(2, {"acc/a": 0.75})
        wanted = {"acc/a": 0.75, "reward/outcome/mean": 0.25, "step": 2.0}
        served, text = dict[str, float](), ""
        until = time.monotonic() + 120
        while served != wanted:
            assert time.monotonic() < until, served
            time.sleep(0.2)
            with suppress(OSError), urllib.request.urlopen(page, timeout=5) as answer:
                text = answer.read().decode()
            lines = [x for x in text.splitlines() if x.startswith("ray_equipoise_metric{")]
            assert all('project="mine"' in x and 'run="my-run"' in x for x in lines)
            served = {
                x.partition('metric="')[2].partition('"')[0]: float(x.split()[-1]) for x in lines
            }
        assert "not-told" not in text
    finally:
        ray.shutdown()


class Recorded:
    """A sink that keeps what it is given, and does as it is told to."""

    def __init__(self, behaves: str, gate: threading.Event) -> None:
        self.behaves, self.gate = behaves, gate
        self.got: list[tuple[int, dict[str, float]]] = []
        if behaves == "no login":
            raise ConnectionError("nobody at home\nand a traceback")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.behaves == "hangs":
            self.gate.wait(60)
        if self.behaves == "fails later" and step == 2:
            raise SystemExit(1)
        self.got.append((step, dict(metrics)))

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        raise AssertionError("no rollouts were asked for")

    def close(self) -> None:
        self.got.append((0, {}))


@pytest.mark.parametrize(
    ("behaves", "says", "arrived"),
    [
        ("", "", [1, 2, 3, 0]),
        ("no login", "tracker wandb failed: ConnectionError: nobody at home; the run", []),
        ("fails later", "tracker wandb failed: SystemExit: 1; the run goes on", [1]),
        ("hangs", "tracker wandb did not take all within 0.2 s", []),
    ],
)
def test_no_tracker_ends_a_run_or_holds_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaves: str, says: str, arrived: list[int]
) -> None:
    gate, made = threading.Event(), []

    def sink(project: str, name: str, folder: Path) -> Recorded:
        made.append(Recorded(behaves, gate))
        return made[-1]

    monkeypatch.setitem(outside.SINKS, "wandb", sink)
    if behaves == "hangs":
        monkeypatch.setattr(outside, "CLOSE_SECONDS", 0.2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Tracker(tmp_path, output=OutputConfig(trackers=("wandb",))) as tracker:
            for step in (1, 2, 3):
                tracker.log(step, {"acc/a": float(step)})
                tracker.log_rollouts(step, scored(group(3, "3;6;")))
    assert [step for sink in made for step, _ in sink.got] == arrived
    assert [str(w.message)[: len(says)] for w in caught] == ([says] if says else [])
    assert all("\n" not in str(w.message) for w in caught)
    assert [row["value"] for row in read_metrics(tmp_path).to_pylist()] == [1.0, 2.0, 3.0]
    gate.set()


def test_what_a_slow_tracker_cannot_take_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    slow = Recorded("hangs", gate)
    monkeypatch.setitem(outside.SINKS, "mlflow", lambda *begun: slow)
    monkeypatch.setattr(outside, "WAITING", 3)
    tracker = outside.Outside("mlflow", "p", tmp_path)
    for step in range(1, 11):
        tracker.send(step, {"acc/a": 1.0})
    gate.set()
    with pytest.warns(UserWarning, match=r"mlflow was too slow for \d records"):
        tracker.close()
    assert 3 <= len(slow.got) - 1 < 10 and slow.got[-1] == (0, {})
