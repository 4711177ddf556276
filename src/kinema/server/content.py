"""A stored file as an HTTP answer: the whole file, a part, 304, or only headers (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import base64
import math
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from kinema.errors import RangeNotSatisfiable
from kinema.service.service import OpenArtifact

# When storage hangs, only these threads wait for it.
_READERS = CapacityLimiter(40)
_RANGE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.IGNORECASE | re.ASCII)


async def content_response(request: Request, opened: OpenArtifact, filename: str) -> Response:
    """Return the answer that the request asks for, or a redirect to the storage, which then gives it.

    Raises RangeNotSatisfiable, and FileGone or StorageUnavailable when the first bytes cannot be read.
    """
    artifact = opened.artifact
    etag = f'"{artifact.etag}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=31536000, immutable",
        "content-disposition": f'inline; filename="{filename}"',
        "x-content-type-options": "nosniff",
    }
    if _is_known(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    if request.method == "GET" and (link := await to_thread.run_sync(opened.link, filename, limiter=_READERS)):
        return RedirectResponse(link, status_code=307, headers={"cache-control": "no-store"})
    # RFC 9110 defines Range only for GET.
    part = _part(request, artifact.size_bytes, etag) if request.method == "GET" else None
    start, end = part or (0, artifact.size_bytes)
    headers["content-length"] = str(end - start)
    if part is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{artifact.size_bytes}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=artifact.media_type)
    chunks = opened.read(start, end)
    # The first bytes are read before the status is sent: a file that cannot be read is a 503, not a broken 200.
    first = await to_thread.run_sync(next, chunks, b"", limiter=_READERS)
    return StreamingResponse(_rest(first, chunks), status, headers, artifact.media_type)


async def _rest(first: bytes, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    while chunk := await to_thread.run_sync(next, chunks, b"", limiter=_READERS):
        yield chunk


async def answer_with_base64(opened: OpenArtifact, body: Callable[[str], str]) -> Response:
    """Return JSON with the whole file as base64, which is sent while it is read. ``body`` makes the JSON around a text.

    Raises FileGone or StorageUnavailable when the first bytes cannot be read.
    """
    mark = secrets.token_hex()  # no client knows it before, so nothing else in the body is like it
    head, tail = (part.encode() for part in body(mark).split(mark))
    encoded = _encoded(opened.read())
    first = await to_thread.run_sync(next, encoded, b"", limiter=_READERS)
    size_bytes = len(head) + 4 * math.ceil(opened.artifact.size_bytes / 3) + len(tail)
    chunks = _between(head, _rest(first, encoded), tail)
    return StreamingResponse(chunks, headers={"content-length": str(size_bytes)}, media_type="application/json")


def _encoded(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Encode the chunks as one text of base64, in which three bytes are four characters."""
    left = b""
    for chunk in chunks:
        data = left + chunk
        left = data[len(data) - len(data) % 3 :]
        if len(data) > len(left):
            yield base64.b64encode(data[: len(data) - len(left)])
    if left:
        yield base64.b64encode(left)


async def _between(head: bytes, chunks: AsyncIterator[bytes], tail: bytes) -> AsyncIterator[bytes]:
    yield head
    async for chunk in chunks:
        yield chunk
    yield tail


async def read_base64(opened: OpenArtifact) -> str:
    """Return the whole file as base64. Raises FileGone, StorageUnavailable."""
    return await to_thread.run_sync(lambda: base64.b64encode(b"".join(opened.read())).decode(), limiter=_READERS)


def _is_known(if_none_match: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def _part(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """Return the first byte of the part and the byte after its last; None for the whole file.

    A Range that is malformed, has several parts, or is for another version of the file is ignored, as RFC 9110 allows.
    """
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or request.headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise RangeNotSatisfiable(f"the video has {size} bytes", size_bytes=size)
    return start, end
