"""What does a policy of a real size cost here? Qwen3-VL in the shape of its 2 B, random weights.

    python -m benchmarks.real_size                  # 2 B; about 18 GB of memory, 5 GB of disk
    python -m benchmarks.real_size --layers 2       # the same with fewer layers, to try it

RL with adapters (two steps of two groups, a transfer after each, held-out problems before and
after), then `eval`, then SFT with adapters, each as its command line; seconds and the largest
resident memory of each phase, by process. The tokenizer is the tiny one's with as many further
tokens as the real one has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import machine, tables
from benchmarks.memory_that_fits import configs

NAME = "Qwen/Qwen3-VL-2B-Instruct"
VOCABULARY = 151_669
KEYS = ("command line", "phase")
KNOBS = ("size=4", "blanks=6", "cell_size=16", "font_size=12", "margin=0", "prompt=brief")
ROLES = {
    "sampler": "ray::Sampler",
    "learner": "ray::LearnerRank",
    "reward worker": "ray::RewardWorker",
}
RECIPE = """
name = "real-size"
seed = 0

[model]
path = "{model}"
dtype = "bfloat16"
max_model_len = 512

[[tasks]]
name = "sudoku"
knobs = {{ size = 4, blanks = 6, cell_size = 16, font_size = 12, margin = 0, prompt = "brief" }}

[sampler]
max_tokens = 24
max_num_seqs = 16
threads = 2
kv_cache_gib = 0.5
start_timeout_seconds = 1800
request_timeout_seconds = 3600
heartbeat_seconds = 900

[reward]
terms = [{{ name = "benchmarks.race_work:Score" }}]

[algorithm]
group_size = 4
problems_per_step = 2
steps = 2

[learner]
learning_rate = 1e-4
threads = 2
layout = "packed"
activation_checkpointing = true
micro_batch_tokens = 1024
lora = {{ rank = 16 }}

[transfer]
deadline_seconds = 1800

[sft]
steps = 2
batch_size = 4
learning_rate = 1e-4

[eval]
problems = 8
passes = ["greedy"]
"""
MARKS = (
    (r"^starting ", "what is asked before anything starts"),
    (r"^all up after", "start of Ray, engine and learner"),
    (r"^step 1/", "first transfer, 8 problems, step 1"),
    (r"^step 2/", "step 2: two groups, an update, a transfer"),
    (r"^sft \d+/", "start and two updates"),
)
"""What a command prints at the end of a phase, and the phase's name."""


def write_policy(folder: Path, layers: int | None) -> int:
    """A checkpoint of the real shape with random weights; its parameters."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

    from learner.families import TINY
    from learner.families.base import TINY_TOWER
    from learner.tiny import make_tiny

    config: Any = configs()[NAME]
    with tempfile.TemporaryDirectory() as scratch:
        tiny = Path(scratch) / "tiny"
        make_tiny("qwen3_vl", tiny)
        template = (tiny / "chat_template.jinja").read_text(encoding="utf-8")
        words = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))
        known = words["model"]["vocab"]
        first = max(max(known.values()), *(t["id"] for t in words["added_tokens"])) + 1
        known |= {f"filler{n}": n for n in range(first, VOCABULARY)}
        (tiny / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(tiny)
    text, vision = config.text_config, config.vision_config
    text.vocab_size = len(tokenizer)
    text.eos_token_id, text.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if layers is not None:
        text.num_hidden_layers, text.layer_types = layers, ["full_attention"] * layers
    for field, token in {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }.items():
        setattr(config, field, tokenizer.convert_tokens_to_ids(token))
    tower = replace(TINY_TOWER, patch=vision.patch_size, merge=vision.spatial_merge_size)
    TINY["qwen3_vl"].new_processor(tokenizer, template, tower).save_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


class Watched:
    """A command, its output, and the memory of its processes once a second."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.began = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self.memory: list[tuple[float, dict[str, float]]] = []
        with log.open("w", encoding="utf-8") as out:
            command = [sys.executable, "-m", "cluster", *arguments]
            process = subprocess.Popen(
                command,
                cwd=tables.ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            watcher = threading.Thread(target=self._watch, args=[process.pid], daemon=True)
            watcher.start()
            assert process.stdout is not None
            for line in process.stdout:
                self.lines.append((time.monotonic() - self.began, line.rstrip()))
                out.write(line)
                out.flush()
        if process.wait() != 0:
            raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}: see {log}")
        self.seconds = time.monotonic() - self.began

    def _watch(self, pid: int) -> None:
        while psutil.pid_exists(pid):
            held = dict.fromkeys((*ROLES, "others"), 0.0)
            for process in machine.tree([pid]):
                try:
                    title, size = " ".join(process.cmdline()), process.memory_info().rss
                except psutil.Error:
                    continue
                role = next((r for r, word in ROLES.items() if word in title), "others")
                held[role] += size / 2**30
            self.memory.append((time.monotonic() - self.began, held))
            time.sleep(1.0)

    def phases(self) -> Iterator[tuple[str, float, dict[str, float]]]:
        """Name, seconds, and the most that each role held, GiB."""
        begun = 0.0
        for at, line in self.lines:
            for pattern, name in MARKS:
                if re.match(pattern, line):
                    yield name, at - begun, self._most(begun, at)
                    begun = at
        yield "the rest", self.seconds - begun, self._most(begun, self.seconds)

    def _most(self, begin: float, end: float) -> dict[str, float]:
        during = [held for at, held in self.memory if begin <= at <= end] or [{"others": 0.0}]
        return max(during, key=lambda held: sum(held.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, help="of the language model, instead of its 28")
    parser.add_argument("--work", type=Path, help="a folder to work in; it stays")
    parser.add_argument("--only", nargs="+", default=["train", "eval", "sft"])
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    parser.add_argument("--busy-ok", action="store_true", help="run beside other work all the same")
    given = parser.parse_args()
    machine.refuse_if_busy(given.busy_ok)
    folder = given.work or Path(tempfile.mkdtemp(prefix="real-size-"))
    model = folder / "model"
    began = time.monotonic()
    if not (model / "config.json").exists():
        print(f"{write_policy(model, given.layers):,} parameters", flush=True)
    print(f"made in {time.monotonic() - began:.0f} s", flush=True)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model), encoding="utf-8")
    os.environ["HF_HUB_OFFLINE"] = "1"
    commands = {
        "train": ["train", str(recipe), "--output", str(folder / "train")],
        "eval": [
            *("eval", str(folder / "train" / "checkpoint"), "--recipe", str(recipe)),
            *("--task", "sudoku", "--problems", "8"),
            *(word for knob in KNOBS for word in ("--set", knob)),
        ],
        "sft": ["sft", str(recipe), "--output", str(folder / "sft")],
    }
    rows: list[tables.Row] = []
    for name in given.only:
        shutil.rmtree(folder / name, ignore_errors=True)
        ran = Watched(commands[name], folder / f"{name}.log")
        for phase, seconds, held in ran.phases():
            rows.append(
                {
                    "command line": name,
                    "phase": phase,
                    "seconds": f"{seconds:.0f}",
                    "resident, GiB": f"{sum(held.values()):.1f}",
                    **{f"{role}, GiB": f"{size:.1f}" for role, size in held.items()},
                    "machine": machine.where(),
                    "command": machine.command("benchmarks.real_size"),
                }
            )
            print(rows[-1]["command line"], phase, f"{seconds:.0f} s", held, flush=True)
    tables.keep("real_size", KEYS, rows, given.to)
    if given.work is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
