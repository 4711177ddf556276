"""Reads the body of a request from its connection: JSON or multipart to one plain mapping of names to values.

Both encodings give the same mapping, apart from numbers and flags that arrive as text in multipart;
``request/bodies.py`` accepts both. Size and pace are looked at while the body comes in. A large body is parsed in a
thread, when it is its client's turn.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from kinema.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from kinema.request.json_text import MAX_DIGITS, parse_json
from kinema.server.disconnect import unless_gone
from kinema.server.errors import RequestStalled
from kinema.server.form_fields import fold
from kinema.server.limits import MIN_BYTES_PER_S
from kinema.server.uploads import UploadedBody, Uploads

_MAX_PARTS = 200
# A parser keeps the interpreter to itself for a tenth of a second at a time, so there is one.
_PARSERS = CapacityLimiter(1)
_PIECE_BYTES = 64 * 1024
_FORM = (
    "each field is a part with its name, the parts are divided by the boundary that content-type names, and the last "
    "boundary ends in two dashes"
)

# A file's name, and how some programs write one in other letters than those of ASCII; RFC 5987, section 3.2.
_FILE_NAME, _EXTENDED_NAME = (re.compile(rb";\s*filename%s\s*=" % mark, re.IGNORECASE) for mark in (b"", rb"\*"))

Fields = dict[str, Any]
T = TypeVar("T")


class BodyReader:
    """Reads bodies of up to ``max_bytes``; ``stall_s`` is how long one may be late, and ``uploads`` where it lies."""

    def __init__(self, uploads: Uploads, max_bytes: int, stall_s: float) -> None:
        self._uploads = uploads
        self._max_bytes = max_bytes
        self._stall_s = stall_s

    @asynccontextmanager
    async def read(
        self, request: Request, client: str, make: Callable[[Fields], T], max_bytes: int | None = None
    ) -> AsyncIterator[T]:
        """Read the body and give what ``make`` makes of its fields, in a thread if it is large. A file part is bytes.

        The body counts among all bodies until the block ends, and has its turn only while it is parsed: no other body
        waits until a film of it is decoded. Raises PayloadTooLarge, UnsupportedMediaType, RequestStalled, UploadsFull,
        StorageUnavailable, InvalidRequest for a body that cannot be read, and ClientGone.
        """
        max_bytes = max_bytes or self._max_bytes
        parse = _parser_for(request.headers)
        _check_length(_declared_length(request), max_bytes)
        with UploadedBody(self._uploads, client) as body:
            await _receive(request, body, max_bytes, self._stall_s)
            if body.is_small:
                yield make(parse(body.read()))
                return
            async with AsyncExitStack() as held:
                await unless_gone(request.receive, held.enter_async_context(self._uploads.turns.turn(client)))
                made = await to_thread.run_sync(lambda: make(parse(body.read())), limiter=_PARSERS)
            yield made


async def _receive(request: Request, body: UploadedBody, max_bytes: int, stall_s: float) -> None:
    """Fill the body from its connection. ``late_s`` is how far the client is behind the slowest pace."""
    loop, late_s, has_more = asyncio.get_running_loop(), 0.0, True
    while has_more:
        asked_at = loop.time()
        try:
            async with asyncio.timeout(stall_s - late_s):
                message = await request.receive()
        except TimeoutError as exc:
            raise RequestStalled(f"the body came too slowly for {stall_s:g} s; send it again") from exc
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        data, has_more = message.get("body", b""), message.get("more_body", False)
        late_s = max(late_s + loop.time() - asked_at - len(data) / MIN_BYTES_PER_S, 0.0)
        _check_length(body.size_bytes + len(data), max_bytes)
        await body.append(data)


def _parser_for(headers: Headers) -> Callable[[bytes], Fields]:
    """Return what parses a body of this content type. Raises UnsupportedMediaType."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return lambda body: _parse_multipart(headers, body)
    if kind == "application/json" or kind.endswith("+json"):
        return _parse_json_object
    raise UnsupportedMediaType(
        f"content-type {kind[:100]!r} is not accepted; send application/json or multipart/form-data"
    )


def _parse_json_object(body: bytes) -> dict[str, Any]:
    if body.startswith(b"--"):  # the OpenAI SDK does so when its caller sets the content type
        raise InvalidRequest("content-type says JSON and the body is a form; let the client choose the content-type")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InvalidRequest("the body is not valid UTF-8") from exc
    value = parse_json(text, "the body")
    if not isinstance(value, dict):
        raise InvalidRequest('the body must be a JSON object, for instance {"prompt": "a red circle moves right"}')
    return value


def _parse_multipart(headers: Headers, body: bytes) -> Fields:
    try:
        parts = _at_once(_read_parts(headers, body))
    except MultiPartException as exc:
        raise InvalidRequest(f"the body is not valid multipart/form-data ({exc.message.rstrip('.')}); {_FORM}") from exc
    return fold(parts)


async def _read_parts(headers: Headers, body: bytes) -> list[tuple[str, str | bytes]]:
    parser = _Parser(
        _as_latin_1(headers), _pieces(body), max_files=_MAX_PARTS, max_fields=_MAX_PARTS, max_part_size=len(body)
    )
    form = await parser.parse()
    try:
        if not parser.is_whole:
            raise MultiPartException("The closing boundary is missing.")
        parts = [(_text(name), value) for name, value in form.multi_items() if not _is_absent(value)]
        return [(name, await _part_value(name, value)) for name, value in parts]
    finally:
        await form.close()


async def _pieces(body: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(body), _PIECE_BYTES):
        yield body[start : start + _PIECE_BYTES]
    yield b""


def _at_once(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as exc:
        result: T = exc.value
        return result
    work.close()
    raise AssertionError("a part of a body in memory was waited for")


class _Parser(MultiPartParser):
    """Remembers whether the closing boundary came. Without it the last part is missing."""

    spool_max_size = sys.maxsize  # the body is in memory as a whole, so no part goes into a file of its own
    is_whole = False

    def on_headers_finished(self) -> None:
        said = self._current_part.content_disposition or b""
        if _EXTENDED_NAME.search(said) and not _FILE_NAME.search(said):
            self._current_part.content_disposition = said + b'; filename="file"'
        super().on_headers_finished()

    def on_end(self) -> None:
        self.is_whole = True


def _is_absent(value: UploadFile | str) -> bool:
    """Whether a person left the field empty: browsers send it all the same, and a file input without name and bytes."""
    if isinstance(value, UploadFile):
        return not value.filename and not value.size
    return not value


async def _part_value(field: str, value: UploadFile | str) -> str | bytes:
    if isinstance(value, UploadFile):
        return await value.read()
    return _text(value, field, param=field.partition("[")[0])


def _as_latin_1(headers: Headers) -> Headers:
    """Tell the multipart parser that all text is Latin-1, so that each byte becomes a character.

    By itself it reads text that is not UTF-8 as Latin-1, in silence. ``_text`` decodes the bytes strictly.
    """
    return Headers({"content-type": headers["content-type"] + "; charset=latin-1"})


def _text(latin_1: str, name: str = "the body", param: str | None = None) -> str:
    try:
        return latin_1.encode("latin-1").decode()
    except UnicodeError as exc:
        hint = "; the part of a file needs a file name" if param else ""
        raise InvalidRequest(f"{name} is not valid UTF-8{hint}", param=param) from exc


def _check_length(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise PayloadTooLarge(f"the request body is too large; at most {max_bytes / 2**20:g} MiB are accepted")


def _declared_length(request: Request) -> int:
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else 0
