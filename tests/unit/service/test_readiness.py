"""What probes are told of the database and the storage."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from kinema.errors import StorageUnavailable, StoreUnavailable
from kinema.service.readiness import Readiness
from kinema.storage import Storage


class Asked:
    """A database that counts the questions, and answers until it has an ``error``."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.count += 1
        if self.error is not None:
            raise self.error
        return 0


async def test_a_database_that_is_away_is_named() -> None:
    """And one that is back is seen after a second."""
    store = Asked()
    store.error = StoreUnavailable("the job database cannot be used: gone")
    readiness = Readiness(store, Storage("memory://readiness"))
    with pytest.raises(StoreUnavailable, match="gone"):
        await readiness.check()
    await readiness.stop()


async def test_probes_that_ask_together_or_often_cost_one_question() -> None:
    """A good answer is kept for a while."""
    store = Asked()
    readiness = Readiness(store, Storage("memory://readiness"))
    await asyncio.gather(*(readiness.check() for _ in range(20)))
    await readiness.check()
    assert store.count == 1


async def test_a_storage_that_hangs_is_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe has a timeout of its own; one thread hangs, however many probes come."""
    monkeypatch.setattr("kinema.service.readiness._WAIT_S", 0.01)
    storage, may_end, hanging = Storage(f"file://{tmp_path}"), threading.Event(), []

    def hang() -> None:
        hanging.append(threading.current_thread())
        assert may_end.wait(20), "nobody let it end"

    monkeypatch.setattr(storage, "check", hang)
    readiness = Readiness(Asked(), storage)
    for _ in range(3):
        with pytest.raises(StorageUnavailable, match="the storage does not answer"):
            await readiness.check()
    assert len(hanging) == 1
    may_end.set()
    monkeypatch.setattr("kinema.service.readiness._WAIT_S", 20)
    await readiness.check()
