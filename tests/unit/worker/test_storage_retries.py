"""How long a worker waits for storage that is away."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kinema.errors import FileGone, StorageUnavailable
from kinema.worker import storage_retries
from kinema.worker.storage_retries import StorageRetries


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_retries, "_FIRST_RETRY_S", 0.001)


class Away:
    """Storage that fails a number of times, and then works."""

    def __init__(self, times: float) -> None:
        self.calls = 0
        self._times = times

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self._times:
            raise StorageUnavailable(f"away, {self.calls}")
        return "stored"


def test_storage_that_comes_back_is_waited_for() -> None:
    """However often it fails until then."""
    storage = Away(5)
    assert StorageRetries(60)(storage) == "stored"
    assert storage.calls == 6


def test_retries_are_over_when_their_time_is() -> None:
    """The error is the storage's own."""
    with pytest.raises(StorageUnavailable, match="away, 1"):
        StorageRetries(0)(Away(1))


def test_only_storage_that_is_away_is_waited_for() -> None:
    """A file that is gone does not come back."""
    answers: Iterator[BaseException] = iter([FileGone()])

    def read() -> None:
        raise next(answers)

    with pytest.raises(FileGone):
        StorageRetries(60)(read)


def test_who_does_not_want_the_video_any_more_does_not_wait() -> None:
    """The wait that is under way ends, and no other begins."""
    retries = StorageRetries(3600)
    storage = Away(float("inf"))
    failed: list[StorageUnavailable] = []

    def wait() -> None:
        try:
            retries(storage)
        except StorageUnavailable as exc:
            failed.append(exc)

    waiting = threading.Thread(target=wait)
    waiting.start()
    retries.end()
    waiting.join(timeout=20)
    assert len(failed) == 1
    with pytest.raises(StorageUnavailable):
        retries(storage)
