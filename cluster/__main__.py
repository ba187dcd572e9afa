"""`python -m cluster` is the `equipoise` command."""

from cluster.names import require_own_names

require_own_names()

from cluster.cli import main  # noqa: E402  (else a user's module would be met first)

main()
