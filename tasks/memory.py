"""A limit on what a process may allocate, for code that is a user's own."""

from __future__ import annotations

import resource


def limit_memory(gib: float) -> None:
    """Let this process allocate `gib` more than it holds now; past that it gets a MemoryError.

    The limit is on private writable memory (RLIMIT_DATA): Ray's shared object store is not in it.
    """
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[5]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = resident + int(gib * 2**30)
    # A machine's own limit may be lower already, and only root could raise it.
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
