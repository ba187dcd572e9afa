"""What a machine has: cores this process may use, memory, GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator as the driver reports it; `memory` in bytes."""

    name: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """What there is to place on: cores this process may use, bytes of memory, GPUs.

    bfloat16: whether the processor multiplies it (AVX512-BF16, AMX); on others it is slower than
    float32.
    """

    cores: int
    memory: int
    gpus: tuple[Gpu, ...] = ()
    bfloat16: bool = False

    @classmethod
    def detect(cls) -> Machine:
        """This machine, within its container's limits and `CUDA_VISIBLE_DEVICES`."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        quota = _first_line("/sys/fs/cgroup/cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit():
            cores = min(cores or 1, max(1, int(quota[0]) // int(quota[1])))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = _first_line("/sys/fs/cgroup/memory.max")
        if limit.isdigit():
            memory = min(memory, int(limit))
        return cls(cores or 1, memory, _detect_gpus(), _multiplies_bfloat16())


def gib(size: float) -> str:
    """A size in GiB, or MiB where it is small, as text."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def _detect_gpus() -> tuple[Gpu, ...]:
    """GPUs that `nvidia-smi` lists and `CUDA_VISIBLE_DEVICES` leaves visible."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return ()  # the tool is there and no working device behind it
    rows = [line.rsplit(",", 1) for line in out.splitlines() if "," in line]
    gpus = [Gpu(name.strip(), int(mib) * 2**20) for name, mib in rows if mib.strip().isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(gpus)
    chosen = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    return tuple(gpus[: len(chosen)])


def _multiplies_bfloat16() -> bool:
    """Whether the kernel lists the processor's instructions for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def _first_line(path: str) -> str:
    """First line of a file of the kernel's, "" where there is none."""
    try:
        return Path(path).read_text().split("\n")[0]
    except OSError:
        return ""
