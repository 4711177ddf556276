"""What is kept of a generation while it runs, so that whoever loses it does not begin again.

The bytes are made on the device thread, between two steps, and stored on a thread of their own: the device never waits
for storage, and a checkpoint that cannot be stored costs a line in the log. There is one for each job, the newest.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import structlog

from kinema.engines.base import Step
from kinema.errors import FileGone, StorageUnavailable
from kinema.job import Task
from kinema.storage import Storage, checkpoint_key
from kinema.worker.patience import Patience

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/octet-stream"
# The last step's is written even if the one before is younger than an interval, but not if it is younger than this
# share: decoding has none of its own, and what takes no time need not be kept.
_LAST_STEP_SHARE = 0.1


class Checkpoints:
    """Those of one task, every ``interval_s`` seconds from now on; inf: never.

    ``note`` and ``leave`` are called on the device thread, the rest, which blocks, on any other.
    """

    def __init__(
        self, task: Task, storage: Storage, interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._task = task
        self._key = checkpoint_key(task.job_id)
        self._storage = storage
        self._interval_s = interval_s
        self._clock = clock
        self._newest_at = clock()
        self._thread: threading.Thread | None = None
        self._last: bytes | None = None
        # Whether storage may have one.
        self._is_any = False

    @property
    def is_any(self) -> bool:
        return self._is_any

    def read(self, patience: Patience) -> bytes | None:
        """What an earlier attempt has left; storage that is away is waited for, and then taken to have none."""
        if self._task.attempt == 1 or math.isinf(self._interval_s):
            return None
        self._is_any = True
        try:
            return patience(lambda: b"".join(self._storage.read(self._key)))
        except FileGone:
            self._is_any = False
        except StorageUnavailable as exc:
            log.warning("a checkpoint was not read", job_id=self._task.job_id, reason=exc.message)
        return None

    def note(self, step: Step) -> None:
        """Store the step's checkpoint if it is time for one and the one before is stored."""
        share = _LAST_STEP_SHARE if step.index == step.total else 1.0
        is_due = self._clock() - self._newest_at >= share * self._interval_s
        if is_due and not self._is_storing and (data := self._take(step)) is not None:
            self._newest_at = self._clock()
            self._store(data)

    def leave(self, step: Step) -> None:
        """Make the checkpoint of the last step that is taken here, for ``keep``."""
        self._last = self._take(step)

    def _take(self, step: Step) -> bytes | None:
        """None when there is none. Never raises: the video may well be made without it."""
        if step.checkpoint is None or math.isinf(self._interval_s):
            return None
        try:
            return step.checkpoint()
        except Exception as exc:
            log.warning("a checkpoint was not made", job_id=self._task.job_id, step=step.index, exc_info=exc)
            return None

    def keep(self, within_s: float) -> None:
        """Store what ``leave`` made, behind the one that is being stored; wait for that no longer than so."""
        until = time.monotonic() + within_s
        self._join(within_s)
        if self._last is not None and not self._is_storing:
            self._store(self._last)
            self._join(max(until - time.monotonic(), 0))

    def remove(self) -> None:
        """When the job has ended."""
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
        # A daemon, so that storage that never answers does not hold a process that ends.
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
