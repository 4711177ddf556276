"""A video's events as they come over one connection or several: decoding, and where the next connection goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx

from kinema.client.calls import Call, Outcome, Retries
from kinema.client.errors import UnexpectedAnswer
from kinema.client.models import EndEvent, VideoEvent, read_event
from kinema.client.submission import VideoRef, id_of

# Once the stream has begun: with pauses that grow to 5 s, about 40 s, which a service needs to start again.
_RECONNECTS = 10
# The server breaks its silence every 15 s; three times that is a dead connection.
_TIMEOUT = httpx.Timeout(45.0, connect=5.0)
_KIND = "text/event-stream"
_ENDED_EARLY = httpx.RemoteProtocolError("the events ended before the video did")


class EventCursor:
    """Where a client stands in the events of a video.

    Lines go in, events come out (WHATWG's text/event-stream). After a break ``arguments`` ask for what follows the last
    event that was seen.
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
        """For httpx's ``stream``."""
        return self._call().arguments() | {"timeout": _TIMEOUT}

    def begin(self, response: httpx.Response) -> None:
        """What came has events in it. Raises ClientError."""
        self._call().result(response, self._url)
        self._kind, self._data = "", ""

    def feed(self, line: str) -> VideoEvent | None:
        """The event that this line ends, if it ends one. Raises UnexpectedAnswer."""
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._kind = value
        elif name == "id" and value.isdigit():
            self._seq = int(value)
        elif name == "data":
            self._data += value
        return None

    def ends_with(self, outcome: Outcome | None) -> bool:
        """Whether no more events are wanted when a connection has ended so."""
        self.is_over = self.is_over or (outcome is None and not self._is_following)
        return self.is_over

    def pause_after(self, outcome: Outcome | None) -> float:
        """Seconds until the next connection; ``outcome`` is what ended this one, None for an end without a reason.

        Raises ClientError when there is no use in another one.
        """
        outcome = outcome or _ENDED_EARLY
        pause_s = self._retries.pause_after(outcome)
        if pause_s is None:
            self._call().result(outcome, self._url)
            raise AssertionError("only an outcome that is an error is asked about")
        return pause_s

    def _call(self) -> Call[None]:
        headers = {"accept": _KIND}
        if self._last_seq:
            headers["last-event-id"] = str(self._last_seq)
        params = {} if self._is_following else {"follow": "false"}
        return Call("GET", self._path, self._check, params=params, headers=headers)

    def _check(self, response: httpx.Response) -> None:
        if not response.headers.get("content-type", "").startswith(_KIND):
            raise UnexpectedAnswer(f"{response.url} answered without events; is it the address of a Kinema server?")

    def _dispatch(self) -> VideoEvent | None:
        kind, data = self._kind, self._data
        self._kind, self._data = "", ""
        if not data or self._seq <= self._last_seq:  # a keep-alive, or one that was seen before the break
            return None
        try:
            event = read_event(kind, self._seq, json.loads(data))
        except ValueError as exc:
            raise UnexpectedAnswer(
                f"{self._url} sent an event that is none of a video; is it newer than this?"
            ) from exc
        self._last_seq = self._seq
        self._retries = Retries(_RECONNECTS, self._retries.backoff_s)
        self.is_over = isinstance(event, EndEvent)
        return event
