"""Extensions that DeepSpeed has torch compile: a build whose builder died holds nobody up.

DeepSpeed compiles its CPU communication once a machine, which takes a minute or two. torch guards
the build by a file that only its maker removes, and waits for it in silence and without end. Here
a builder also holds an flock beside it, which the system lets go of when its process ends.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

from torch.utils import cpp_extension, file_baton

FOREIGN_SECONDS = 900.0
"""How long a lock without our flock is believed in, as another program's that compiles here too."""
SILENT_SECONDS = 2.0
"""How long another's build is waited for without a word; one that is done takes less."""


class HeldBaton(file_baton.FileBaton):
    """torch's lock on a build folder, and beside it an flock for as long as the builder lives."""

    def try_acquire(self) -> bool:
        """Return, with True, once nobody else builds; says in a line for whom it waits.

        The build is then ours: what another has built by then, ninja leaves as it is.
        """
        folder, start, announced = Path(self.lock_file_path).parent, time.monotonic(), False
        while not self._acquired():
            if not announced and time.monotonic() - start > SILENT_SECONDS:
                announced = True
                line = f"waiting for another process to compile {folder.name} in {folder}"
                print(line, file=sys.stderr, flush=True)
            time.sleep(self.wait_seconds)
        return True

    def release(self) -> None:
        """Let others build."""
        super().release()
        os.ftruncate(self._lock_fd, 0)
        os.close(self._lock_fd)

    def _acquired(self) -> bool:
        """Whether both locks are ours now; what a builder that died left is removed at once."""
        lock_fd = os.open(f"{self.lock_file_path}.held", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            return False
        if os.read(lock_fd, 1) or self._is_old():
            Path(self.lock_file_path).unlink(missing_ok=True)
        if not super().try_acquire():
            os.close(lock_fd)
            return False
        os.pwrite(lock_fd, b"building", 0)
        self._lock_fd = lock_fd
        return True

    def _is_old(self) -> bool:
        try:
            return time.time() - os.stat(self.lock_file_path).st_mtime > FOREIGN_SECONDS
        except FileNotFoundError:
            return False


def watch_builds() -> None:
    """Have the builds of this process wait for living builders only, and be given up with it."""
    cpp_extension.FileBaton = HeldBaton  # type: ignore[misc]
