"""`python -m cluster` is the `equipoise` command."""

from cluster.cli import main

main()
