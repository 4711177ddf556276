"""The event stream's own manners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from kinema.events import Queued
from kinema.jobs.store import StoredEvent
from kinema.server.sse import encode, kept_alive


async def test_silence_is_filled_with_comments() -> None:
    """So that a proxy does not close the connection; every chunk still comes once and in order."""
    gate = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"first"
        await gate.wait()
        yield b"second"

    seen = []
    async for chunk in kept_alive(chunks(), after_s=0.01):
        seen.append(chunk)
        if seen.count(b": keep-alive\n\n") == 2:
            gate.set()
    assert seen[0] == b"first"
    assert set(seen[1:-1]) == {b": keep-alive\n\n"}
    assert seen[-1] == b"second"


def test_an_event_is_one_line_of_data() -> None:
    """Whatever the prompt has in it."""
    encoded = encode(StoredEvent(3, 0.0, Queued()), {"prompt": "a\n\nevent: x\r\u2028"})
    assert encoded == b'id: 3\nevent: queued\ndata: {"prompt": "a\\n\\nevent: x\\r\\u2028"}\n\n'
