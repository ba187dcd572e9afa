"""Whether a module of the user's own would be loaded in place of one of ours; nothing is imported.

A recipe's `module:Class` is found from the working folder, in every process, and so would be a
`rewards.py` there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

OWN = ("tasks", "rollout", "rewards", "learner", "cluster")
NEEDED = ("ray", "torch", "vllm", "deepspeed", "transformers", "tokenizers", "datasets", "numpy",
          "pyarrow", "pydantic", "PIL", "safetensors", "networkx", "typer", "rich")  # fmt: skip
"""What a file of the working folder must not stand in for either."""


def other_than_ours(folder: str, path: Sequence[str]) -> str:
    """What `folder`, searched before `path`, would have loaded in place of ours; "" for nothing."""
    root = Path(__file__).resolve().parent.parent
    if Path(folder).resolve() == root:
        return ""
    for name in OWN:
        spec = PathFinder.find_spec(name, [folder, *path])
        for location in (spec.submodule_search_locations or [spec.origin or ""]) if spec else ():
            if Path(location).resolve().parent != root:
                return location
    for name in NEEDED:
        spec = PathFinder.find_spec(name, [folder])
        if spec is not None and spec.origin:
            return spec.origin
    return ""


def require_own_names() -> None:
    """End the process with exit code 2, and one line, where `other_than_ours` finds something."""
    if intruder := other_than_ours(os.getcwd(), sys.path):
        print(
            f"{intruder}: has the name of a module that Equipoise is made of, and would be loaded "
            "in its place; rename it, or run from another folder",
            file=sys.stderr,
        )
        raise SystemExit(2)
