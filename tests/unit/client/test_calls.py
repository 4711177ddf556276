"""What the client sends, when it sends it again, and what it makes of the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from kinema.client import (
    ApiError,
    BadRequest,
    Client,
    ClientError,
    ConnectionFailed,
    InvalidApiKey,
    NotFound,
    Overloaded,
    ServerFailed,
    UnexpectedAnswer,
    Video,
    WaitedTooLong,
)
from kinema.client.errors import connection_failed
from kinema.errors import ConfigError, InvalidRequest
from tests.unit.client.conftest import VIDEO, Calling, Dropping, Script, error, video


def sent(script: Script) -> list[tuple[str, str]]:
    return [(request.method, request.url.raw_path.decode()) for request in script.requests]


async def test_create_sends_what_was_given_as_json(call: Calling, script: Script) -> None:
    """Options that were left out are not sent; the key goes as a bearer token; fields we do not know are kept."""
    script.replies = [video(brand_new="x")]
    made = await call("create", "a cat", seed=7, extra={"sparkle": True})
    request = script.requests[0]
    assert json.loads(request.content) == {"prompt": "a cat", "seed": 7, "sparkle": True}
    assert request.headers["authorization"] == "Bearer k"
    assert made.brand_new == "x"
    assert (made.id, made.is_over) == ("video_1", False)


async def test_a_file_is_sent_as_multipart(call: Calling, script: Script, tmp_path: Path) -> None:
    """Numbers as text, an object by brackets, the file with its name."""
    image = tmp_path / "first.png"
    image.write_bytes(b"png")
    script.replies = [video()]
    await call("extend", Video.model_validate(VIDEO), "a cat", fps=8, input_reference=image)
    body = script.requests[0].content
    assert b'name="fps"\r\n\r\n8\r\n' in body
    assert b'name="video[id]"\r\n\r\nvideo_1\r\n' in body
    assert b'name="input_reference"; filename="first.png"' in body
    assert sent(script) == [("POST", "/v1/videos/extensions")]


async def test_two_frames_are_two_files(call: Calling, script: Script, tmp_path: Path) -> None:
    """Each under its own name."""
    image = tmp_path / "first.png"
    image.write_bytes(b"png")
    script.replies = [video()]
    await call("create", "a cat", input_reference=image, last_frame=b"another")
    body = script.requests[0].content
    assert b'name="input_reference"; filename="first.png"' in body
    assert b'name="last_frame"; filename="last_frame"' in body


@pytest.mark.parametrize(
    ("name", "arguments", "path", "body"),
    [
        ("remix", ("video_1", "a dog"), "/v1/videos/video_1/remix", {"prompt": "a dog"}),
        ("edit", ("video_1", "a dog"), "/v1/videos/edits", {"prompt": "a dog", "video": {"id": "video_1"}}),
        ("extend", ("video_1", "on"), "/v1/videos/extensions", {"prompt": "on", "video": {"id": "video_1"}}),
    ],
)
async def test_videos_are_made_from_videos(
    call: Calling, script: Script, name: str, arguments: tuple[str, ...], path: str, body: dict[str, Any]
) -> None:
    """Each by its own route, with a key of its own."""
    script.replies = [video()]
    await call(name, *arguments)
    assert sent(script) == [("POST", path)]
    assert json.loads(script.requests[0].content) == body
    assert script.requests[0].headers["idempotency-key"]


async def test_a_create_that_is_sent_again_has_the_same_key(call: Calling, script: Script) -> None:
    """Whatever became of the first tries, it is one video; another create has another key."""
    refused = httpx.ConnectError("refused")
    busy = error(429, {"retry-after": "0"})
    script.replies = [refused, busy, httpx.ReadError("broke"), video(), video()]
    await call("create", "a cat")
    await call("create", "a cat")
    keys = [request.headers["idempotency-key"] for request in script.requests]
    assert len(set(keys[:4])) == 1
    assert keys[4] != keys[0]


async def test_a_key_of_the_callers_own_is_sent(call: Calling, script: Script) -> None:
    """So that it holds over a restart of the caller."""
    script.replies = [video()]
    await call("create", "a cat", idempotency_key="order-7")
    assert script.requests[0].headers["idempotency-key"] == "order-7"


async def test_tries_are_bounded(call: Calling, script: Script) -> None:
    """Four in all, then the error."""
    script.replies = [error(503, {"retry-after": "0"}) for _ in range(9)]
    with pytest.raises(ServerFailed):
        await call("create", "a cat")
    assert len(script.requests) == 4


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (503, {"x-should-retry": "false", "retry-after": "0"}),
        (429, {"retry-after": "3600"}),
        (500, {}),
        (400, {}),
    ],
)
async def test_what_would_not_help_is_not_tried(
    call: Calling, script: Script, status: int, headers: dict[str, str]
) -> None:
    """One request, and its error at once: when told so, when an hour is asked for, and for other errors."""
    script.replies = [error(status, headers)]
    with pytest.raises(ApiError):
        await call("create", "a cat")
    assert len(script.requests) == 1


async def test_a_delete_that_may_have_arrived_is_not_repeated(call: Calling, script: Script) -> None:
    """The second answer would be that there is no such video. One that never left is."""
    script.replies = [httpx.ConnectError("refused"), httpx.Response(200, json={"deleted": True})]
    await call("delete", "video_1")
    script.replies = [httpx.ReadError("broke")]
    with pytest.raises(ConnectionFailed, match="the connection to http://test broke: broke"):
        await call("delete", "video_1")
    assert sent(script) == [("DELETE", "/v1/videos/video_1")] * 3


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (401, InvalidApiKey),
        (404, NotFound),
        (413, BadRequest),
        (429, Overloaded),
        (500, ServerFailed),
    ],
)
async def test_errors_carry_what_the_server_said(
    call: Calling, script: Script, status: int, kind: type[ApiError]
) -> None:
    """The status decides the class; code, param and request id come along."""
    headers = {"x-request-id": "req_1", "x-should-retry": "false"}
    script.replies = [error(status, headers, message="a sentence", code="c", param="size")]
    with pytest.raises(ApiError, match="a sentence") as caught:
        await call("get", "video_1")
    raised = caught.value
    assert type(raised) is kind
    assert (raised.status, raised.code, raised.param, raised.request_id) == (status, "c", "size", "req_1")


async def test_an_error_page_of_a_proxy_is_quoted(call: Calling, script: Script) -> None:
    """No error body of ours in it."""
    script.replies = [httpx.Response(403, text="<h1>go away</h1>")]
    with pytest.raises(BadRequest, match="HTTP 403 Forbidden: <h1>go away</h1>"):
        await call("get", "video_1")


@pytest.mark.parametrize("name", ["get", "wait", "events"])
async def test_another_servers_answer_is_named_as_such(call: Calling, script: Script, name: str) -> None:
    """A 200 with a page in it."""
    script.replies = [httpx.Response(200, html="hello")]
    with pytest.raises(UnexpectedAnswer, match="Kinema server"):
        await call(name, "video_1")


async def test_no_server_is_one_sentence(call: Calling, script: Script) -> None:
    """After its tries."""
    script.replies = [httpx.ConnectError("[Errno 111]") for _ in range(4)]
    with pytest.raises(ConnectionFailed, match=r"^no server answers at http://test$"):
        await call("get", "video_1")


async def test_list_asks_for_page_after_page(call: Calling, script: Script) -> None:
    """Each after the last id of the one before."""
    pages = [(["video_3", "video_2"], True), (["video_1"], False)]
    script.replies = [
        httpx.Response(
            200,
            json={
                "object": "list",
                "data": [VIDEO | {"id": i} for i in ids],
                "last_id": ids[-1],
                "has_more": has_more,
            },
        )
        for ids, has_more in pages
    ]
    assert [found.id for found in await call("list", page_size=2)] == ["video_3", "video_2", "video_1"]
    assert [request.url.params.get("after") for request in script.requests] == [None, "video_2"]


@pytest.mark.parametrize("name", ["list", "list_rows"])
async def test_what_is_looked_for_is_asked_for_on_each_page(call: Calling, script: Script, name: str) -> None:
    """Also behind a page that is empty."""
    pages = [([], "video_9"), (["video_1"], "video_1")]
    script.replies = [
        httpx.Response(
            200, json={"data": [VIDEO | {"id": i} for i in ids], "last_id": last, "has_more": last == "video_9"}
        )
        for ids, last in pages
    ]
    found = await call(name, status=["queued", "failed"], model="m", prompt="a b", starred=False, order="asc")
    assert [video.id for video in found] == ["video_1"]
    first, second = (dict(request.url.params) for request in script.requests)
    asked = {"status": "queued,failed", "model": "m", "prompt": "a b", "starred": "false", "order": "asc"}
    assert first == asked | {"limit": "100"} | ({"fields": "slim"} if name == "list_rows" else {})
    assert second == first | {"after": "video_9"}


async def test_wait_looks_as_often_as_the_server_says(call: Calling, script: Script) -> None:
    """And returns a failed video like any other."""
    pause = {"openai-poll-after-ms": "0"}
    failed = video(status="failed", error={"code": "cancelled", "message": "It was cancelled."})
    script.replies = [httpx.Response(200, json=VIDEO, headers=pause) for _ in range(2)] + [failed]
    ended = await call("wait", "video_1")
    assert (ended.status, ended.is_cancelled, ended.is_over) == ("failed", True, True)


async def test_wait_ends_in_time(call: Calling, script: Script) -> None:
    """The video goes on."""
    script.replies = [video(status="in_progress", progress=40)]
    with pytest.raises(WaitedTooLong, match=r"video_1 is still in_progress \(40%\) and goes on"):
        await call("wait", "video_1", timeout_s=0)


async def test_a_broken_download_begins_anew(call: Calling, script: Script, tmp_path: Path) -> None:
    """The file is whole or not there, and nothing else is left."""
    path = tmp_path / "new" / "x.mp4"
    script.replies = [
        httpx.Response(200, stream=Dropping([b"wrong, and longer"])),
        httpx.Response(200, content=b"right"),
    ]
    assert await call("download", "video_1", path) == path
    assert path.read_bytes() == b"right"
    script.replies = [httpx.Response(200, stream=Dropping([b"half"])) for _ in range(4)]
    with pytest.raises(ConnectionFailed):
        await call("download", "video_1", path)
    assert path.read_bytes() == b"right"
    assert list(path.parent.iterdir()) == [path]


async def test_a_live_video_comes_in_pieces(call: Calling, script: Script) -> None:
    """As they come; a server that cannot answer now is asked again."""
    script.replies = [error(503), httpx.Response(200, content=b"head and fragments")]
    assert b"".join(await call("live", "video_1")) == b"head and fragments"
    assert {request.url.query for request in script.requests} == {b"variant=live"}


async def test_a_live_video_that_breaks_off_is_an_error(call: Calling, script: Script) -> None:
    """It is not asked for again: its bytes would begin anew."""
    script.replies = [httpx.Response(200, stream=Dropping([b"head"]))]
    with pytest.raises(ConnectionFailed):
        await call("live", "video_1")
    assert len(script.requests) == 1


async def test_a_video_that_ended_without_a_frame_is_not_live(call: Calling, script: Script) -> None:
    script.replies = [error(404, code="no_video")]
    with pytest.raises(NotFound):
        await call("live", "video_1")


async def test_a_download_without_a_path_is_bytes(call: Calling, script: Script) -> None:
    """Of any variant."""
    script.replies = [httpx.Response(200, content=b"webp")]
    assert await call("download", "video_1", variant="thumbnail") == b"webp"
    assert sent(script) == [("GET", "/v1/videos/video_1/content?variant=thumbnail")]


async def test_a_manifest_is_a_value(call: Calling, script: Script) -> None:
    """With what a newer service adds; anything else at that address is said to be wrong."""
    said = {"kinema": "1", "request": {"seed": 7}, "made_by": {}, "encoder": {}, "timings": {}, "video": {}}
    said |= {"attempt": 1, "made_at": 1.5, "inputs": [{"role": "edits", "sha256": "00", "size_bytes": 1}], "more": 1}
    script.replies = [httpx.Response(200, json=said), httpx.Response(200, json={})]
    manifest = await call("manifest", "video_1")
    assert (manifest.request["seed"], manifest.inputs[0].role, manifest.more) == (7, "edits", 1)
    assert sent(script) == [("GET", "/v1/videos/video_1/content?variant=manifest")]
    with pytest.raises(UnexpectedAnswer):
        await call("manifest", "video_1")


async def test_an_id_is_one_part_of_the_path(call: Calling, script: Script) -> None:
    """Whatever is in it; an empty one is refused here."""
    script.replies = [error(404)]
    with pytest.raises(NotFound):
        await call("get", "../models?x")
    assert sent(script) == [("GET", "/v1/videos/..%2Fmodels%3Fx")]
    with pytest.raises(InvalidRequest, match="empty"):
        await call("get", "")


@pytest.mark.parametrize("url", ["http://test", "http://test/", "http://test/v1", "http://test/v1/"])
def test_the_address_may_end_as_the_sdks_want_it(url: str) -> None:
    """With /v1 or without."""
    with Client(url) as client:
        assert client.base_url == "http://test"


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://x:port"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    """With one that is."""
    with pytest.raises(ConfigError, match=r"is not the address of a server; give for instance http://127.0.0.1:8000"):
        Client(url)


def test_a_password_in_the_address_is_not_repeated() -> None:
    """By no error that names the address."""
    with pytest.raises(ConfigError) as refused:
        Client("ftp://me:hunter2@x")
    assert "hunter2" not in refused.value.message
    for exc in (httpx.ConnectError("x"), httpx.ReadTimeout("x"), httpx.ReadError("x")):
        failed = connection_failed(exc, "http://me:hunter2@127.0.0.1:1")
        assert "http://me:***@127.0.0.1:1" in str(failed)


def test_an_api_key_with_line_ends_is_refused() -> None:
    """No header could carry it, and the error does not repeat it."""
    with pytest.raises(ConfigError, match="the API key has characters") as caught:
        Client(api_key="se\ncret")
    assert "cret" not in caught.value.message


def test_all_errors_are_client_errors() -> None:
    """One class catches them."""
    assert issubclass(ApiError, ClientError)
    assert issubclass(ConnectionFailed, ClientError)
