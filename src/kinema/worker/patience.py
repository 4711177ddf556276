"""Storage that is away for a moment costs a wait, not a video."""

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


class Patience:
    """One generation's: calls are made again while storage cannot be reached. They block, on whatever thread."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._has_ended = threading.Event()

    def end(self) -> None:
        """Nobody wants the video any more: whoever waits gets the last error."""
        self._has_ended.set()

    def __call__(self, work: Callable[[], T]) -> T:
        """What ``work`` gives. Raises StorageUnavailable as it did, once the time is up or the patience has ended."""
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
