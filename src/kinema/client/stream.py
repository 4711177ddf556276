"""The events of a video, decoded from one connection or several, of which each continues where the last one broke."""

from __future__ import annotations

import json
from typing import Any

import httpx

from kinema.client.calls import Call, Outcome, Retries
from kinema.client.errors import UnexpectedAnswer
from kinema.client.models import EndEvent, VideoEvent, read_event
from kinema.client.submission import VideoRef, id_of
from kinema.masking import masked

# Tries after a stream has begun. The pauses grow to 5 s: in all about 40 s, in which a service can start again.
_RECONNECTS = 10
# The server sends something every 15 s; after three times that the connection is dead.
_TIMEOUT = httpx.Timeout(45.0, connect=5.0)
# An id of the server has fewer digits.
_MAX_ID_DIGITS = 19
_KIND = "text/event-stream"
_ENDED_EARLY = httpx.RemoteProtocolError("the events ended before the video did")


class EventCursor:
    """Where a client stands in the events of a video.

    Lines go in, events come out (WHATWG's text/event-stream). After a break ``arguments`` ask for the events that
    follow the last one that was seen.
    """

    def __init__(self, video: VideoRef, url: str, retries: Retries, *, is_following: bool) -> None:
        self._path = f"/v1/videos/{id_of(video)}/events"
        self._url = url
        self._retries = retries
        self._is_following = is_following
        self._last_seq = 0
        self._kind, self._seq, self._data = "", 0, ""
        self.is_over = False

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of httpx's ``stream``."""
        return self._call().arguments() | {"timeout": _TIMEOUT}

    def begin(self, response: httpx.Response) -> None:
        """Begin to read an answer. Raises ClientError when it is not a stream of events."""
        self._call().result(response, self._url)
        self._kind, self._data = "", ""

    def feed(self, line: str) -> VideoEvent | None:
        """Take a line, and return the event that is complete with it, or None. Raises UnexpectedAnswer."""
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._kind = value
        elif name == "id" and value.isascii() and value.isdigit() and len(value) < _MAX_ID_DIGITS:
            self._seq = int(value)
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

    def _call(self) -> Call[None]:
        headers = {"accept": _KIND}
        if self._last_seq:
            headers["last-event-id"] = str(self._last_seq)
        params = {} if self._is_following else {"follow": "false"}
        return Call("GET", self._path, self._check, params=params, headers=headers)

    def _check(self, response: httpx.Response) -> None:
        if not response.headers.get("content-type", "").startswith(_KIND):
            raise UnexpectedAnswer(
                f"{masked(str(response.url))} answered without events; is this the address of a Kinema server?"
            )

    def _dispatch(self) -> VideoEvent | None:
        kind, data = self._kind, self._data
        self._kind, self._data = "", ""
        if not data or self._seq <= self._last_seq:  # a keep-alive, or one that was seen before the break
            return None
        try:
            event = read_event(kind, self._seq, json.loads(data))
        except ValueError as exc:
            raise UnexpectedAnswer(
                f"{masked(self._url)} sent an event that this client cannot read; is the server newer than the client?"
            ) from exc
        self._last_seq = self._seq
        self._retries = Retries(_RECONNECTS, self._retries.backoff_s)
        self.is_over = isinstance(event, EndEvent)
        return event
