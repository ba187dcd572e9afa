"""Stands in for a training: `toy_cell.py RECIPE --output RUN` leaves what a run leaves.

It takes the run of its recipe's name from the folder `TOY_RUNS`, after a wait of chance length, at
most `TOY_SLEEP` seconds. `TOY_FAILS` names cells that end with an error. Standard library only, so
that it starts at once.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
import tomllib
from pathlib import Path

recipe, run = Path(sys.argv[1]), Path(sys.argv[3])
name = tomllib.loads(recipe.read_text())["name"]
made = Path(os.environ["TOY_RUNS"]) / name
run.mkdir(parents=True)  # as a run refuses a folder that holds something
shutil.copy(recipe, run / "recipe.toml")
for folder in ("rollouts", "demonstrations"):
    if (made / folder).exists():
        shutil.copytree(made / folder, run / folder)
longest = float(os.environ.get("TOY_SLEEP", "0.2"))
time.sleep(random.uniform(longest / 2, longest))
if name in os.environ.get("TOY_FAILS", "").split(","):
    print("warming up\nToyError: no luck today", file=sys.stderr)
    raise SystemExit(3)
for file in ("metrics.parquet", "evaluation.json", "versions.json"):
    shutil.copy(made / file, run / file)
