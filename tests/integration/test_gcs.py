"""Files in a bucket of Google's kind, on an emulator of that store over HTTP."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kinema.errors import FileGone, StorageUnavailable
from kinema.ids import new_job_id
from kinema.storage import CHUNK_BYTES, Storage, input_key, video_key
from tests.gcs import BUCKET, running_gcs

KEY = video_key(new_job_id(), 1)


@pytest.fixture(scope="module")
def gcs() -> Iterator[Storage]:
    with running_gcs():
        yield Storage(f"gs://{BUCKET}/folder")


def test_a_file_comes_back_whole_and_by_ranges(gcs: Storage, tmp_path: Path) -> None:
    """What was uploaded, replaced by what is uploaded later; past the end there is nothing."""
    data = os.urandom(2 * CHUNK_BYTES + 1)
    source = tmp_path / "film"
    source.write_bytes(data)
    gcs.put_bytes(KEY, b"an earlier one", "video/mp4")
    gcs.put_file(source, KEY, "video/mp4", hashlib.sha256(data).hexdigest)
    assert b"".join(gcs.read(KEY)) == data
    for start, end in ((0, 1), (3, 7), (CHUNK_BYTES - 1, 2 * CHUNK_BYTES), (5, None), (len(data) - 1, len(data) + 9)):
        assert b"".join(gcs.read(KEY, start, end)) == data[start:end]


def test_a_missing_file_is_gone_and_a_missing_bucket_is_no_storage(gcs: Storage) -> None:
    """Before any byte."""
    gcs.check()
    with pytest.raises(FileGone):
        next(gcs.read(video_key(new_job_id(), 1)))
    with pytest.raises(StorageUnavailable):
        Storage("gs://nobodys-bucket/folder").check()


def test_a_listing_misses_nothing_and_a_deletion_takes_what_it_says(gcs: Storage) -> None:
    """What is stored under ids of jobs, and as inputs."""
    jobs = sorted(new_job_id() for _ in range(3))
    for job_id in jobs:
        for attempt in (1, 2):
            gcs.put_bytes(video_key(job_id, attempt), b"12345", "video/mp4")
    name = f"{'0' * 64}-{'1' * 16}"
    gcs.put_bytes(input_key(name), b"123", "image/png")
    listed = gcs.list_jobs()
    assert {job_id: listed[job_id].sizes for job_id in jobs} == {one: {"1.mp4": 5, "2.mp4": 5} for one in jobs}
    assert gcs.list_inputs()[name].size_bytes == 3
    gcs.delete_files(jobs[0], ["1.mp4"])
    gcs.delete_job(jobs[1])
    left = gcs.list_jobs()
    assert set(left[jobs[0]].sizes) == {"2.mp4"}
    assert jobs[1] not in left
    assert set(left[jobs[2]].sizes) == {"1.mp4", "2.mp4"}


def test_a_database_claims_the_storage(gcs: Storage) -> None:
    """Its id is there afterwards. (The emulator knows no write that replaces nothing, by which the store decides.)"""
    fresh = Storage(f"gs://{BUCKET}/another")
    assert fresh.read_owner() is None
    assert fresh.claim("first") == fresh.read_owner() == "first"
