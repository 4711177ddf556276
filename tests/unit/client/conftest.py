"""Both clients over a scripted server: what holds for one holds for the other."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from kinema.client import AsyncClient, Client

VIDEO: dict[str, Any] = {
    "id": "video_1",
    "object": "video",
    "status": "queued",
    "progress": 0,
    "model": "fake",
    "prompt": "a cat",
    "size": "64x64",
    "seconds": "1",
    "created_at": 1,
}
Reply = httpx.Response | Exception


class Dropping(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body whose connection breaks after the last chunk."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = list(chunks)

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        raise httpx.ReadError("the line went dead")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk
        raise httpx.ReadError("the line went dead")


@dataclass
class Script:
    """Gives one reply after the other, and keeps what was asked."""

    replies: list[Reply] = field(default_factory=list)
    requests: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


Calling = Callable[..., Any]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture(params=[Client, AsyncClient])
def call(request: pytest.FixtureRequest, script: Script) -> Calling:
    """Calls a method of a client by its name; an iterator's items come as a list."""
    kind: type[Client] | type[AsyncClient] = request.param

    async def called(name: str, *arguments: object, **named: object) -> Any:
        client = kind("http://test", transport=httpx.MockTransport(script), api_key="k", backoff_s=0)
        result = getattr(client, name)(*arguments, **named)
        if inspect.isasyncgen(result):
            return [item async for item in result]
        return list(result) if inspect.isgenerator(result) else await result if inspect.isawaitable(result) else result

    return called


def video(**changes: object) -> httpx.Response:
    return httpx.Response(200, json=VIDEO | changes)


def error(status: int, headers: dict[str, str] | None = None, **told: object) -> httpx.Response:
    body = {"message": "no", "type": "x", "param": None, "code": None} | told
    return httpx.Response(status, headers=headers, json={"error": body})
