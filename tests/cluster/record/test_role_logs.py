"""What a run's processes print is kept by role: whole, bounded, harmless, without keys."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.record import role_logs
from cluster.record.role_logs import RoleLogs, driver_log
from cluster.record.terminal import Progress

KEY = "planted-3f9d27"


def opened(run: Path, **environment: str) -> RoleLogs:
    logs = RoleLogs(run, environment)
    logs.open()
    return logs


def kept(run: Path, role: str) -> list[str]:
    return (run / "logs" / f"{role}.log").read_text(encoding="utf-8").splitlines()


def test_lines_are_in_their_roles_file_in_order_and_a_new_process_is_told(tmp_path: Path) -> None:
    rng, expected = random.Random(0), dict[str, list[str]]()
    said, speaker = 0, dict[str, str]()
    for life in range(2):
        logs = opened(tmp_path)
        speaker.clear()
        for _ in range(50):
            role, process = rng.choice(("sampler-0", "learner-1")), f"process {rng.randrange(3)}"
            lines = [f"line {(said := said + 1)} of {life}" for _ in range(rng.randrange(4))]
            logs.take(role, process, lines)
            told = [] if speaker.get(role) == process else [f"== {process}"]
            speaker[role] = process
            expected.setdefault(role, []).extend((*told, *lines))
    assert {role: kept(tmp_path, role) for role in expected} == expected
    assert len([*(tmp_path / "logs").iterdir()]) == 2


def test_nothing_is_written_before_the_run_has_its_input(tmp_path: Path) -> None:
    logs = RoleLogs(tmp_path, {})
    logs.take("driver", "process 1", ["3 rows are left out"])
    assert not [*tmp_path.iterdir()]
    logs.open()
    logs.take("driver", "process 1", ["step 1"])
    assert kept(tmp_path, "driver") == ["== process 1", "3 rows are left out", "step 1"]


@pytest.mark.parametrize("batch", [1, 7, 5000])
def test_a_flood_takes_two_files_and_its_end_is_kept(
    tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role_logs, "LIMIT", 10_000)
    logs, lines = opened(tmp_path), [f"line {n:05}" for n in range(5000)]
    for start in range(0, len(lines), batch):
        logs.take("sampler-0", "process 1", lines[start : start + batch])
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["sampler-0.1.log", "sampler-0.log"]
    assert all(file.stat().st_size <= 10_000 for file in files)
    both = [line for name in ("sampler-0.1", "sampler-0") for line in kept(tmp_path, name)]
    assert both == lines[-len(both) :] and len(both) * 11 > 10_000
    again = opened(tmp_path)
    again.take("sampler-0", "process 2", lines[:1000])
    assert sum(file.stat().st_size for file in (tmp_path / "logs").iterdir()) <= 20_000


def test_a_line_without_an_end_is_cut(tmp_path: Path) -> None:
    opened(tmp_path).take("sampler-0", "process 1", ["x" * 10**6])
    _, line = kept(tmp_path, "sampler-0")
    assert line == "x" * role_logs.LINE + " ... 990,000 characters more"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("\x1b[1mstep 3/9\x1b[0m  a 0.5", "step 3/9  a 0.5"),
        ("10%\r50%\r\x1b[2K100%\r", "100%"),
        ("\ud800", "\\ud800"),
        ("a\u202eb", "a\\u202eb"),
        ("a\tb", "a       b"),
        ("ä 数", "ä 数"),
    ],
)
def test_no_line_steers_a_terminal(tmp_path: Path, line: str, told: str) -> None:
    opened(tmp_path).take("sampler-0", "process 1", [line])
    assert kept(tmp_path, "sampler-0") == ["== process 1", told]


def test_keys_of_the_environment_are_replaced_by_their_names(tmp_path: Path) -> None:
    logs = opened(tmp_path, HF_TOKEN=KEY, USER="somebody-long", DB_PASSWORD="pass")
    logs.take("sampler-0", "process 1", [f"Bearer {KEY}, of somebody-long; pass"])
    # A cut must not leave half of one.
    logs.take("sampler-0", "process 1", ["x" * (role_logs.LINE - 3) + KEY])
    assert kept(tmp_path, "sampler-0")[1] == "Bearer <HF_TOKEN>, of somebody-long; pass"
    assert KEY[:3] not in (tmp_path / "logs" / "sampler-0.log").read_text()


def test_no_key_is_hidden_by_colours_nor_by_its_own_line_ends(tmp_path: Path) -> None:
    logs = opened(tmp_path, HF_TOKEN=KEY, A_TOKEN=f"{KEY}-longer", SSH_KEY="begin-3f9\nmiddle-9d2")
    logs.take("sampler-0", "process 1", [f"{KEY[:4]}\x1b[0m{KEY[4:]}", f"{KEY}-longer"])
    logs.take("sampler-0", "process 1", ["begin-3f9", "middle-9d2"])
    assert kept(tmp_path, "sampler-0")[1:] == ["<HF_TOKEN>", "<A_TOKEN>", "<SSH_KEY>", "<SSH_KEY>"]


def test_what_is_printed_as_a_role_leads_nowhere_and_makes_no_flood_of_files(
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    logs = opened(tmp_path / "run")
    names = ["../../etc/x", "/tmp/x", "a/b", "", "..", "x" * 300, "reward-mine.py:score"]
    for role in [*names, *(f"role-{n}" for n in range(2 * role_logs.ROLES))]:
        logs.take(role, "process 1", ["said"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    files = [path.name for path in (tmp_path / "run" / "logs").iterdir()]
    assert role_logs.ROLES <= len(files) <= role_logs.ROLES + 1
    assert {"reward-mine.py-score.log", "others.log"} <= {*files}


def test_a_disk_that_is_full_is_told_once_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = opened(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "logs"))

    monkeypatch.setattr(role_logs, "_append", full)
    for _ in range(3):
        logs.take("sampler-0", "process 1", ["said"])
    assert capsys.readouterr().err.count("no more are kept") == 1


def test_what_the_driver_prints_is_kept_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, progress = opened(tmp_path), Progress(9)
    with driver_log(logs):
        print("to", "stdout")
        print("to stderr", file=sys.stderr)
        progress.say("said")
        print("no end", end="")
    print("after")
    assert kept(tmp_path, "driver")[1:] == ["to stdout", "to stderr", "said"]
    printed = capsys.readouterr()
    assert printed.out == "to stdout\nsaid\nno endafter\n" and printed.err == "to stderr\n"
