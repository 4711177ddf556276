"""What the SDK raises: a class for every status, with the message, the code, the parameter and the request's id."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI

from tests.e2e.openai_sdk.conftest import Connect
from tests.e2e.openai_sdk.sdk import SMALL, connect, create, finish, picture, wait_for
from tests.server_process import Server

Call = Callable[[OpenAI], Any]
SLOW = {"prompt": "[slow] waves", "num_inference_steps": 200}


def raised(client: OpenAI, call: Call) -> openai.APIStatusError:
    """The exception of the call, whose body and headers are as those of every error."""
    with pytest.raises(openai.APIStatusError) as caught:
        call(client)
    error = caught.value
    body = error.response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() >= {"message", "type", "param", "code"}
    assert body["error"] == error.body
    assert error.response.headers["content-type"] == "application/json"
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"] in str(error)
    assert isinstance(error.code, str)
    assert error.request_id == error.response.headers["x-request-id"] != ""
    return error


def made_then(ask: dict[str, str]) -> Call:
    def call(client: OpenAI) -> Any:
        video = finish(client, create(client))
        return client.videos.download_content(video.id, extra_headers=ask)

    return call


@pytest.mark.parametrize(
    ("call", "kind", "status", "code"),
    [
        (lambda it: create(it, seed="x"), openai.BadRequestError, 400, "invalid_value"),
        (lambda it: it.post("/videos", body={}, cast_to=object), openai.BadRequestError, 400, "invalid_value"),
        (lambda it: it.post("/videos", body=[1], cast_to=object), openai.BadRequestError, 400, "invalid_value"),
        (lambda it: it.with_options(api_key="no").videos.list(), openai.AuthenticationError, 401, "invalid_api_key"),
        (lambda it: it.videos.retrieve("video_x"), openai.NotFoundError, 404, "not_found"),
        (lambda it: it.get("/nothing", cast_to=object), openai.NotFoundError, 404, "not_found"),
        (lambda it: it.put("/videos", cast_to=object), openai.APIStatusError, 405, "method_not_allowed"),
        (lambda it: it.get("/videos/edits", cast_to=object), openai.APIStatusError, 405, "method_not_allowed"),
        (
            lambda it: it.videos.remix("video_x", prompt="x", extra_headers={"Content-Type": "text/plain"}),
            openai.APIStatusError,
            415,
            "unsupported_media_type",
        ),
        (made_then({"Range": "bytes=9999999-"}), openai.APIStatusError, 416, "range_not_satisfiable"),
        (
            lambda it: it.post(
                "/videos/generations", body=SMALL | {"prompt": "waves [fail]", "num_frames": 5}, cast_to=object
            ),
            openai.InternalServerError,
            500,
            "engine_failed",
        ),
    ],
    ids=["400", "empty", "array", "401", "404", "404_route", "405", "405_posted_to", "415", "416", "500"],
)
def test_every_refusal_is_read_by_the_sdk(
    client: OpenAI, call: Call, kind: type[openai.APIStatusError], status: int, code: str
) -> None:
    """The class, the status and the code."""
    error = raised(client, call)
    assert (type(error), error.status_code, error.code) == (kind, status, code)
    assert error.type == ("server_error" if status >= 500 else "invalid_request_error")


def test_no_key_is_a_wrong_key(fake_server: Server) -> None:
    """401 without a header, on every method and on unknown routes alike, before the body is read."""
    with httpx2.Client(base_url=fake_server.url) as http:
        for method, path in [("GET", "/v1/videos"), ("POST", "/v1/videos"), ("DELETE", "/v1/videos/video_x")]:
            answer = http.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["x-request-id"]


def test_a_body_that_is_too_large_is_refused(narrow: OpenAI) -> None:
    """413 while it is sent; the connection of the client stays good."""
    error = raised(narrow, lambda it: create(it, input_reference=picture() + bytes(3 * 2**20)))
    assert (type(error), error.status_code, error.code) == (openai.APIStatusError, 413, "payload_too_large")
    assert narrow.videos.list().data == []


def test_a_full_queue_says_when_to_come_again(narrow: OpenAI) -> None:
    """429 with a Retry-After that the SDK honours; what is in the queue is untouched."""
    running = create(narrow, **SLOW)
    wait_for(narrow, running, lambda video: video.status == "in_progress")
    waiting = create(narrow)
    error = raised(narrow, create)
    assert (type(error), error.status_code, error.code) == (openai.RateLimitError, 429, "overloaded")
    assert error.type == "rate_limit_error"
    assert 0 < float(error.response.headers["retry-after"]) <= 120
    assert [video.id for video in narrow.videos.list()] == [waiting.id, running.id]


def test_a_full_queue_is_waited_out_by_the_sdk(narrow: OpenAI, narrow_server: Server) -> None:
    """It tries again by itself, and gets in once there is room."""
    running = create(narrow, **SLOW)
    wait_for(narrow, running, lambda video: video.status == "in_progress")
    waiting, tries = create(narrow), []

    def make_room(answer: httpx2.Response) -> None:
        tries.append(answer.status_code)
        if answer.status_code == 429:
            answer.headers["retry-after"] = "0.01"
            narrow.videos.delete(waiting.id)

    with openai.DefaultHttpxClient(event_hooks={"response": [make_room]}) as http:
        video = create(connect(narrow_server, http_client=http))
    assert tries == [429, 200]
    assert video.status == "queued"


def test_storage_that_is_away_is_a_503(narrow: OpenAI, narrow_server: Server) -> None:
    """For a creation that needs it, and for a download; afterwards all is well."""
    video, files = finish(narrow, create(narrow)), narrow_server.log.parent / "files"
    files.rename(files.with_name("away"))
    files.write_text("a file where the folder should be", encoding="utf-8")
    try:
        calls: list[Call] = [
            lambda it: create(it, input_reference=picture()),
            lambda it: it.videos.download_content(video.id),
        ]
        for call in calls:
            error = raised(narrow, call)
            assert (type(error), error.status_code) == (openai.InternalServerError, 503)
            assert error.code == "storage_unavailable"
        failed = finish(narrow, create(narrow))
        assert failed.error is not None
        assert (failed.status, failed.error.code) == ("failed", "storage_unavailable")
    finally:
        files.unlink()
        shutil.move(files.with_name("away"), files)
    assert narrow.videos.download_content(video.id).content


def test_a_request_id_may_be_the_clients_own(client: OpenAI) -> None:
    """So that its log and the server's can be laid side by side."""
    raw = client.videos.with_raw_response.list(extra_headers={"x-request-id": "mine-1"})
    assert raw.request_id == "mine-1"


def test_errors_leave_the_connection_good(connected: Connect) -> None:
    """One connection, refusals and successes in turn: none breaks it."""
    client = connected(max_retries=0)
    for number in range(20):
        with pytest.raises(openai.BadRequestError):
            create(client, seed="x", input_reference=picture())
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve("video_x")
        assert create(client, seed=number).seed == number
