"""``kinema storage``: what it tells, and that it does nothing without ``--yes``."""

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
from kinema.ids import JobId, new_job_id
from kinema.jobs.sql import SqlJobStore
from kinema.storage import OWNER_KEY, Storage, image_key, input_key, video_key

INPUT = input_key(f"{'a' * 64}-{'b' * 16}")
Here = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """Runs a command in a folder of its own, and leaves the process as it was."""
    monkeypatch.chdir(tmp_path)
    logging, umask = structlog.get_config(), os.umask(0o022)
    yield lambda *arguments: CliRunner().invoke(app, ["storage", *arguments, "--data-dir", str(tmp_path / "data")])
    structlog.configure(**logging)
    os.umask(umask)


@pytest.fixture
def unknown(tmp_path: Path) -> JobId:
    """A video and an input of yesterday that a new database beside it does not know."""

    async def make_database() -> None:
        await (await SqlJobStore.open(f"sqlite:///{tmp_path}/data/kinema.db")).close()

    asyncio.run(make_database())
    job_id, storage = new_job_id(), Storage(f"file://{tmp_path}/data/files")
    storage.put_bytes(video_key(job_id, 1), bytes(100), "video/mp4")
    storage.put_bytes(image_key(job_id), bytes(10), "image/png")
    storage.put_bytes(INPUT, bytes(7), "image/png")
    for path in (tmp_path / "data/files").rglob("*"):
        os.utime(path, (time.time() - 86400,) * 2)
    return job_id


@pytest.mark.parametrize("command", ["sweep", "adopt"])
@pytest.mark.parametrize(
    "database",
    [(), ("--database", "sqlite:///other.db"), ("--database", "sqlite+pysqlite:///o.db"), ("--database", "sqlite://")],
)
def test_a_database_that_is_not_there_is_refused(
    here: Here, unknown: JobId, tmp_path: Path, command: str, database: tuple[str, ...]
) -> None:
    """A new one would know nothing, and take the storage from its own. Nothing is made or removed."""
    if not database:
        (tmp_path / "data/kinema.db").unlink()
    before = {*tmp_path.rglob("*")}
    refused = here(command, "--yes", *database)
    assert refused.exit_code == 2
    assert "there is no database" in refused.stderr
    assert {*tmp_path.rglob("*")} == before


def test_a_storage_is_adopted_and_swept_when_a_person_says_so(here: Here, unknown: JobId, tmp_path: Path) -> None:
    """Each step tells first what it would do, on standard output alone what a program may read."""
    files = tmp_path / "data/files"
    refused = here("sweep", "--yes")
    assert refused.exit_code == 2
    assert "1 of the 1 videos there are not in jobs.database_url" in refused.stderr

    told = here("adopt")
    rows = dict(line.split("\t") for line in told.stdout.splitlines())
    assert rows == {
        "known videos in the storage": "0",
        "unknown videos in the storage": "1",
        "finished videos in the database": "0",
        "id of the database that has the storage": "none",
    }
    assert "stays as it is; --yes" in told.stderr
    assert not (files / OWNER_KEY).exists()
    assert here("adopt", "--yes").exit_code == 0
    assert (files / OWNER_KEY).exists()

    told = here("sweep")
    assert told.stdout == f"videos/{unknown}\t2\t110\tunknown\n{INPUT}\t1\t7\tunknown\n"
    assert "nothing was removed" in told.stderr
    assert (files / video_key(unknown, 1)).exists()
    removed = here("sweep", "--yes")
    assert (removed.stdout, "removed" in removed.stderr) == (told.stdout, True)
    assert not (files / "videos" / unknown).exists()
    assert not (files / INPUT).exists()
    assert here("sweep").stdout == ""
