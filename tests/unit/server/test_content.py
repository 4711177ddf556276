"""``GET /v1/videos/{id}/content``: parts, unchanged files, headers alone, and what is not there."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from starlette.responses import StreamingResponse

from kinema.engines.fake import FakeEngine
from kinema.errors import StorageUnavailable
from kinema.media.film import read_comment
from kinema.server.content import answer_with_base64
from kinema.service.service import OpenArtifact
from kinema.storage import CHUNK_BYTES, Storage
from tests.serving import SMALL, Gate, Serving, serving
from tests.unit.server.test_bad_input import error_of
from tests.unit.server.test_generations import URL, made


async def test_the_whole_file_has_every_header(it: Serving) -> None:
    """Type, length, ETag, ranges, and a name to save it under."""
    body = await made(it)
    answer = await it.client.get(f"/v1/videos/{body['id']}/content", params={"variant": "video"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "video/mp4"
    assert int(answer.headers["content-length"]) == len(answer.content) > 100
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"] == f'inline; filename="{body["id"]}.mp4"'
    assert answer.headers["etag"].startswith('"')


async def test_head_has_the_headers_alone(it: Serving) -> None:
    """The same ones, whatever part is asked for."""
    path = f"/v1/videos/{(await made(it))['id']}/content"
    whole = await it.client.get(path)
    head = await it.client.head(path)
    part = await it.client.head(path, headers={"range": "bytes=0-9"})
    ignored = {"x-request-id"}
    assert (head.status_code, head.content) == (200, b"")
    assert {k: v for k, v in head.headers.items() if k not in ignored} == {
        k: v for k, v in whole.headers.items() if k not in ignored
    }
    assert (part.status_code, part.headers["content-length"]) == (200, whole.headers["content-length"])


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=5-5", slice(5, 6)),
        ("bytes=10-", slice(10, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=-99999999", slice(0, None)),
        ("bytes=3-99999999", slice(3, None)),
        ("Bytes = 1 - 2", slice(1, 3)),
    ],
)
async def test_a_range_is_a_part(it: Serving, header: str, part: slice) -> None:
    """206 with exactly those bytes, and where they are."""
    path = f"/v1/videos/{(await made(it))['id']}/content"
    whole = (await it.client.get(path)).content
    answer = await it.client.get(path, headers={"range": header})
    start, stop, _ = part.indices(len(whole))
    assert (answer.status_code, answer.content) == (206, whole[part])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
    assert answer.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("header", ["bytes=5-2", "bytes=-", "lines=1-2", "bytes=0-1,3-4", "bytes=a-b", "nonsense", ""])
async def test_a_range_that_is_none_is_ignored(it: Serving, header: str) -> None:
    """The whole file, as RFC 9110 has it."""
    path = f"/v1/videos/{(await made(it))['id']}/content"
    assert (await it.client.get(path, headers={"range": header})).status_code == 200


@pytest.mark.parametrize("header", ["bytes=99999999-", "bytes=99999999-99999999", "bytes=-0"])
async def test_a_range_beyond_the_end_is_416(it: Serving, header: str) -> None:
    """With the size, for the client to ask again."""
    path = f"/v1/videos/{(await made(it))['id']}/content"
    size = (await it.client.head(path)).headers["content-length"]
    answer = await it.client.get(path, headers={"range": header})
    assert error_of(answer, 416)["code"] == "range_not_satisfiable"
    assert answer.headers["content-range"] == f"bytes */{size}"


async def test_what_the_client_has_is_not_sent_again(it: Serving) -> None:
    """If-None-Match with the ETag, weak, in a list, or a star; If-Range with another one sends the whole file."""
    path = f"/v1/videos/{(await made(it))['id']}/content"
    etag = (await it.client.head(path)).headers["etag"]
    for tag in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = await it.client.get(path, headers={"if-none-match": tag})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert (await it.client.get(path, headers={"if-none-match": '"other"'})).status_code == 200
    for tag, status in ((etag, 206), ('"other"', 200)):
        answer = await it.client.get(path, headers={"if-range": tag, "range": "bytes=0-1"})
        assert answer.status_code == status


async def test_a_video_that_is_not_there_is_404(it: Serving) -> None:
    """Of an unknown id, whatever it looks like."""
    for video_id in ("video_nobody", "..%2F..%2Fetc%2Fpasswd", "%00", "x" * 3000, "%F0%9F%90%88", "%ff"):
        error_of(await it.client.get(f"/v1/videos/{video_id}/content"), 404)


@pytest.mark.parametrize(
    ("variant", "media_type", "magic"),
    [
        ("thumbnail", "image/webp", b"RIFF"),
        ("spritesheet", "image/jpeg", b"\xff\xd8"),
        ("manifest", "application/json", b"{\n"),
    ],
)
async def test_what_goes_with_a_video_is_a_file_like_it(
    it: Serving, variant: str, media_type: str, magic: bytes
) -> None:
    """With their type, their length, an ETag, and in part when a part is asked for."""
    body = await made(it)
    url = f"/v1/videos/{body['id']}/content?variant={variant}"
    whole = await it.client.get(url)
    assert (whole.status_code, whole.headers["content-type"]) == (200, media_type)
    assert int(whole.headers["content-length"]) == len(whole.content)
    assert whole.content.startswith(magic)
    part = await it.client.get(url, headers={"range": "bytes=0-1"})
    assert (part.status_code, part.content) == (206, magic[:2])
    assert (await it.client.get(url, headers={"if-none-match": whole.headers["etag"]})).status_code == 304


async def test_a_manifest_says_how_the_video_was_made(it: Serving) -> None:
    """Every value as it was used, the video's own digest, and what the video itself says; no key of storage."""
    body = await made(it)
    url = f"/v1/videos/{body['id']}/content"
    film = (await it.client.get(url)).content
    answer = await it.client.get(url, params={"variant": "manifest"})
    said = answer.json()
    assert {name: said["request"][name] for name in ("seed", "prompt", "width")} == {
        "seed": body["seed"],
        "prompt": body["prompt"],
        "width": 64,
    }
    assert said["video"] == {"sha256": hashlib.sha256(film).hexdigest(), "size_bytes": len(film)}
    assert (said["id"], said["attempt"]) == (body["id"], 1)
    assert 0 < said["timings"]["total_s"] <= body["inference_time_s"] + 0.001
    assert "videos/" not in answer.text
    own = json.loads(read_comment(film) or "")
    assert own == {name: said[name] for name in own}
    assert not own.keys() & {"id", "attempt", "made_at", "timings", "video"}


async def test_an_unknown_variant_is_400(it: Serving) -> None:
    """Rather than a video under the name of a picture."""
    body = await made(it)
    answer = await it.client.get(f"/v1/videos/{body['id']}/content", params={"variant": "poster"})
    told = error_of(answer, 400)
    assert told["param"] == "variant"
    assert told["message"].endswith("accepted: video, thumbnail, spritesheet, manifest, preview, live")


async def test_a_video_that_is_not_ready_is_404() -> None:
    """Not 409, which SDKs repeat."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it:
        asking = asyncio.create_task(it.client.post(URL, json=SMALL))
        assert await asyncio.to_thread(gate.has_arrived.wait, 20)
        (run,) = it.dispatcher._runs.values()
        answer = await it.client.get(f"/v1/videos/{run.job.id}/content")
        gate.is_open.set()
        await asking
    assert error_of(answer, 404)["code"] == "not_finished"


async def test_storage_that_hangs_holds_up_nothing_else(it: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait for their file, the other endpoints answer."""
    body = await made(it)
    is_back, reading = threading.Event(), threading.Semaphore(0)

    def hanging(*_: object) -> Iterator[bytes]:
        reading.release()
        assert is_back.wait(20)
        yield b"video"

    with monkeypatch.context() as hung:
        hung.setattr(it.storage, "read", hanging)
        path = f"/v1/videos/{body['id']}/content"
        asking = [asyncio.create_task(it.client.get(path, headers={"range": "bytes=0-4"})) for _ in range(45)]
        for _ in range(40):
            assert await asyncio.to_thread(reading.acquire, timeout=20)
        try:
            async with asyncio.timeout(10):
                for other in ("/ready", "/health", "/v1/models"):
                    assert (await it.client.get(other)).status_code == 200
                await made(it)
        finally:
            is_back.set()
            answers = await asyncio.gather(*asking)
    assert {answer.content for answer in answers} == {b"video"}


async def test_a_storage_that_is_away_is_503(it: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an error body, not as a broken video."""

    def away(_path: str) -> NoReturn:
        raise OSError(5, "Input/output error")

    body = await made(it)
    monkeypatch.setattr(it.storage, "_open", away)
    answer = await it.client.get(f"/v1/videos/{body['id']}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, StorageUnavailable.code)
    assert answer.headers["content-type"] == "application/json"


async def test_a_file_that_is_gone_is_404(it: Serving) -> None:
    """It will not come back, so no client should try again."""
    body = await made(it)
    opened = await it.service.open_artifact(body["id"])
    it.storage.delete(opened.artifact.key)
    answer = await it.client.get(f"/v1/videos/{body['id']}/content")
    assert error_of(answer, 404)["code"] == "file_gone"


@pytest.mark.parametrize("size", [1, 3, 5, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 2])
async def test_base64_is_sent_piece_by_piece(tmp_path: Path, size: int) -> None:
    """As one text, whatever the size; the length of the answer is known before."""
    storage, data = Storage(f"file://{tmp_path}"), bytes(index % 251 for index in range(size))
    artifact = storage.put_bytes("videos/a/1.mp4", data, "video/mp4")
    answer = await answer_with_base64(OpenArtifact(artifact, storage), lambda text: json.dumps(["mark", text, "end"]))
    assert isinstance(answer, StreamingResponse)
    sent = b"".join([bytes(chunk) async for chunk in answer.body_iterator])  # type: ignore[arg-type]  # never text
    assert json.loads(sent) == ["mark", base64.b64encode(data).decode(), "end"]
    assert int(answer.headers["content-length"]) == len(sent)
