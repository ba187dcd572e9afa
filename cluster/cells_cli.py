"""Cells of an ablation one after another in this process; `cluster.ablation.processes` starts it.

What a run of ours takes to start, imports, Ray, engines and learner, is there for the next one.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from cluster.run.kept import keeping


def run_cells(command_line: Callable[[], None], answers: int) -> int:
    """Run what standard input asks for, until it ends or one fails; the exit code of the last.

    A line is one cell, as JSON: `words` of the command line, and `log`, where all that it prints is
    added. `command_line` runs the words that are in `sys.argv`. The exit code of each is written to
    the descriptor `answers`. After one that failed nothing here is as it should be: none follows.
    """
    code = 0
    with keeping():
        while not code and (line := sys.stdin.readline()):
            cell = json.loads(line)
            _print_to(Path(cell["log"]))
            code = _code_of(command_line, cell["words"])
            os.write(answers, f"{code}\n".encode())
    return code


def _print_to(log: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        for standard in (1, 2):
            os.dup2(file.fileno(), standard)


def _code_of(command_line: Callable[[], None], words: list[str]) -> int:
    sys.argv[1:] = words
    try:
        command_line()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0
