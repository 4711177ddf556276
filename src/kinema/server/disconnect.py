"""A client that goes away while it waits for its video: the work for it is cancelled, and the caller is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before the answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``. Cancels the work and raises ClientGone when the client disconnects first.

    The request's body must have been read before: the next message is then the end of the connection.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def asked_by(request: Request) -> Callable[[Coroutine[Any, Any, T]], Coroutine[Any, Any, T]]:
    """Run work as ``unless_gone`` does, for the client of this request."""
    return partial(unless_gone, request.receive)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
