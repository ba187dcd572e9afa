"""`python -m cluster` is the `equipoise` command."""

import gc

from cluster.names import require_own_names


def main() -> None:
    """Run the command line, unless a module of the user's would be met in place of one of ours."""
    require_own_names()
    # Nearly all that imports make stays: a fifth of a start would go into looking at it again.
    gc.set_threshold(50_000, 20, 20)
    from cluster.cli import main as run

    run()


if __name__ == "__main__":
    main()
