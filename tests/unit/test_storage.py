"""Files under keys, on a folder and in memory alike."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fsspec.registry import _registry

from kinema.errors import ConfigError, FileGone, StorageUnavailable
from kinema.ids import JobId, new_job_id
from kinema.storage import (
    CHUNK_BYTES,
    Storage,
    StoredJob,
    checkpoint_key,
    film_key,
    image_key,
    input_key,
    last_frame_key,
    spritesheet_key,
    thumbnail_key,
    video_key,
)

KEY = "videos/video_1/video.mp4"


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/files" if request.param == "file" else f"memory://{tmp_path}")


@pytest.mark.parametrize("url", ["memory://a::b", "memory://a::file:///tmp"])
def test_a_chain_of_places_is_refused(url: str) -> None:
    """fsspec would write to one of them, without a word of the other."""
    with pytest.raises(ConfigError, match=r"::.* would name a second place"):
        Storage(url)


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


def test_a_file_of_the_same_disk_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large video is stored at once. It is copied where the disk has no links; in both cases it is private."""
    storage = Storage(f"file://{tmp_path}/files")
    source = tmp_path / "film"
    source.write_bytes(b"content")
    source.chmod(0o644)
    for key, is_same in {KEY: True, f"{KEY}.copied": False}.items():
        if not is_same:
            monkeypatch.setattr("os.link", fail_to_link)
        storage.put_file(source, key, "video/mp4", hashlib.sha256(b"content").hexdigest)
        stored = tmp_path / "files" / key
        assert stored.samefile(source) == is_same
        assert stored.read_bytes() == b"content"
        assert stored.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.rglob("*.part"))


def fail_to_link(*_: object) -> None:
    raise OSError(errno.EXDEV, "another disk")


def test_put_file_equals_put_bytes(storage: Storage, tmp_path: Path) -> None:
    """Where the content came from changes nothing."""
    source = tmp_path / "film"
    source.write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest
    assert storage.put_file(source, KEY, "video/mp4", sha256) == storage.put_bytes(KEY, b"content", "video/mp4")
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
    assert last_frame_key(job_id) == f"videos/{job_id}/last_frame.png"
    assert checkpoint_key(job_id) == f"videos/{job_id}/checkpoint"
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
    monkeypatch.delitem(_registry, protocol, raising=False)  # it keeps what it has imported
    for package in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'kinema\[{extra}\]'"):
        Storage(f"{protocol}://bucket/videos")


def test_a_jobs_files_are_listed_with_their_sizes_and_age(storage: Storage) -> None:
    """Those of ids that are not ours are not; a storage without any file lists nothing."""
    assert storage.list_jobs() == {}
    first, second = new_job_id(), new_job_id()
    before = time.time() - 1
    storage.put_bytes(image_key(first), b"123", "image/png")
    storage.put_bytes(video_key(first, 2), b"12345", "video/mp4")
    storage.put_bytes(video_key(second, 1), b"1", "video/mp4")
    storage.put_bytes("videos/holidays/1.mp4", b"1", "video/mp4")
    found = storage.list_jobs()
    assert {job_id: stored.sizes for job_id, stored in found.items()} == {
        first: {"input.png": 3, "2.mp4": 5},
        second: {"1.mp4": 1},
    }
    assert found[first].size_bytes == 8
    assert all(before < stored.modified_at < time.time() + 1 for stored in found.values())


def test_all_files_of_a_job_are_deleted_and_no_other(storage: Storage) -> None:
    """Twice is fine, and so is a job without files."""
    gone, kept = new_job_id(), new_job_id()
    for job_id in (gone, kept):
        storage.put_bytes(image_key(job_id), b"x", "image/png")
        storage.put_bytes(video_key(job_id, 1), b"x", "video/mp4")
    for _ in range(2):
        storage.delete_job(gone)
    assert set(storage.list_jobs()) == {kept}
    storage.delete_files(kept, ["1.mp4", "missing.mp4"])
    assert set(storage.list_jobs()[kept].sizes) == {"input.png"}


def test_no_name_leads_out_of_a_jobs_folder(storage: Storage) -> None:
    """Neither an id nor the name of a file."""
    for job_id in ("..", "../x", "", "a/b"):
        with pytest.raises(ValueError, match="plain name"):
            storage.delete_job(JobId(job_id))
    for name in ("..", "../1.mp4", "", "..mp4", "a/b"):
        with pytest.raises(ValueError, match="plain name"):
            storage.delete_files(new_job_id(), [name])


def test_a_folder_goes_with_its_last_file(tmp_path: Path) -> None:
    """And one that is empty already is listed, so that it can go; unfinished files count as files."""
    storage = Storage(f"file://{tmp_path}")
    job_id, empty = new_job_id(), new_job_id()
    storage.put_bytes(video_key(job_id, 1), b"x", "video/mp4")
    (tmp_path / "videos" / job_id / ".2.mp4.0123.part").write_bytes(b"1234")
    (tmp_path / "videos" / empty).mkdir()
    assert storage.list_jobs()[job_id].sizes == {"1.mp4": 1, ".2.mp4.0123.part": 4}
    assert storage.list_jobs()[empty].sizes == {}
    storage.delete_files(job_id, [".2.mp4.0123.part"])
    assert storage.list_jobs()[job_id].sizes == {"1.mp4": 1}
    storage.delete_job(job_id)
    storage.delete_job(empty)
    assert list((tmp_path / "videos").iterdir()) == []


def test_inputs_are_listed_with_their_sizes_and_age(storage: Storage) -> None:
    """By the names that the database gives; others are not ours, and nothing is there before the first one."""
    assert storage.list_inputs() == {}
    one, other = f"{'a' * 64}-{'b' * 16}", f"{'a' * 64}-{'c' * 16}"
    before = time.time()
    for key in (input_key(one), input_key(other), "inputs/holiday.png", f"videos/{one}"):
        storage.put_bytes(key, b"film", "image/png")
    found = storage.list_inputs()
    assert {name: file.size_bytes for name, file in found.items()} == {one: 4, other: 4}
    assert before - 1 <= found[one].modified_at <= time.time() + 1
    for _ in range(2):
        storage.delete_input(one)
    assert set(storage.list_inputs()) == {other}
    with pytest.raises(ValueError, match="not a plain name"):
        storage.delete_input(f"../videos/{one}")


def test_a_place_that_cannot_be_listed_says_so(tmp_path: Path) -> None:
    """Nothing may look as if there were no files."""
    (tmp_path / "videos").write_bytes(b"a file where the folder should be")
    with pytest.raises(StorageUnavailable, match=r"^cannot list the files: Not a directory$"):
        Storage(f"file://{tmp_path}").list_jobs()


class Bucket:
    """What an object store's filesystem says of its files: names without a scheme, the time in its own words."""

    def __init__(self, job_id: JobId, said: dict[str, object]) -> None:
        self.job_id, self.said = job_id, said

    def find(self, path: str, detail: bool) -> dict[str, dict[str, object]]:
        return {f"{path}/{self.job_id}/1.mp4": {"size": 1, "type": "file", **self.said}}


class Signing:
    """What an object store's filesystem does when it is asked for a link, or why it cannot."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def sign(self, path: str, expiration: int) -> str:
        if self.error is not None:
            raise self.error
        return f"https://store/{path}?for={expiration}"


@pytest.mark.parametrize("protocol", ["s3", "gs", "az"])
def test_an_object_store_signs_links(protocol: str) -> None:
    """For as long as is asked."""
    storage = Storage("memory://x")
    storage._protocol, storage._root, storage._fs = protocol, "bucket/folder", Signing()
    assert storage.has_links
    assert storage.link(KEY, 60) == f"https://store/bucket/folder/{KEY}?for=60"


def test_a_link_that_cannot_be_signed_says_why() -> None:
    """Credentials may read and write and still not sign."""
    storage = Storage("memory://x")
    storage._protocol, storage._fs = "gs", Signing(ValueError("no private key"))
    with pytest.raises(StorageUnavailable, match=r"cannot sign a link to videos/.*: no private key"):
        storage.link(KEY, 60)


def test_a_folder_has_links_where_it_is_served(tmp_path: Path) -> None:
    """A file:// URL would open nowhere else."""
    assert not Storage(f"file://{tmp_path}").has_links
    assert Storage(f"file://{tmp_path}").link(KEY, 60) is None
    served = Storage(f"file://{tmp_path}", "http://files.example/kinema/")
    assert served.has_links
    assert served.link(KEY, 60) == f"http://files.example/kinema/{KEY}"


MOMENT = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize("root", ["bucket/folder", "bucket/videos"])
@pytest.mark.parametrize(
    ("said", "at"),
    [
        ({"LastModified": MOMENT}, MOMENT.timestamp()),
        ({"last_modified": MOMENT, "creation_time": None}, MOMENT.timestamp()),
        ({"updated": "2026-01-02T00:00:00.000Z"}, MOMENT.timestamp()),
        ({"type": "file"}, math.inf),
    ],
)
def test_object_stores_say_the_time_in_their_own_ways(root: str, said: dict[str, object], at: float) -> None:
    """A datetime (s3, az) or a text (gs); a file of unknown age counts as new."""
    storage, job_id = Storage("memory://x"), new_job_id()
    storage._root, storage._fs = root, Bucket(job_id, said)
    assert storage.list_jobs() == {job_id: StoredJob({"1.mp4": 1}, at)}
