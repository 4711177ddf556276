"""Answers that end before they are whole: because the client goes away, or because the rest does not come.

A client that goes away while it waits for its video: the work for it is cancelled, and the caller is told. An answer
whose rest does not come ends without its last chunk, which clients report as an error (RFC 9112, section 8). Only the
connection's protocol can do that; it puts a function for it into the scope of the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope

T = TypeVar("T")

_CUT = "kinema.cut"


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


def cuttable_by(cut: Callable[[], None]) -> dict[str, dict[object, object]]:
    """The extensions of a scope in which ``cut_short`` calls this function."""
    return {_CUT: {"call": cut}}


def cut_short(scope: Scope) -> bool:
    """Close the connection behind what was sent of the answer. False where the server knows no way to do that."""
    cut = scope.get("extensions", {}).get(_CUT)
    if cut is not None:
        cut["call"]()
    return cut is not None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
