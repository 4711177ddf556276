"""Keeps the state of a generation while it runs, so that another worker can continue it after a loss.

The bytes are made on the device thread between two steps, and stored on another thread. So the device never waits for
storage, and a checkpoint that cannot be stored costs only a line in the log. Each job has one checkpoint, the newest.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import structlog

from kinema.engines.base import Step
from kinema.engines.failures import release_frames
from kinema.errors import FileGone, StorageUnavailable
from kinema.job import Task
from kinema.storage import Storage, checkpoint_key
from kinema.worker.storage_retries import StorageRetries

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/octet-stream"
# The checkpoint of the last step is also made before the interval is over, but not before this share of it. Decoding
# has no checkpoints of its own. A video of few steps needs none: the device waits while one is made, and that of 81
# frames of 832x480 (34 MB) takes 60 ms.
_LAST_STEP_SHARE = 0.25
# What a checkpoint may have for each pixel of each frame, and besides. Latents of a published model have six bytes at
# most with all that a solver and a step cache remember; a larger file is none of ours.
_MAX_BYTES_PER_PIXEL, _MAX_OTHER_BYTES = 16, 2**20


class Checkpoints:
    """The checkpoints of one task, every ``interval_s`` seconds from now on (inf: never).

    ``note`` and ``leave`` are called on the device thread. The other methods block, and are called on any other thread.
    """

    def __init__(
        self, task: Task, storage: Storage, interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._task = task
        self._key = checkpoint_key(task.job_id)
        self._storage = storage
        request = task.request
        self._max_bytes = request.width * request.height * request.num_frames * _MAX_BYTES_PER_PIXEL + _MAX_OTHER_BYTES
        self._interval_s = interval_s
        self._clock = clock
        self._newest_at = clock()
        self._thread: threading.Thread | None = None
        self._last: bytes | None = None
        # Whether storage may have a checkpoint of this job.
        self._is_any = False

    @property
    def is_any(self) -> bool:
        return self._is_any

    def read(self, retries: StorageRetries) -> bytes | None:
        """The checkpoint of an earlier attempt, or None. Waits for storage; if it stays unavailable, or has a file that
        is too large for the request, there is none."""
        if self._task.attempt == 1 or math.isinf(self._interval_s):
            return None
        self._is_any = True
        try:
            return retries(self._read)
        except FileGone:
            self._is_any = False
        except StorageUnavailable as exc:
            log.warning("a checkpoint was not read", job_id=self._task.job_id, reason=exc.message)
        return None

    def _read(self) -> bytes | None:
        chunks: list[bytes] = []
        size_bytes = 0
        for chunk in self._storage.read(self._key):
            size_bytes += len(chunk)
            if not self._fits(size_bytes):
                return None
            chunks.append(chunk)
        return b"".join(chunks)

    def _fits(self, size_bytes: int) -> bool:
        if size_bytes > self._max_bytes:
            log.warning("a checkpoint is too large", job_id=self._task.job_id, max_bytes=self._max_bytes)
            return False
        return True

    def note(self, step: Step) -> None:
        """Store the step's checkpoint if it is time for one and the checkpoint before it is stored."""
        share = _LAST_STEP_SHARE if step.index == step.total else 1.0
        is_due = self._clock() - self._newest_at >= share * self._interval_s
        if is_due and not self._is_storing and (data := self._take(step)) is not None:
            self._newest_at = self._clock()
            self._store(data)

    def leave(self, step: Step) -> None:
        """Make the checkpoint of the last step that this worker takes, for ``keep``."""
        self._last = self._take(step)

    def _take(self, step: Step) -> bytes | None:
        """Make a checkpoint; None when that fails. Never raises: the video can be made without it."""
        if step.checkpoint is None or math.isinf(self._interval_s):
            return None
        try:
            data = step.checkpoint()
            return data if self._fits(len(data)) else None
        except Exception as exc:
            log.warning("a checkpoint was not made", job_id=self._task.job_id, step=step.index, exc_info=exc)
            release_frames(exc)
            return None

    def keep(self, within_s: float) -> None:
        """Store the checkpoint of ``leave`` after the one that is being stored. Waits no longer than the given time."""
        until = time.monotonic() + within_s
        self._join(within_s)
        if self._last is not None and not self._is_storing:
            self._store(self._last)
            self._join(max(until - time.monotonic(), 0))

    def remove(self) -> None:
        """Remove the checkpoint when the job has ended."""
        self._join()
        if not self._is_any:
            return
        try:
            self._storage.delete(self._key)
            self._is_any = False
        except StorageUnavailable as exc:
            log.warning("a checkpoint was left in storage", job_id=self._task.job_id, reason=exc.message)

    @property
    def _is_storing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _store(self, data: bytes) -> None:
        self._is_any = True
        # A daemon, so that storage that never answers does not keep the process from ending.
        self._thread = threading.Thread(target=self._put, args=(data,), name="checkpoint", daemon=True)
        self._thread.start()

    def _put(self, data: bytes) -> None:
        try:
            self._storage.put_bytes(self._key, data, MEDIA_TYPE)
        except StorageUnavailable as exc:
            log.warning("a checkpoint was not stored", job_id=self._task.job_id, reason=exc.message)

    def _join(self, timeout_s: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)
