"""A server that gets webhooks: it keeps what came, byte by byte, and answers as it is told."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Received:
    """One request. Header names are in lower case."""

    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.body)
        return event

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


async def accept(_received: Received) -> bytes:
    """200, and nothing more."""
    return b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def status(code: int, *headers: str) -> Callable[[Received], Awaitable[bytes]]:
    """An answer with that status."""

    async def answer(_received: Received) -> bytes:
        lines = [f"HTTP/1.1 {code} Told", *headers, "content-length: 0", "", ""]
        return "\r\n".join(lines).encode()

    return answer


@dataclass
class Receiver:
    """``answer`` may be changed at any time, and may wait as long as it likes."""

    port: int = 0
    answer: Callable[[Received], Awaitable[bytes]] = accept
    received: list[Received] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?a=1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
            body = await reader.readexactly(int(headers["content-length"]))
            received = Received(head[0].split()[1], headers, body)
            self.received.append(received)
            writer.write(await self.answer(received))
            await writer.drain()
        except (OSError, EOFError):
            pass  # the sender went away
        finally:
            writer.close()


@asynccontextmanager
async def receiving(port: int = 0) -> AsyncIterator[Receiver]:
    """Listens on 127.0.0.1."""
    receiver = Receiver()
    tasks: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(receiver.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def is_signed(received: Received, secret: str) -> bool:
    """As the OpenAI SDK checks it, without the age."""
    key = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode()
    content = f"{received.id}.{int(received.headers['webhook-timestamp'])}.{received.body.decode()}"
    expected = base64.b64encode(hmac.new(key, content.encode(), hashlib.sha256).digest()).decode()
    given = [part.removeprefix("v1,") for part in received.headers["webhook-signature"].split()]
    return any(hmac.compare_digest(expected, signature) for signature in given)
