"""The space for request bodies: how much all of them may take together, and where each lies while it comes.

A body of up to a megabyte stays in memory; a larger one lies in a file without a name, which is gone when it is closed
or the process ends, however that happens. What is counted is what has come, not what a client says it will send. Large
bodies are loaded and parsed in turns, so the memory for that is bounded too.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from anyio import CapacityLimiter, to_thread

from kinema.errors import StorageUnavailable
from kinema.server.errors import UploadsFull
from kinema.service.turns import Turns

# A body of this size is parsed in two milliseconds, and every connection has room for one. It is not counted.
SMALL_BYTES = 16 * 1024
# More than this is written to the file, so much at a time.
_IN_MEMORY_BYTES = 2**20
# Bodies that are loaded and parsed: one of 32 MiB takes about 100 MB.
_AT_ONCE = 2
# One client may have this part of the space, so that there is some left for another.
_CLIENT_PART = 1 / 2
# When the disk hangs, only these threads wait for it.
_WRITERS = CapacityLimiter(4)


class Uploads:
    """The space that all bodies share. ``folder`` is where the large ones lie. Belongs to one event loop."""

    def __init__(self, max_bytes: int, folder: Path | None = None) -> None:
        self.turns = Turns(_AT_ONCE)
        self.folder = folder
        self._max_bytes = max_bytes
        self._taken: Counter[str] = Counter()

    def take(self, client: str, num_bytes: int) -> None:
        """Count bytes of this client. Raises UploadsFull when there is no space for them."""
        if self._taken.total() + num_bytes > self._max_bytes:
            raise UploadsFull
        if self._taken[client] + num_bytes > self._max_bytes * _CLIENT_PART:
            raise UploadsFull("your other requests hold as many bytes of bodies as one client may have; try again")
        self._taken[client] += num_bytes

    def give_back(self, client: str, num_bytes: int) -> None:
        self._taken[client] -= num_bytes
        if self._taken[client] <= 0:
            del self._taken[client]


class UploadedBody:
    """The bytes of one body, which are gone at the end of the ``with``."""

    def __init__(self, uploads: Uploads, client: str) -> None:
        self.size_bytes = 0
        self._uploads, self._client = uploads, client
        self._num_taken = 0
        self._memory = bytearray()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _at: TracebackType | None
    ) -> None:
        self._memory.clear()
        if self._file is not None:
            self._file.close()
        self._uploads.give_back(self._client, self._num_taken)

    @property
    def is_small(self) -> bool:
        """Whether to parse it at once."""
        return self.size_bytes <= SMALL_BYTES

    async def append(self, data: bytes) -> None:
        """Add bytes to the end. Raises UploadsFull, and StorageUnavailable when the file cannot be written."""
        more = max(self.size_bytes + len(data) - SMALL_BYTES, 0) - self._num_taken
        self._uploads.take(self._client, more)
        self._num_taken += more
        self.size_bytes += len(data)
        self._memory += data
        if len(self._memory) > _IN_MEMORY_BYTES:
            await to_thread.run_sync(self._write, limiter=_WRITERS)

    def read(self) -> bytes:
        """Return the whole body; blocks when it is large."""
        if self._file is None:
            return bytes(self._memory)
        self._file.seek(0)
        return self._file.read() + self._memory

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._uploads.folder, buffering=0)  # noqa: SIM115
            while self._memory:
                del self._memory[: self._file.write(self._memory)]
        except OSError as exc:
            raise StorageUnavailable(f"the request body cannot be stored: {exc.strerror}") from exc
