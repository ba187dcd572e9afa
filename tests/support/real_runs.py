"""Runs on real parts in processes of their own: the recipe's head, start, wait, end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY_SUDOKU = """
name = "tiny"
seed = 3

[model]
path = "{model}"
max_model_len = 192

[[tasks]]
name = "sudoku"
[tasks.knobs]
size = 4
blanks = 8
cell_size = 16
font_size = 12
margin = 0
prompt = "brief"
"""
"""How a recipe for a tiny policy starts, whose responses are a few dozen tokens."""


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`equipoise` with these arguments, what it prints in `log`."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "cluster", *arguments]
    with log.open("w") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )


def wait_for(there: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 900
    while not there():
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
