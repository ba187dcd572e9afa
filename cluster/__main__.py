"""`python -m cluster` is the `equipoise` command."""

from cluster.names import require_own_names


def main() -> None:
    """Run the command line, unless a module of the user's would be met in place of one of ours."""
    require_own_names()
    from cluster.cli import main as run

    run()


if __name__ == "__main__":
    main()
