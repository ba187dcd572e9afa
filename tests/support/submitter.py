"""`python -m tests.support.submitter ADDRESS`: a user at a cluster's head, from any other folder.

What stands for Python on the head is a script that tells what it was given, ends by SIGTERM as a
run does, and goes on: no engine is started. Of `status`, and of the last job, it is our program
itself. Prints as JSON the exit code and words of each command.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support.ray_heads import environment
from tests.support.recipes import ROOT, SMALL, recipe_file

Said = dict[str, tuple[int, str]]
WANTED, PLANTED = "wanted-5d1c", "planted-9f3e"
STAND_IN = """#!/bin/sh
case "$*" in *" status "*) exec $REAL "$@";; esac
echo "words: $*"; find . -name '*.py' | sort | head -400; cat data.txt
env | grep -E 'WANTED|PLANTED|STOP'
case "$*" in *--resume*) echo "going on"; exit 0;; esac
trap 'echo "checkpoint written"; exit 0' TERM
printf 'training \\033[31m\\n'
while :; do sleep 0.1; done
"""
OWN = """import os
import cluster
from tasks.sudoku import Sudoku
class Own(Sudoku):
    name = "mine:Own"
print("code that travelled:", cluster.__file__.startswith(os.getcwd()))
"""


def submitted(address: str, folder: Path) -> Said:
    """What a user's commands said in `folder`, which is made."""
    folder.mkdir()
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    (folder / "mine.py").write_text(OWN)
    (folder / "data.txt").write_text("the small data\n")
    (folder / ".env").write_text(PLANTED)
    (folder / ".gitignore").write_text("*\n")
    recipe_file(folder, tasks=f'{{ name = "mine:Own", knobs = {{ {SMALL} }} }}')
    told = environment(WANTED=WANTED, PLANTED=PLANTED, PYTHONPATH=str(ROOT))
    user = [sys.executable, "-m", "tests.support.submitter", address]
    done = subprocess.run(user, cwd=folder, env=told, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    found: Said = {name: (code, words) for name, (code, words) in answers.items()}
    stranger = {k: v for k, v in told.items() if not k.startswith("RAY_AUTH")}
    asked = [sys.executable, "-m", "cluster", "jobs", "--address", address]
    done = subprocess.run(
        asked,
        cwd=folder,
        env=stranger | {"HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return found | {"no token": (done.returncode, done.stdout + done.stderr)}


def said(*words: str) -> tuple[int, str]:
    """Exit code and output of a command, in this process."""
    from cluster.cli import main

    sys.argv[1:] = words
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue()


def session(address: str) -> Said:
    """The commands, one after the other."""
    from cluster.recipe.recipe import load_recipe, resolved_toml
    from cluster.record.tracker import Tracker

    os.environ["RAY_ADDRESS"] = "127.0.0.1:1"  # `--address` is what counts
    at = ("--address", address)
    stand_in = f"job.python={Path('python').resolve()}"
    told = ("--set", stand_in, "--set", f"job.runtime_env={{env_vars={{REAL='{sys.executable}'}}}}")
    output = str(Path("run").resolve())
    asked = ("--env", "WANTED", "--include", "data.txt", "--name", "job", "--output", output)
    found = {"submit": said("submit", "x.toml", *at, *asked, "--detach", *told)}
    deadline = time.monotonic() + 200
    while "training" not in said("logs", "job", *at)[1] and time.monotonic() < deadline:
        time.sleep(0.3)
    found["busy"] = said("resume", "job", *at)
    found["jobs"] = said("jobs", *at)
    with Tracker(Path(output), resolved_toml(load_recipe(Path("x.toml")))) as tracker:
        tracker.log(3, {"time/step": 1.0})
    found["status"] = said("status", "job", *at)
    found["unknown"] = said("stop", "jop", *at)
    found["stop"] = said("stop", "job", *at)
    found["logs"] = said("logs", "job", *at)
    found["resume"] = said("resume", "job", *at, "--set", "algorithm.steps=9")
    python = f"job.python={sys.executable}"
    found["real"] = said("submit", "x.toml", *at, "--output", f"{output}-2", "--set", python)
    found["over"] = said("jobs", *at)
    return found


if __name__ == "__main__":
    print(json.dumps(session(sys.argv[1])))
