"""Files of a service are for the user that runs it alone, whatever the umask is."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kinema.errors import ConfigError
from kinema.files import keep_private, make_private_file, make_private_folder, withdraw_rights
from kinema.hosting import process
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from kinema.storage import Storage
from tests.serving import make_job

KEY = "videos/video_1/1.mp4"


@pytest.fixture(autouse=True, params=[0o000, 0o022, 0o077])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def files_in(folder: Path) -> list[Path]:
    return [*folder.iterdir()]


def others_see(folder: Path) -> list[Path]:
    """What others than the owner may do anything with, in a folder and everything below it."""
    return [path for path in (folder, *folder.rglob("*")) if mode(path) & 0o077]


def test_stored_files_are_private(tmp_path: Path) -> None:
    """And the folders that are made for them, from the first one on."""
    storage = Storage(f"file://{tmp_path}/new/files")
    storage.put_bytes(KEY, b"video", "video/mp4")
    source = tmp_path / "source"
    source.write_bytes(b"video")
    source.chmod(0o644)
    storage.put_file(source, "videos/video_2/1.mp4", "video/mp4", hashlib.sha256(b"video").hexdigest)
    storage.claim("a" * 32)
    assert others_see(tmp_path / "new") == []
    assert mode(tmp_path / "new/files" / KEY) == 0o600
    assert mode(tmp_path / "new") == 0o700


def test_files_that_a_web_server_shows_are_readable(tmp_path: Path) -> None:
    """Those of a storage with a public address."""
    Storage(f"file://{tmp_path}/files", "http://127.0.0.1:9/").put_bytes(KEY, b"video", "video/mp4")
    assert mode(tmp_path / "files" / KEY) == 0o644
    assert mode(tmp_path / "files/videos/video_1") == 0o755


async def test_a_database_is_private(tmp_path: Path) -> None:
    """With the files that SQLite has beside it; one of an earlier version becomes so."""
    path = tmp_path / "new/kinema.db"
    for _ in range(2):
        store = await SqlJobStore.open(f"sqlite:///{path}")
        await store.create(make_job(), limits=QueueLimits())
        assert {file.name for file in path.parent.iterdir()} == {"kinema.db", "kinema.db-wal", "kinema.db-shm"}
        assert others_see(path.parent) == []
        await store.close()
        path.chmod(0o644)


async def test_a_database_of_an_earlier_version_becomes_private(tmp_path: Path) -> None:
    """Though another process may have it open."""
    path = tmp_path / "kinema.db"
    first = await SqlJobStore.open(f"sqlite:///{path}")
    await first.create(make_job(), limits=QueueLimits())
    for file in files_in(tmp_path):
        file.chmod(0o666)
    second = await SqlJobStore.open(f"sqlite:///{path}")
    assert [file for file in files_in(tmp_path) if mode(file) & 0o077] == []
    assert await second.count_waiting() == 1
    await second.close()
    await first.close()


async def test_a_folder_where_no_database_can_be_made_is_refused(tmp_path: Path) -> None:
    """In a sentence."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"jobs\.database_url: cannot make .*: (Not a directory|File exists)"):
        await SqlJobStore.open(f"sqlite:///{tmp_path}/file/kinema.db")


def test_the_data_folder_is_private(tmp_path: Path) -> None:
    """A new one, and one that is there."""
    for _ in range(2):
        process.make_folder(tmp_path / "some/data")
        assert mode(tmp_path / "some/data") == 0o700
        (tmp_path / "some/data").chmod(0o755)


def test_a_data_folder_with_other_things_keeps_its_rights(tmp_path: Path) -> None:
    """It may be a home, or the root of the disk."""
    for name, expected in (("kinema.db", 0o700), ("files", 0o700), ("usr", 0o755)):
        (tmp_path / name).touch()
        tmp_path.chmod(0o755)
        process.make_folder(tmp_path)
        assert mode(tmp_path) == expected


def test_what_a_service_writes_is_private() -> None:
    """Also what libraries and children write for it."""
    keep_private()
    assert os.umask(0o077) == 0o077


def test_only_what_is_its_own_loses_rights(tmp_path: Path) -> None:
    """A folder that everybody writes to stays as it is; what is not there costs nothing."""
    shared = tmp_path / "shared"
    make_private_folder(shared)
    shared.chmod(0o1777)
    withdraw_rights(shared)
    withdraw_rights(tmp_path / "absent")
    assert mode(shared) == 0o1777
    make_private_file(shared / "file")
    assert mode(shared / "file") == 0o600
