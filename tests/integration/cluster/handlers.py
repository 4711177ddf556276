"""What the workers of these tests do, in this process or in one of their own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from kinema.cluster.transport import Handler, Payload
from kinema.errors import EngineFailed, by_code


@dataclass
class Handlers:
    """The handlers, and which streams of ``run`` are open now or were closed."""

    running: set[str] = field(default_factory=set)
    closed: list[str] = field(default_factory=list)
    is_well: bool = True
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def all(self) -> dict[str, Handler]:
        return {
            "run": self.run,
            "info": self.info,
            "cancel": self.echo,
            "echo": self.echo,
            "fail": self.fail,
            "crash": self.crash,
            "nothing": self.nothing,
            "state": self.state,
            "blob": self.blob,
            "be": self.be,
            "canary": self.canary,
        }

    async def run(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        """``n`` items, one every ``every_s``."""
        name = payload.get("name", "")
        self.running.add(name)
        try:
            for i in range(payload["n"]):
                yield {"i": i}
                await asyncio.sleep(payload["every_s"])
        finally:
            self.running.discard(name)
            self.closed.append(name)
            async with self.changed:
                self.changed.notify_all()

    async def info(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        """Once who it is, and then for ever nothing."""
        yield {"pid": os.getpid()}
        await asyncio.Event().wait()

    async def echo(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        yield payload

    async def fail(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        yield {"before": 1}
        raise by_code(payload["code"])(payload["message"])

    async def crash(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        raise RuntimeError("secret detail")
        yield {}

    async def nothing(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        return
        yield {}

    async def state(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        yield {"running": sorted(self.running), "closed": self.closed}

    async def blob(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        yield {"blob": bytes(payload["size"])}

    async def be(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        self.is_well = payload["well"]
        yield payload

    async def canary(self, payload: Payload) -> AsyncGenerator[Payload, None]:
        if not self.is_well:
            raise EngineFailed
        yield {"well": True}

    async def until_closed(self, name: str) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: name in self.closed)
