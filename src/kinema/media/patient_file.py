"""A file that is written while its disk may be full: a write that finds no space is repeated, and loses nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kinema.errors import StorageFull

# Repeats a call for some time while it raises StorageUnavailable.
Repeat = Callable[[Callable[[], int]], int]
FULL = (errno.ENOSPC, errno.EDQUOT)


class PatientFile:
    """A new file at ``path``, as a muxer writes it. Nothing is kept back, so it may be read beside by its name."""

    def __init__(self, path: Path, repeat: Repeat) -> None:
        """Raises OSError, and StorageFull when ``repeat`` gives up."""
        self.name = str(path)
        self._repeat = repeat
        self._file = repeat(partial(_translated, partial(os.open, path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)))

    def write(self, data: bytes) -> int:
        """Write all of it. Raises as the constructor."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._repeat(partial(_translated, partial(os.write, self._file, rest))) :]
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._file, offset, whence)

    def tell(self) -> int:
        return os.lseek(self._file, 0, os.SEEK_CUR)

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _translated(call: Callable[[], int]) -> int:
    try:
        return call()
    except OSError as exc:
        if exc.errno in FULL:
            raise StorageFull(f"cannot write a temporary file: {exc.strerror}") from exc
        raise
