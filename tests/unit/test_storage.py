"""Files under keys, on a folder and in memory alike."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from kinema.errors import ConfigError, FileGone, StorageUnavailable
from kinema.job import JobId, new_job_id
from kinema.storage import CHUNK_BYTES, Storage, film_key, image_key, spritesheet_key, thumbnail_key, video_key

KEY = "videos/video_1/video.mp4"


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/files" if request.param == "file" else f"memory://{tmp_path}")


def test_a_file_comes_back_whole_and_its_artifact_describes_it(storage: Storage) -> None:
    """Bytes, size, type and ETag agree; the ETag is the content's hash."""
    data = os.urandom(2 * CHUNK_BYTES + 1)
    artifact = storage.put_bytes(KEY, data, "video/mp4")
    chunks = list(storage.read(KEY))
    assert b"".join(chunks) == data
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, 1]
    assert (artifact.key, artifact.media_type, artifact.size_bytes) == (KEY, "video/mp4", len(data))
    assert hashlib.sha256(data).hexdigest().startswith(artifact.etag)
    assert len(artifact.etag) >= 16


def test_put_file_equals_put_bytes(storage: Storage, tmp_path: Path) -> None:
    """Where the content came from changes nothing."""
    source = tmp_path / "film"
    source.write_bytes(b"content")
    assert storage.put_file(source, KEY, "video/mp4") == storage.put_bytes(KEY, b"content", "video/mp4")
    assert source.exists()


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 1), (3, 7), (5, None), (9, 100), (10, None)])
def test_a_range_is_what_a_slice_is(storage: Storage, start: int, end: int | None) -> None:
    """Start is inclusive, end exclusive, and past the end there is nothing."""
    storage.put_bytes(KEY, b"0123456789", "video/mp4")
    assert b"".join(storage.read(KEY, start, end)) == b"0123456789"[start:end]


def test_a_second_put_replaces_the_first(storage: Storage) -> None:
    """A retried job writes the same key again."""
    storage.put_bytes(KEY, b"first, and longer", "video/mp4")
    storage.put_bytes(KEY, b"second", "video/mp4")
    assert b"".join(storage.read(KEY)) == b"second"


def test_deleting_is_final_and_a_missing_file_is_fine(storage: Storage) -> None:
    """After a delete a read says why it fails, before any byte."""
    storage.put_bytes(KEY, b"x", "video/mp4")
    storage.delete(KEY)
    storage.delete(KEY)
    with pytest.raises(FileGone, match="no longer there"):
        next(iter(storage.read(KEY)))


@pytest.mark.parametrize(
    "key", ["../x", "a/../b", "/etc/passwd", "a//b", "", ".", "a/.hidden", "a\\b", "a\x00b", "a\n"]
)
def test_no_key_can_leave_the_root(storage: Storage, key: str) -> None:
    """A key is made of plain names; anything else never reaches the filesystem."""
    with pytest.raises(ValueError, match="plain name"):
        storage.put_bytes(key, b"x", "video/mp4")
    with pytest.raises(ValueError, match="plain name"):
        list(storage.read(key))


def test_keys_come_from_the_job_id_alone() -> None:
    """And from no id that holds a path."""
    job_id = new_job_id()
    assert video_key(job_id, 2) == f"videos/{job_id}/2.mp4"
    assert thumbnail_key(job_id, 2) == f"videos/{job_id}/2.webp"
    assert spritesheet_key(job_id, 2) == f"videos/{job_id}/2.jpg"
    assert film_key(job_id) == f"videos/{job_id}/input.film"
    assert image_key(job_id) == f"videos/{job_id}/input.png"
    for bad in ("../x", "a/b", "", ".."):
        with pytest.raises(ValueError, match="plain name"):
            video_key(JobId(bad), 1)


def test_a_failed_put_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a folder a file appears whole or not at all."""
    storage = Storage(f"file://{tmp_path}")
    storage.put_bytes(KEY, b"old", "video/mp4")

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageUnavailable, match="No space left on device") as caught:
        storage.put_bytes(KEY, b"new", "video/mp4")
    assert str(tmp_path) not in caught.value.message
    assert [path.name for path in (tmp_path / KEY).parent.iterdir()] == ["video.mp4"]
    assert b"".join(storage.read(KEY)) == b"old"


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    """The reason is the system's own."""
    (tmp_path / "videos").write_bytes(b"a file where a folder must be")
    storage = Storage(f"file://{tmp_path}")
    with pytest.raises(StorageUnavailable, match=r"cannot write .*: (Not a directory|File exists)"):
        storage.put_bytes(KEY, b"x", "video/mp4")


@pytest.mark.parametrize("url", ["", "folder", "/folder", "http://host/x", "nonsense://x", "file://", "s4://bucket"])
def test_a_url_that_is_no_place_stops_the_start(url: str) -> None:
    """The message names the setting and what is accepted."""
    with pytest.raises(ConfigError, match=r"storage\.url = .*accepted are file:///folder"):
        Storage(url)


@pytest.mark.parametrize(("protocol", "extra"), [("s3", "s3"), ("gs", "gcs"), ("az", "azure")])
def test_a_missing_package_names_its_extra(protocol: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object store is an extra of its own."""
    for package in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'kinema\[{extra}\]'"):
        Storage(f"{protocol}://bucket/videos")
