"""What of a run stands open: ports that its processes listen on, who gets in, words in files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.ray_heads import environment

ASK = """
import sys
from ray._raylet import GcsClient
print("nodes:", len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)))
"""


def listening(processes: Iterable[psutil.Process]) -> set[str]:
    """Addresses on which they take connections."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):  # it ended meanwhile
            connections = process.net_connections("inet")
            found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def guests(address: str, token: str) -> dict[str, tuple[bool, str]]:
    """Whether a Ray answers, by what the guest has to show; and what it was told.

    None of them has the home of the user whose Ray it is.
    """
    told = {
        "nothing": {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""},
        "another token": {"RAY_AUTH_TOKEN": "0" * 64},
        "its token": {"RAY_AUTH_TOKEN": token},
    }
    asked = {
        name: subprocess.Popen(
            [sys.executable, "-c", ASK, address],
            env=environment(**variables, HOME="/nonexistent"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, variables in told.items()
    }
    found = {}
    for name, process in asked.items():
        words, _ = process.communicate(timeout=200)
        found[name] = ("nodes: 1" in words, words)
    return found


def with_words(folder: Path, *words: str) -> dict[str, list[str]]:
    """word -> files below `folder` in which it is; tables are looked through as read."""
    found: dict[str, list[str]] = {word: [] for word in words}
    for file in folder.rglob("*"):
        if not file.is_file() or file.is_symlink():
            continue
        with suppress(FileNotFoundError):
            held = file.read_bytes()
            if file.suffix == ".parquet":
                with suppress(pa.ArrowInvalid):
                    held += repr(pq.read_table(file).to_pydict()).encode()
            for word in words:
                if word.encode() in held or word in file.name:
                    found[word].append(str(file.relative_to(folder)))
    return found


def ray_of(processes: Iterable[psutil.Process]) -> tuple[str, str, Path]:
    """A Ray's address, its token and the folder of its session, as its raylet was told them."""
    for process in processes:
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if "/raylet/raylet " in words:
                address = re.search(r"--gcs-address=(\S+)", words)
                session = re.search(r"--session_dir=(\S+)", words)
                assert address and session, words
                token = process.environ().get("RAY_AUTH_TOKEN", "")
                return address[1], token, Path(session[1])
    raise AssertionError("no raylet")
