"""Temporary folders that do not stay for ever when a process is killed.

The process that makes a folder holds a lock on it. The system releases the lock when the process dies in any way, so a
folder with a free lock belongs to nobody. A process id would not be enough: ids are used again, and containers that
share a folder count them separately.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "kinema-film-"


class ScratchFolder:
    """A private temporary folder at ``path``, until ``remove`` or the end of the process."""

    def __init__(self) -> None:
        """Make and lock the folder. Raises OSError."""
        # It gets its name only when it is locked, so that nobody takes it for an abandoned one before.
        unlocked = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        self._lock = os.open(unlocked, os.O_RDONLY)
        with suppress(OSError):  # where locks do not work, no other process can lock it either
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = unlocked.rename(unlocked.with_name(unlocked.name[1:]))

    def remove(self) -> None:
        """Remove the folder. It may be gone already, or have files that cannot be deleted."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_abandoned() -> int:
    """Remove the folders of dead processes, and return their number."""
    folders = Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")
    return sum(_remove_if_abandoned(folder) for folder in folders)


def _remove_if_abandoned(folder: Path) -> bool:
    """Remove the folder if its lock is free. Another user's folder, and one that is gone, are left alone."""
    with suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            return True
        finally:
            os.close(lock)
    return False
