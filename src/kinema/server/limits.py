"""uvicorn's HTTP/1.1 protocol within limits: of a request's head, of time, and of what a client leaves unread.

uvicorn and httptools parse and have none of these. A request that goes beyond them is answered in the shape of all
errors, and its connection is closed; nothing of it reaches the application. The time limits of bodies are in
``body.py``, where they are read; the limits of connections are in ``connections.py``.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from secrets import token_hex
from typing import Any

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from kinema.errors import KinemaError
from kinema.server.connections import Connections
from kinema.server.disconnect import cuttable_by
from kinema.server.errors import (
    HeadersTooLarge,
    MalformedRequest,
    RequestStalled,
    TooManyConnections,
    UrlTooLong,
    response_for,
)

# The first line and all headers. Common servers take 8 to 64 KiB.
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
MAX_URL_BYTES = 8 * 1024
# The sizes, extensions and trailers of a body's chunks, for each byte of its content, beyond MAX_HEAD_BYTES. In chunks
# of a few bytes a body takes a thousand times longer to read than in large ones.
MAX_FRAMING = 1 / 8
# Requests that one connection may send before the first of them is answered.
MAX_PIPELINED = 16
# What a client may be slower than for a while, in both directions: 32 MiB take an hour.
MIN_BYTES_PER_S = 8 * 1024
# A client that was refused reads the answer meanwhile, and may still send; closing at once would take the answer away.
_LINGER_S = 2.0
# How long the rest of a body may come that was answered before it was whole. After that the connection closes.
_DRAIN_S = 5.0


class _RefusedError(Exception):
    """Ends the parser's work; ``error`` of the protocol says why."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection; one that is not welcome hears so at once."""

    def __init__(self, connections: Connections, *, is_welcome: bool, **given: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(**given)
        self._is_welcome = is_welcome
        self.address: str | None = None
        self._connections = connections
        self._is_in_head = True
        # Bytes since the last result of the parser: a head, or a part of a body.
        self._pending_bytes = 0
        self._has_result = False
        # Of a body: all bytes, and those of the content, without what frames its chunks.
        self._raw_bytes = 0
        self._content_bytes = 0
        # When the head or the rest of a body began to be waited for; None: nothing is.
        self._since: float | None = None
        self._error: KinemaError | None = None
        self._is_refused = False
        self._closing_since: float | None = None
        self._unsent_bytes = 0
        self._late_s = 0.0
        self._looked_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else None
        self._since = self.loop.time()
        self._connections.add(self, is_welcome=self._is_welcome)
        if not self._is_welcome:
            self._refuse(TooManyConnections())

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)
        super().connection_lost(exc)

    def give_way(self) -> None:
        self.transport.abort()

    # Reading

    def data_received(self, data: bytes) -> None:
        """Parse what came in pieces, each of which ends at the latest where a head would be too large."""
        if self._is_in_head and self._since is None:
            self._since = self.loop.time()
        while data and not self._is_refused and not self.transport.is_closing():
            length = MAX_HEAD_BYTES - self._pending_bytes
            piece, data = data[:length], data[length:]
            self._parse(piece)

    def _parse(self, piece: bytes) -> None:
        was_in_head, self._has_result = self._is_in_head, False
        super().data_received(piece)
        self._pending_bytes = 0 if self._has_result else self._pending_bytes + len(piece)
        if self._is_refused:
            return
        if not self._is_in_head:
            self._raw_bytes += 0 if was_in_head else len(piece)
            self._connections.set_idle(self)
        if self._pending_bytes >= MAX_HEAD_BYTES:
            self._refuse(HeadersTooLarge() if self._is_in_head else _badly_framed())
        elif self._raw_bytes > self._content_bytes * (1 + MAX_FRAMING) + MAX_HEAD_BYTES:
            self._refuse(_badly_framed())

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._error = UrlTooLong()
            raise _RefusedError

    def on_header(self, name: bytes, value: bytes) -> None:
        # After the body come trailers. They would be read as headers, after these were checked.
        if not self._is_in_head:
            return
        if len(self.headers) >= MAX_HEADERS:
            self._error = HeadersTooLarge()
            raise _RefusedError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._error = TooManyConnections(f"at most {MAX_PIPELINED} requests are taken ahead of their answers")
            raise _RefusedError
        super().on_headers_complete()
        self.scope["extensions"] = cuttable_by(partial(self._cut, self.cycle))
        self._is_in_head, self._has_result, self._since = False, True, None
        self._raw_bytes = self._content_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._has_result = True
        self._content_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_head, self._has_result, self._since = True, True, None
        if not self.cycle.response_complete:
            self._connections.set_busy(self)

    # Answering

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() or not self.cycle.response_complete:
            return
        if self._is_refused:
            self._end_with(response_for(self._error or MalformedRequest()))
            return
        self._connections.set_idle(self)
        if not self._is_in_head:
            self._since = self.loop.time()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own words
        """Answer what the parser did not take, or what a limit above refused."""
        self._refuse(self._error or MalformedRequest())

    def _cut(self, cycle: RequestResponseCycle) -> None:
        """Close the connection after what was sent of this answer, so that its client sees that it is not whole."""
        cycle.disconnected = True
        cycle.message_event.set()
        self.transport.close()

    def _refuse(self, error: KinemaError) -> None:
        """Answer with the error and close, when earlier requests of this connection are answered.

        Where an answer to this very request has begun, it is cut off.
        """
        self._is_refused, self._error, self._since = True, error, None
        if self.cycle is None or self.cycle.response_complete:
            self._end_with(response_for(error))
        elif not self._is_in_head and (self.pipeline or self.cycle.response_started):
            self.transport.abort()
        elif not self._is_in_head:
            self._end_with(response_for(error))

    def _end_with(self, response: Response) -> None:
        """Send the last answer of this connection. Its client closes, or is cut off when it has had time to read."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        self._unset_keepalive_if_required()
        headers = [*response.raw_headers, (b"x-request-id", f"req_{token_hex(16)}".encode()), (b"connection", b"close")]
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(STATUS_LINE[response.status_code] + b"".join(lines) + b"\r\n" + bytes(response.body))
        with suppress(OSError, NotImplementedError):
            self.transport.write_eof()
        self._closing_since = self.loop.time()

    # Time

    def look(self, now: float) -> None:
        elapsed_s, self._looked_at = now - (self._looked_at or now), now
        if self._is_unread(elapsed_s):
            self.transport.abort()
        elif self._closing_since is not None:
            if now - self._closing_since > _LINGER_S:
                self.transport.abort()
        elif self._since is not None:
            self._look_at_request(now - self._since)

    def _look_at_request(self, waited_s: float) -> None:
        """Close when the head, or the rest of a body that was answered already, does not come."""
        if not self._is_in_head:
            if waited_s > _DRAIN_S:
                self.transport.abort()
        elif waited_s > self._connections.head_s:
            if self._pending_bytes:
                self._refuse(RequestStalled(f"the headers did not come within {self._connections.head_s:g} s"))
            else:
                self.transport.close()

    def _is_unread(self, elapsed_s: float) -> bool:
        """Whether the client has left what was sent to it unread, or reads too slowly, for too long."""
        unsent, before = self.transport.get_write_buffer_size(), self._unsent_bytes
        self._unsent_bytes = unsent
        if not unsent or not before:
            self._late_s = 0.0
            return False
        self._late_s = max(self._late_s + elapsed_s - max(before - unsent, 0) / MIN_BYTES_PER_S, 0.0)
        if unsent >= before:
            self._connections.set_idle(self)
        return self._late_s > self._connections.stall_s

    def resume_writing(self) -> None:
        self._unsent_bytes = 0
        if self._is_in_head and not self.cycle.response_complete:
            self._connections.set_busy(self)
        super().resume_writing()


def _badly_framed() -> MalformedRequest:
    return MalformedRequest("the chunks of the body are too small, or have too much beside them; send larger ones")
