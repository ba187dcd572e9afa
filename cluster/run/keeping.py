"""Where the policy and its evaluation are kept: in the run folder, or where that takes no more."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.recipe.machine import SHARED, os_error_text
from cluster.recipe.recipe import RunFailed
from learner.actor import LearnerGroup
from tasks.files import put_text

_TAKES_NO_MORE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV),
)


def disk_error(error: BaseException, folder: Path | None = None) -> OSError | None:
    """The error of a disk that takes no more, of this process or of an actor.

    Of what is below `folder` any error of the system is: it may have been removed.
    """
    cause = getattr(error, "cause", None) or error
    if not isinstance(cause, OSError):
        return None
    if cause.errno in _TAKES_NO_MORE:
        return cause
    if folder is None or cause.filename is None:
        return None
    return cause if Path(str(cause.filename)).resolve().is_relative_to(folder.resolve()) else None


class Keeper:
    """Keeps what a run must not lose in its folder, or in another once that takes no more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Where things are kept by now."""
        self._run = folder
        self._wrong: OSError | None = None

    def keep(self, write: Callable[[Path], object]) -> Path:
        """Have `write` write below a folder, which is returned: the first that takes it.

        Raises RunFailed where none does, and what `write` raises that is no error of a disk.
        """
        for folder in self._folders():
            try:
                write(folder)
            except Exception as error:
                if disk_error(error, folder) is None:
                    raise
                self._wrong = self._wrong or disk_error(error, folder)
                if folder != self._run:
                    shutil.rmtree(folder, ignore_errors=True)
            else:
                self.folder = folder
                return folder
        assert self._wrong is not None
        raise RunFailed(f"{os_error_text(self._wrong)}; and no other place took the policy")

    @contextmanager
    def keeping(self, learner: LearnerGroup) -> Iterator[None]:
        """Within, a disk that takes no more ends the run, but not before the policy is kept."""
        try:
            yield
        except Exception as error:
            if disk_error(error, self._run) is None:
                raise
            self._wrong = self._wrong or disk_error(error, self._run)
            self.keep(lambda folder: learner.save(folder / "checkpoint"))
            self.end()

    def end(self) -> None:
        """Raises RunFailed, which names the folder, where the run folder did not take all."""
        if self._wrong is None:
            return
        failure = os_error_text(self._wrong)
        message = f"{failure}; the policy, as far as it was trained, is in {self.folder}"
        with suppress(OSError):
            put_text(self.folder / "error.txt", message + "\n")
        raise RunFailed(message) from self._wrong

    def _folders(self) -> Iterator[Path]:
        yield self.folder
        bases = (tempfile.gettempdir(), str(Path.home()), "/var/tmp", ".", str(SHARED))
        for base in bases:
            with suppress(OSError):
                yield Path(tempfile.mkdtemp(prefix=f"{self._run.name}-", dir=base)).absolute()
