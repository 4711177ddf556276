"""The events of a video, or of all videos of a key, decoded from one connection or several: each continues where the
last one broke."""

from __future__ import annotations

import json
from typing import Any, Generic, TypeVar

import httpx

from kinema.client.calls import Call, Outcome, Retries
from kinema.client.errors import UnexpectedAnswer
from kinema.client.models import EndEvent, ListEvent, VideoEvent, read_event, read_list_event
from kinema.client.submission import VideoRef, id_of
from kinema.masking import masked

# Tries after a stream has begun. The pauses grow to 5 s: in all about 40 s, in which a service can start again.
_RECONNECTS = 10
# The server sends something every 15 s; after three times that the connection is dead.
_TIMEOUT = httpx.Timeout(45.0, connect=5.0)
# An id of the server is shorter, and one of a video's event has fewer digits.
_MAX_ID = 256
_MAX_ID_DIGITS = 19
_KIND = "text/event-stream"
_ENDED_EARLY = httpx.RemoteProtocolError("the events ended before the video did")

EventT = TypeVar("EventT")


class Cursor(Generic[EventT]):
    """Where a client stands in a stream of events.

    Lines go in, events come out (WHATWG's text/event-stream). After a break ``arguments`` ask for the events that
    follow the last one that was seen.
    """

    def __init__(self, path: str, url: str, retries: Retries, *, is_following: bool) -> None:
        self.is_over = False
        self._path = path
        self._url = url
        self._retries = retries
        self._is_following = is_following
        self._last_id = ""
        self._kind, self._id, self._data = "", "", ""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of httpx's ``stream``."""
        return self._call().arguments() | {"timeout": _TIMEOUT}

    def begin(self, response: httpx.Response) -> None:
        """Begin to read an answer. Raises ClientError when it is not a stream of events."""
        self._call().result(response, self._url)
        self._kind, self._data = "", ""

    def feed(self, line: str) -> EventT | None:
        """Take a line, and return the event that is complete with it, or None. Raises UnexpectedAnswer."""
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._kind = value
        elif name == "id" and len(value) <= _MAX_ID:
            self._id = value
        elif name == "data":
            self._data += value
        return None

    def ends_with(self, outcome: Outcome | None) -> bool:
        """Tell whether the events are over now that a connection has ended with this outcome."""
        self.is_over = self.is_over or (outcome is None and not self._is_following)
        return self.is_over

    def pause_after(self, outcome: Outcome | None) -> float:
        """Return the seconds until the next connection. ``outcome`` ended this one; None is an end without a reason.

        Raises ClientError when another connection would not help.
        """
        outcome = outcome or _ENDED_EARLY
        pause_s = self._retries.pause_after(outcome)
        if pause_s is None:
            self._call().result(outcome, self._url)
            raise AssertionError("result() raises for the outcome of a broken stream")
        return pause_s

    def _is_new(self, event_id: str) -> bool:
        """Tell whether the event of this id was not seen before a break."""
        raise NotImplementedError

    def _read(self, kind: str, event_id: str, data: dict[str, Any]) -> EventT:
        """Return the event. Raises ValueError when ``data`` does not describe one."""
        raise NotImplementedError

    def _call(self) -> Call[None]:
        headers = {"accept": _KIND}
        if self._last_id:
            headers["last-event-id"] = self._last_id
        params = {} if self._is_following else {"follow": "false"}
        return Call("GET", self._path, self._check, params=params, headers=headers)

    def _check(self, response: httpx.Response) -> None:
        if not response.headers.get("content-type", "").startswith(_KIND):
            raise UnexpectedAnswer(
                f"{masked(str(response.url))} answered without events; is this the address of a Kinema server?"
            )

    def _dispatch(self) -> EventT | None:
        kind, data = self._kind, self._data
        self._kind, self._data = "", ""
        if not data or not self._is_new(self._id):  # a keep-alive, or one that was seen before the break
            return None
        try:
            event = self._read(kind, self._id, json.loads(data))
        except ValueError as exc:
            raise UnexpectedAnswer(
                f"{masked(self._url)} sent an event that this client cannot read; is the server newer than the client?"
            ) from exc
        self._last_id = self._id
        self._retries = Retries(_RECONNECTS, self._retries.backoff_s)
        return event


class EventCursor(Cursor[VideoEvent]):
    """The events of one video, whose ids are numbers. They are over with the end of the video."""

    def __init__(self, video: VideoRef, url: str, retries: Retries, *, is_following: bool) -> None:
        super().__init__(f"/v1/videos/{id_of(video)}/events", url, retries, is_following=is_following)

    def _is_new(self, event_id: str) -> bool:
        return _number(event_id) > _number(self._last_id)

    def _read(self, kind: str, event_id: str, data: dict[str, Any]) -> VideoEvent:
        event = read_event(kind, _number(event_id), data)
        self.is_over = isinstance(event, EndEvent)
        return event


class ListCursor(Cursor[ListEvent]):
    """The changes of all videos of a key, which have no end."""

    def __init__(self, last_id: str | None, url: str, retries: Retries) -> None:
        super().__init__("/v1/videos/events", url, retries, is_following=True)
        self._last_id = last_id or ""

    def _is_new(self, event_id: str) -> bool:
        return event_id != self._last_id

    def _read(self, kind: str, event_id: str, data: dict[str, Any]) -> ListEvent:
        return read_list_event(kind, event_id, data)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < _MAX_ID_DIGITS else 0
