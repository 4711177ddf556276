"""Files in a bucket, on a real S3 server over HTTP."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kinema.errors import FileGone, StorageUnavailable
from kinema.ids import new_job_id
from kinema.settings import StorageSettings
from kinema.storage import CHUNK_BYTES, Storage, _walk_s3, input_key, video_key
from tests.s3 import BUCKET, running_s3
from tests.serving import serving
from tests.unit.server.test_generations import made

KEY = video_key(new_job_id(), 1)


@pytest.fixture(scope="module")
def s3() -> Iterator[Storage]:
    with running_s3():
        storage = Storage(f"s3://{BUCKET}/folder")
        storage._fs.mkdir(BUCKET)
        yield storage


def test_a_file_comes_back_in_chunks_from_one_request(s3: Storage) -> None:
    """However large it is, a reader holds a chunk of it."""
    data = os.urandom(3 * CHUNK_BYTES + 1)
    artifact = s3.put_bytes(KEY, data, "video/mp4")
    asked: list[str] = []
    call = s3._fs.call_s3
    s3._fs.call_s3 = lambda method, **arguments: (asked.append(method), call(method, **arguments))[1]
    chunks = list(s3.read(KEY))
    s3._fs.call_s3 = call
    assert b"".join(chunks) == data
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES] * 3 + [1]
    assert asked == ["get_object"]
    assert hashlib.sha256(data).hexdigest().startswith(artifact.etag)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 1), (3, 7), (5, None), (9, 100), (10, None), (0, None)])
def test_a_range_is_what_a_slice_is(s3: Storage, start: int, end: int | None) -> None:
    """Start is inclusive, end exclusive, and past the end there is nothing."""
    s3.put_bytes(KEY, b"0123456789", "video/mp4")
    assert b"".join(s3.read(KEY, start, end)) == b"0123456789"[start:end]


def test_a_reader_that_leaves_early_is_let_go(s3: Storage) -> None:
    """Its connection is closed, and others read on."""
    data = os.urandom(8 * CHUNK_BYTES)
    s3.put_bytes(KEY, data, "video/mp4")
    reader = s3.read(KEY)
    assert next(reader) == data[:CHUNK_BYTES]
    reader.close()
    assert b"".join(s3.read(KEY, CHUNK_BYTES)) == data[CHUNK_BYTES:]


def test_a_connection_that_breaks_off_goes_on_where_it_was(s3: Storage) -> None:
    """A client that reads slowly need not begin again. One that never gets a byte is told why."""
    data = os.urandom(4 * CHUNK_BYTES)
    s3.put_bytes(KEY, data, "video/mp4")
    call, bodies = s3._fs.call_s3, []

    def breaking(method: str, **arguments: object) -> dict[str, object]:
        answer: dict[str, object] = call(method, **arguments)
        bodies.append(arguments.get("Range"))
        return answer | {"Body": _Breaking(answer["Body"], after=CHUNK_BYTES if len(bodies) < 3 else None)}

    s3._fs.call_s3 = breaking
    try:
        assert b"".join(s3.read(KEY)) == data
        assert bodies == [None, f"bytes={CHUNK_BYTES}-", f"bytes={2 * CHUNK_BYTES}-"]
        s3._fs.call_s3 = lambda method, **arguments: call(method, **arguments) | {"Body": _Breaking(None, after=0)}
        with pytest.raises(StorageUnavailable, match="broken off"):
            next(s3.read(KEY))
    finally:
        s3._fs.call_s3 = call


class _Breaking:
    """A body that breaks off after so many bytes."""

    def __init__(self, body: object, after: int | None) -> None:
        self._body, self._left = body, after

    async def read(self, size: int) -> bytes:
        if self._left is None:
            return await self._body.read(size)  # type: ignore[attr-defined, no-any-return]
        if not self._left:
            raise ConnectionError("broken off")
        part: bytes = await self._body.read(min(size, self._left))  # type: ignore[attr-defined]
        self._left -= len(part)
        return part

    def close(self) -> None:
        if self._body is not None:
            self._body.close()  # type: ignore[attr-defined]


def test_a_missing_file_is_gone_and_a_missing_bucket_is_no_storage(s3: Storage) -> None:
    """Before any byte."""
    s3.delete(KEY)
    with pytest.raises(FileGone):
        next(s3.read(KEY))
    with pytest.raises(StorageUnavailable, match="no such file or bucket"):
        Storage("s3://nobodys-bucket/folder").check()


def test_a_large_file_goes_up_in_parts(s3: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts are in memory at a time; the ETag of the object says how many there were."""
    monkeypatch.setattr("kinema.storage._PART_BYTES", part_bytes := 5 * 2**20)  # S3 takes no smaller ones
    source = tmp_path / "film"
    data = os.urandom(2**20) * 10 + b"the end"
    source.write_bytes(data)
    s3.put_file(source, KEY, "video/mp4", hashlib.sha256(data).hexdigest)
    assert b"".join(s3.read(KEY, 2 * part_bytes)) == b"the end"
    info = s3._fs.info(s3._path(KEY))
    assert info["size"] == len(data)
    assert info["ETag"].strip('"').endswith("-3")
    assert info["ContentType"] == "video/mp4"


def test_a_link_opens_the_file_without_a_key(s3: Storage) -> None:
    """A part of it too, under the name that the link has."""
    s3.put_bytes(KEY, b"0123456789", "video/mp4")
    link = s3.link(KEY, 60, ResponseContentDisposition='inline; filename="a.mp4"')
    assert link is not None
    whole = httpx.get(link)
    assert (whole.content, whole.headers["content-type"]) == (b"0123456789", "video/mp4")
    assert whole.headers["content-disposition"] == 'inline; filename="a.mp4"'
    part = httpx.get(link, headers={"range": "bytes=3-6"})
    assert (part.status_code, part.content) == (206, b"3456")


def test_a_listing_goes_by_pages_and_misses_nothing(s3: Storage) -> None:
    """What is stored under ids of jobs and as inputs, and nothing else; a deletion takes what it says."""
    jobs = sorted(new_job_id() for _ in range(3))
    for job_id in jobs:
        for attempt in (1, 2):
            s3.put_bytes(video_key(job_id, attempt), b"12345", "video/mp4")
    name = f"{'0' * 64}-{'1' * 16}"
    s3.put_bytes(input_key(name), b"123", "image/png")
    call, pages = s3._fs.call_s3, []

    def paged(method: str, **arguments: object) -> dict[str, object]:
        pages.append(method)
        found: dict[str, object] = call(method, **arguments, MaxKeys=2)
        return found

    s3._fs.call_s3 = paged
    try:
        walked = [path for path, _ in _walk_s3(s3._fs, s3._path("videos"))]
        listed = s3.list_jobs()
    finally:
        s3._fs.call_s3 = call
    assert len(walked) == len(set(walked)) >= 6
    assert len(pages) >= 6
    assert {job_id: listed[job_id].sizes for job_id in jobs} == {one: {"1.mp4": 5, "2.mp4": 5} for one in jobs}
    assert s3.list_inputs()[name].size_bytes == 3
    s3.delete_files(jobs[0], ["1.mp4"])
    s3.delete_job(jobs[1])
    left = s3.list_jobs()
    assert (set(left[jobs[0]].sizes), jobs[1] in left, set(left[jobs[2]].sizes)) == (
        {"2.mp4"},
        False,
        {"1.mp4", "2.mp4"},
    )


async def test_downloads_go_to_the_bucket_where_that_is_set(s3: Storage) -> None:
    """The bytes are those that the server would send itself. What needs no body it answers itself."""
    async with serving(storage=s3, space=StorageSettings(presign=True)) as it:
        body = await made(it)
        path = f"/v1/videos/{body['id']}/content"
        sent = await it.client.get(path)
        assert (sent.status_code, sent.headers["cache-control"]) == (307, "no-store")
        async with httpx.AsyncClient() as elsewhere:
            found = await elsewhere.get(sent.headers["location"], headers={"range": "bytes=0-99"})
        opened = await it.service.open_artifact(body["id"])
        assert (found.status_code, found.content) == (206, b"".join(opened.read(0, 100)))
        assert found.headers["content-disposition"] == f'inline; filename="{body["id"]}.mp4"'
        assert (await it.client.head(path)).status_code == 200
        known = await it.client.get(path, headers={"if-none-match": f'"{opened.artifact.etag}"'})
        assert known.status_code == 304


def test_of_several_databases_one_gets_the_storage(s3: Storage) -> None:
    """A write that replaces nothing decides."""
    fresh = Storage(f"s3://{BUCKET}/another")
    assert [fresh.claim(one) for one in ("first", "second")] == ["first", "first"]
    assert fresh.read_owner() == "first"
