"""`python -m cluster` is the `equipoise` command."""

import gc
import os

from cluster.names import require_own_names


def main() -> None:
    """Run the command line, unless a module of the user's would be met in place of one of ours."""
    require_own_names()
    # For this process and the Ray that it starts, read when a library of threads is loaded. Threads
    # that spin while they wait take the core that the awaited one needs: beside other work an
    # update took ten times as long, alone 5 % less (docs/performance.md).
    if not os.environ.get("GOMP_SPINCOUNT"):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Nearly all that imports make stays: a fifth of a start would go into looking at it again.
    gc.set_threshold(50_000, 20, 20)
    from cluster.cli import main as run

    run()


if __name__ == "__main__":
    main()
