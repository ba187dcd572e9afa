"""What a run needs of the machine, looked at before anything is started."""

from __future__ import annotations

from pathlib import Path

from cluster.config import UserError


def require_free(folder: Path, flag: str) -> None:
    """Raise UserError where a folder to be written already holds something, of whomever."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag} {folder}: already holds something; name a new folder")
