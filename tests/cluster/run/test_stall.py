"""A driver that waits in vain is told of and, where its recipe says so, ended; no Ray is needed.

The stacks of a live run's actors are in `test_faults.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cluster.record.events import read_events
from cluster.run.stall import STUCK
from tests.support.recipes import ROOT

DRIVER = """
import sys, threading, time
from pathlib import Path
import cluster.run.stall as stall
from cluster.recipe.sections import WatchConfig
from cluster.record.events import read_events
from tasks.liveness import beat
stall._of_actors = lambda: iter([("LearnerRank, process 7", "waits for a peer")])
stall.LEAVE_SECONDS = 1.0
run, ever = Path(sys.argv[1]), threading.Event()

def waits_in_vain():
    ever.wait()

def stubborn():
    try:
        ever.wait()
    except stall.Stalled:
        ever.wait()

def warned():
    while not read_events(run / "warned"):
        time.sleep(0.1)
    time.sleep(1.0)  # of one silence it is told once

def busy():
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        beat()
        time.sleep(0.01)

for on_stall, does in (("stop", busy), ("warn", warned), ("stop", waits_in_vain),
                       ("stop", stubborn)):
    folder = run / does.__name__
    folder.mkdir()
    try:
        with stall.watched(WatchConfig(stall_seconds=0.5, on_stall=on_stall), folder, print):
            does()
        print(does.__name__, "went on")
    except stall.Stalled as error:
        print(does.__name__, "raised", error)
    sys.stdout.flush()
"""


def test_who_waits_in_vain_is_told_of_and_ended_where_the_recipe_says_so(tmp_path: Path) -> None:
    """The last of the four does not end when told: it is ended, so that it is started again."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == STUCK, done.stderr
    events = {
        folder.name: [event.what for event in read_events(folder)] for folder in tmp_path.iterdir()
    }
    assert events == {
        "busy": [],
        "warned": ["stalled"],
        "waits_in_vain": ["stalled"],
        "stubborn": ["stalled", "failed"],
    }
    assert not (tmp_path / "busy" / "stacks").exists()
    (file,) = (tmp_path / "waits_in_vain" / "stacks").iterdir()
    why = "no actor answered for 0.5 s (watch.stall_seconds); stacks: "
    for line in ("busy went on", "warned went on", f"waits_in_vain raised {why}{file}"):
        assert f"{line}\n" in done.stdout
    assert done.stdout.count("warning: no actor") == 3
    told = file.read_text()
    assert "== driver\n" in told and "in waits_in_vain" in told
    assert told.endswith("\n== LearnerRank, process 7\nwaits for a peer\n")
