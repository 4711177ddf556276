"""Calls of storage that are repeated, so that a video waits for storage that is unavailable, and does not fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from kinema.errors import StorageUnavailable

log = structlog.get_logger(__name__)

_FIRST_RETRY_S = 0.25
_LONGEST_RETRY_S = 5.0

T = TypeVar("T")


class StorageRetries:
    """Repeats calls of one generation for some seconds, while storage cannot be reached. They block the thread."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._has_ended = threading.Event()

    def end(self) -> None:
        """End all waits, because nobody wants the video any more: each gets the last error."""
        self._has_ended.set()

    def __call__(self, work: Callable[[], T]) -> T:
        """The result of ``work``. Raises its StorageUnavailable when the time is up, or after ``end``."""
        deadline = time.monotonic() + self._seconds
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                return work()
            except StorageUnavailable as exc:
                if time.monotonic() >= deadline:
                    raise
                log.warning("storage is waited for", reason=exc.message)
                if self._has_ended.wait(retry_s):
                    raise
            retry_s = min(2 * retry_s, _LONGEST_RETRY_S)
