"""``kinema jobs prune``: what it tells, and that it does nothing without ``--yes``."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner, Result

from kinema.cli.app import app
from kinema.events import Failed
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from tests.serving import make_job

Prune = Callable[..., Result]


@pytest.fixture
def prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prune]:
    """Runs the command in a folder of its own, and leaves the process as it was."""
    monkeypatch.chdir(tmp_path)
    logging, umask = structlog.get_config(), os.umask(0o022)
    yield lambda *arguments: CliRunner().invoke(app, ["jobs", "prune", *arguments, "--data-dir", str(tmp_path / "d")])
    structlog.configure(**logging)
    os.umask(umask)


def fail_some(folder: Path, *hours: float) -> None:
    """Jobs that failed so many hours ago."""

    async def fail(ago_h: float) -> None:
        store = await SqlJobStore.open(f"sqlite:///{folder}/d/kinema.db", lambda: time.time() - ago_h * 3600)
        job = await store.create(make_job(), limits=QueueLimits())
        await store.record(job.id, Failed(code="c", message="m"))
        await store.close()

    for ago_h in hours:
        asyncio.run(fail(ago_h))


def test_it_counts_and_then_removes(prune: Prune, tmp_path: Path) -> None:
    """A line for each status, for programs; what it did is for people."""
    fail_some(tmp_path, 1, 47, 49, 50)
    told = prune("--older-than", "2d")
    assert (told.stdout, told.exit_code) == ("failed\t2\n", 0)
    assert "nothing was removed" in told.stderr
    assert prune("--older-than", "2d", "--status", "completed", "--yes").stdout == ""
    removed = prune("--older-than", "48h", "--status", "failed", "--status", "cancelled", "--yes")
    assert removed.stdout == told.stdout
    assert "2 videos that ended more than 48h ago: removed" in removed.stderr
    assert prune("--older-than", "48h").stdout == ""
    assert prune("--older-than", "1m").stdout == "failed\t2\n"


@pytest.mark.parametrize("time", ["", "0h", "-1d", "30", "1y", "nan", "1e9d", "1 d", "٣d"])
def test_what_is_no_time_is_refused(prune: Prune, tmp_path: Path, time: str) -> None:
    """With what is accepted; nothing is removed."""
    fail_some(tmp_path, 100)
    refused = prune("--older-than", time, "--yes")
    assert refused.exit_code == 2
    assert "90m, 36h, 30d or 8w" in refused.stderr
    assert prune("--older-than", "1m").stdout == "failed\t1\n"


def test_a_status_that_is_no_end_is_refused(prune: Prune, tmp_path: Path) -> None:
    """A job that has not ended is never pruned."""
    fail_some(tmp_path, 1)
    assert prune("--older-than", "1m", "--status", "queued", "--yes").exit_code == 2


def test_a_database_that_is_not_there_is_refused(prune: Prune, tmp_path: Path) -> None:
    """Nothing is made."""
    refused = prune("--older-than", "1d")
    assert refused.exit_code == 2
    assert "there is no database" in refused.stderr
    assert not (tmp_path / "d").exists()
