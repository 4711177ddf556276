"""Reads the body of a request from its connection: JSON or multipart to one plain mapping of names to values.

Both encodings give the same mapping, apart from numbers and flags that arrive as text in multipart;
``request/bodies.py`` accepts both. The size is counted while the body comes in.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from kinema.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from kinema.request.json_text import MAX_DIGITS, parse_json
from kinema.server.errors import BodyStalled

_MAX_PARTS = 200
# Whatever is in a body of this size, two milliseconds parse it. A larger one is parsed in a thread, one at a time.
_PARSED_AT_ONCE_BYTES = 16 * 1024
_PARSERS = CapacityLimiter(1)
# The longest silence, as long as common proxies wait. A slow client that goes on sending may take longer in all.
STALLED_AFTER_S = 60.0
_FORM = (
    "each field is a part with its name, the parts are divided by the boundary that content-type names, and the last "
    "boundary ends in two dashes"
)
T = TypeVar("T")
_NAME = re.compile(r"([^\[\]]+)(?:\[([^\[\]]*)\])?")


async def read_body(request: Request, max_bytes: int) -> dict[str, Any]:
    """Read the body and return its fields. A file part is bytes.

    Raises PayloadTooLarge, UnsupportedMediaType, BodyStalled, and InvalidRequest for a body that cannot be read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    _check_length(_declared_length(request), max_bytes)
    limited = Request(_as_latin_1(request.scope), _counted(request.receive, max_bytes))
    if kind == "multipart/form-data":
        return await _read_multipart(limited, max_bytes)
    if kind == "application/json" or kind.endswith("+json"):
        body = await limited.body()
        return await beside_loop(len(body), lambda: _parse_json_object(body))
    raise UnsupportedMediaType(
        f"content-type {kind[:100]!r} is not accepted; send application/json or multipart/form-data"
    )


async def worked_out(request: Request, work: Callable[[], T]) -> T:
    """Do the work on the fields of the request's body, as ``beside_loop``: texts in it may be JSON or base64."""
    is_told = "transfer-encoding" not in request.headers
    return await beside_loop(_declared_length(request) if is_told else _PARSED_AT_ONCE_BYTES + 1, work)


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


async def _read_multipart(request: Request, max_bytes: int) -> dict[str, Any]:
    stream = request.stream()
    parser = _Parser(request.headers, stream, max_files=_MAX_PARTS, max_fields=_MAX_PARTS, max_part_size=max_bytes)
    try:
        form = await parser.parse()
        try:
            if not parser.is_whole:
                raise MultiPartException("The closing boundary is missing.")
            parts = [(_text(name), await _part_value(name, value)) for name, value in form.multi_items()]
        finally:
            await form.close()
    except MultiPartException as exc:
        raise InvalidRequest(f"the body is not valid multipart/form-data ({exc.message.rstrip('.')}); {_FORM}") from exc
    return _fold(parts)


class _Parser(MultiPartParser):
    """Remembers whether the closing boundary came. Without it the last part is missing."""

    is_whole = False

    def on_end(self) -> None:
        self.is_whole = True


async def _part_value(name: str, value: UploadFile | str) -> str | bytes:
    if isinstance(value, UploadFile):
        return await value.read()
    field = _text(name)
    return await beside_loop(len(value), lambda: _text(value, field, param=field.partition("[")[0]))


async def beside_loop(num_bytes: int, work: Callable[[], T]) -> T:
    """Do the work on what a client sent: at once for a few bytes, else in a thread, so that nobody else waits."""
    if num_bytes <= _PARSED_AT_ONCE_BYTES:
        return work()
    return await to_thread.run_sync(work, limiter=_PARSERS)


def _fold(parts: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
    """Make a mapping of ``a[b]`` and a list of ``a[]``, as the OpenAI SDKs spell them. A file stays a file."""
    fields: dict[str, Any] = {}
    for name, value in parts:
        match = _NAME.fullmatch(name)
        outer, inner = (name, None) if match is None else match.groups()
        if inner:
            holder, key = fields.setdefault(outer, {}), inner
        else:
            holder, key = fields, outer
        is_item = inner == "" and isinstance(value, str)
        if is_item and isinstance(fields.setdefault(outer, []), list):
            fields[outer].append(value)
        elif not is_item and isinstance(holder, dict) and key not in holder:
            holder[key] = value
        else:
            raise InvalidRequest(f"{name[:100]} is given more than once", param=outer)
    return fields


def _as_latin_1(scope: Scope) -> Scope:
    """Tell the multipart parser that all text is Latin-1, so that each byte becomes a character.

    By itself it reads text that is not UTF-8 as Latin-1, in silence. ``_text`` decodes the bytes strictly.
    """
    headers = [(k, v + b"; charset=latin-1" if k == b"content-type" else v) for k, v in scope["headers"]]
    return {**scope, "headers": headers}


def _text(latin_1: str, name: str = "the body", param: str | None = None) -> str:
    try:
        return latin_1.encode("latin-1").decode()
    except UnicodeError as exc:
        hint = "; the part of a file needs a file name" if param else ""
        raise InvalidRequest(f"{name} is not valid UTF-8{hint}", param=param) from exc


def _counted(receive: Receive, max_bytes: int) -> Receive:
    received = 0

    async def counted() -> Message:
        nonlocal received
        try:
            async with asyncio.timeout(STALLED_AFTER_S):
                message = await receive()
        except TimeoutError as exc:
            raise BodyStalled(f"nothing of the request body came for {STALLED_AFTER_S:g} s; send it again") from exc
        received += len(message.get("body", b""))
        _check_length(received, max_bytes)
        return message

    return counted


def _check_length(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise PayloadTooLarge(f"the request body is too large; at most {max_bytes / 2**20:g} MiB are accepted")


def _declared_length(request: Request) -> int:
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else 0
