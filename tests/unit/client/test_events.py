"""The events of a video over connections that break."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from kinema.client import (
    CancelledEvent,
    CompletedEvent,
    ConnectionFailed,
    NotFound,
    PreviewEvent,
    ProgressEvent,
    QueuedEvent,
    StartedEvent,
    UnexpectedAnswer,
    VideoEvent,
)
from tests.unit.client.conftest import VIDEO, Calling, Dropping, Script, error

KIND = {"content-type": "text/event-stream"}
BASE = {"id": "video_1", "object": "video.event", "status": "in_progress", "progress": 30}
QUEUED = (1, "queued", BASE | {"status": "queued", "progress": 0})
STARTED = (2, "started", BASE | {"progress": 0, "attempt": 1})
PROGRESS = (3, "progress", BASE | {"stage": "denoise", "step": 1, "total": 3})
COMPLETED = (4, "completed", VIDEO | {"status": "completed", "progress": 100})


def encoded(*events: tuple[int, str, dict[str, Any]]) -> list[bytes]:
    """In small pieces, as a network may hand them over."""
    text = b": hello\n\n"
    for seq, kind, data in events:
        text += f"id: {seq}\nevent: {kind}\ndata: {json.dumps(data)}\n\n: keep-alive\n\n".encode()
    return [text[start : start + 7] for start in range(0, len(text), 7)]


def whole(*events: tuple[int, str, dict[str, Any]]) -> httpx.Response:
    return httpx.Response(200, headers=KIND, content=b"".join(encoded(*events)))


def broken(*events: tuple[int, str, dict[str, Any]], rest: bytes = b"") -> httpx.Response:
    return httpx.Response(200, headers=KIND, stream=Dropping([*encoded(*events), rest]))


async def test_events_are_typed_and_end_with_the_video(call: Calling, script: Script) -> None:
    """One class for each type, and one connection."""
    script.replies = [whole(QUEUED, STARTED, PROGRESS, COMPLETED)]
    events = await call("events", "video_1")
    assert [type(event) for event in events] == [QueuedEvent, StartedEvent, ProgressEvent, CompletedEvent]
    assert [event.seq for event in events] == [1, 2, 3, 4]
    assert (events[2].stage, events[2].step, events[2].total, events[2].progress) == ("denoise", 1, 3, 30)
    assert events[3].video.status == "completed"


async def test_a_broken_connection_goes_on_after_the_last_event(call: Calling, script: Script) -> None:
    """Half an event does not count; what was seen does not come again, even from a server that repeats it."""
    half = b'id: 3\nevent: progress\ndata: {"id'
    script.replies = [
        broken(QUEUED, STARTED, rest=half),
        httpx.ConnectError("the server starts again"),
        error(503),
        broken(STARTED, PROGRESS),
        whole(COMPLETED),
    ]
    events = await call("events", "video_1")
    assert [event.seq for event in events] == [1, 2, 3, 4]
    asked = [request.headers.get("last-event-id") for request in script.requests]
    assert asked == [None, "2", "2", "2", "3"]


async def test_an_early_end_is_a_break(call: Calling, script: Script) -> None:
    """As a server ends its streams when it stops."""
    script.replies = [whole(QUEUED), whole(STARTED, PROGRESS), whole(COMPLETED)]
    assert len(await call("events", "video_1")) == 4


async def test_a_server_that_stays_away_is_given_up(call: Calling, script: Script) -> None:
    """After ten connections without an event, once there was one."""
    script.replies = [broken(QUEUED)] + [httpx.ConnectError("refused") for _ in range(99)]
    with pytest.raises(ConnectionFailed, match="no server answers at http://test"):
        await call("events", "video_1")
    assert len(script.requests) == 11
    script.requests.clear()
    script.replies = [httpx.ConnectError("refused") for _ in range(99)]
    with pytest.raises(ConnectionFailed, match="no server answers at http://test"):
        await call("events", "video_1")
    assert len(script.requests) == 4


async def test_a_video_that_was_deleted_meanwhile_is_not_found(call: Calling, script: Script) -> None:
    """Its stream ends early, and the next connection says why."""
    script.replies = [whole(QUEUED), error(404, code="not_found")]
    with pytest.raises(NotFound):
        await call("events", "video_1")


async def test_a_cancelled_video_ends_with_its_own_event(call: Calling, script: Script) -> None:
    """Though its status reads failed."""
    cancelled = VIDEO | {"status": "failed", "error": {"code": "cancelled", "message": "It was cancelled."}}
    script.replies = [whole((1, "cancelled", cancelled))]
    (event,) = await call("events", "video_1")
    assert isinstance(event, CancelledEvent)
    assert event.video.is_cancelled


async def test_a_preview_has_its_picture(call: Calling, script: Script) -> None:
    """As bytes."""
    script.replies = [whole((1, "preview", BASE | {"step": 5, "total": 20, "b64_jpeg": "anBlZw=="}), COMPLETED)]
    first, _ = await call("events", "video_1")
    assert isinstance(first, PreviewEvent)
    assert (first.step, first.total, first.jpeg) == (5, 20, b"jpeg")


async def test_an_event_of_a_newer_server_is_kept(call: Calling, script: Script) -> None:
    """With all that it says."""
    script.replies = [whole((1, "paused", BASE | {"url": "http://x"}), COMPLETED)]
    first, _ = await call("events", "video_1")
    assert type(first) is VideoEvent
    assert (first.type, first.url) == ("paused", "http://x")


async def test_an_event_that_makes_no_sense_is_an_error(call: Calling, script: Script) -> None:
    """And not skipped in silence."""
    script.replies = [whole((1, "progress", {"id": "video_1"}))]
    with pytest.raises(UnexpectedAnswer, match="sent an event that this client cannot read"):
        await call("events", "video_1")


async def test_events_so_far_end_with_the_stream(call: Calling, script: Script) -> None:
    """Without following, the server is asked for them alone and nothing more is waited for; a break is made good."""
    script.replies = [broken(QUEUED), whole(STARTED)]
    assert [event.seq for event in await call("events", "video_1", is_following=False)] == [1, 2]
    assert [request.url.query for request in script.requests] == [b"follow=false"] * 2
    assert script.requests[1].headers["last-event-id"] == "1"
    script.replies = [whole(QUEUED, COMPLETED)]
    await call("events", "video_1")
    assert script.requests[2].url.query == b""
