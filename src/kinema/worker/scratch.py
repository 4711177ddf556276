"""Temporary folders that a killed process does not leave for good.

The process that makes one holds a lock on it. The system lets go of a lock when its holder dies, however it dies, so
a folder whose lock is free is nobody's. Process ids would not say as much: they are used again, and containers that
share a folder count them anew.
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
        """Raises OSError."""
        # It gets its name when it is locked: until then nobody may take it for an abandoned one.
        unlocked = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        self._lock = os.open(unlocked, os.O_RDONLY)
        with suppress(OSError):  # where nothing can be locked, nobody else can lock it either
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = unlocked.rename(unlocked.with_name(unlocked.name[1:]))

    def remove(self) -> None:
        """Also when it is gone already, or not everything can be deleted."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_abandoned() -> int:
    """Remove the folders of processes that have died; how many there were."""
    folders = Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")
    return sum(_remove_if_abandoned(folder) for folder in folders)


def _remove_if_abandoned(folder: Path) -> bool:
    """What is another user's, no folder or gone meanwhile is left alone."""
    with suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            return True
        finally:
            os.close(lock)
    return False
