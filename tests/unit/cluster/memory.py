"""A transport within one event loop, whose workers a test can kill, freeze and hide."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kinema.cluster.transport import UNTIL_CLOSED, Handler, Payload, Unreachable
from kinema.errors import EngineFailed, KinemaError, WorkerLost, by_code

# What a call reads: an item, a KinemaError to raise, or one of these.
_END, _SILENCE = "end", "silence"


class Network:
    """Discovery, and what joins the two sides."""

    def __init__(self) -> None:
        self.served: dict[int, Served] = {}
        self.connections: list[MemoryConnection] = []
        self._numbers = itertools.count(1)
        self.has_changed = asyncio.Event()

    def serve(self, handlers: Mapping[str, Handler]) -> Served:
        served = Served(self, next(self._numbers), handlers)
        self.served[served.instance] = served
        self.tell()
        return served

    async def connect(self) -> MemoryConnection:
        self.connections.append(MemoryConnection(self))
        return self.connections[-1]

    def tell(self) -> None:
        self.has_changed.set()
        self.has_changed = asyncio.Event()


@dataclass(eq=False)
class Served:
    """A ``Serving``, and what can happen to a process."""

    network: Network
    instance: int
    handlers: Mapping[str, Handler]
    calls: list[_Call] = field(default_factory=list)
    # Handlers that came to their end, by endpoint.
    num_answered: Counter[str] = field(default_factory=Counter)
    num_refused: int = 0
    is_listed: bool = True
    is_draining: bool = False
    is_dead: bool = False
    is_frozen: bool = False

    def list_again(self, is_listed: bool) -> None:
        """Whether discovery shows it."""
        self.is_listed = is_listed
        self.network.tell()

    async def drain(self) -> None:
        self.is_draining = True

    async def close(self) -> None:
        await self.drain()
        while running := [call for call in self.calls if call.endpoint not in UNTIL_CLOSED]:
            await asyncio.wait({call.pump for call in running})
            await asyncio.sleep(0)
        for call in list(self.calls):
            call.said.put_nowait(_END)
        self.is_dead = True
        self.list_again(False)

    def kill(self) -> None:
        """Discovery goes on showing it."""
        self.is_dead = True
        for call in list(self.calls):
            call.said.put_nowait(WorkerLost())
            call.pump.cancel()

    def freeze(self) -> None:
        """It says nothing more."""
        self.is_frozen = True
        for call in list(self.calls):
            call.said.put_nowait(_SILENCE)


class _Call:
    """A handler that runs for a caller."""

    def __init__(self, served: Served, endpoint: str, payload: Payload) -> None:
        self.endpoint = endpoint
        self.said: asyncio.Queue[Payload | KinemaError | str] = asyncio.Queue()
        self.pump = asyncio.create_task(self._pump(served, payload))

    async def _pump(self, served: Served, payload: Payload) -> None:
        last: KinemaError | str = _END
        try:
            async with contextlib.aclosing(served.handlers[self.endpoint](_as_sent(payload))) as items:
                async for item in items:
                    self.said.put_nowait(_as_sent(item))
        except KinemaError as exc:
            last = by_code(exc.code)(exc.message)
        except Exception:
            last = EngineFailed()
        served.num_answered[self.endpoint] += 1
        self.said.put_nowait(last)


class MemoryConnection:
    """A ``Connection``."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.is_closed = False

    def instances(self) -> frozenset[int]:
        return frozenset(number for number, served in self._network.served.items() if served.is_listed)

    async def wait_for_change(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._network.has_changed.wait()

    async def call(
        self, instance: int, endpoint: str, payload: Payload, *, silence_s: float | None = None
    ) -> AsyncGenerator[Payload, None]:
        served = self._network.served[instance]
        if served.is_dead or (served.is_draining and endpoint not in UNTIL_CLOSED):
            served.num_refused += 1
            raise Unreachable
        call = _Call(served, endpoint, payload)
        served.calls.append(call)
        if served.is_frozen:
            call.said.put_nowait(_SILENCE)
        try:
            while (said := await call.said.get()) != _END:
                if said == _SILENCE:
                    await asyncio.sleep(silence_s or 0)
                    raise WorkerLost
                if isinstance(said, KinemaError):
                    raise said
                assert isinstance(said, Mapping)
                yield said
        finally:
            served.calls.remove(call)
            call.pump.cancel()
            await asyncio.wait({call.pump})

    async def close(self) -> None:
        self.is_closed = True


def scripted(**answers: Callable[[Payload], AsyncGenerator[Payload, None]]) -> Mapping[str, Handler]:
    """Handlers by their endpoints, for a worker that is not one of ours."""
    return answers


def _as_sent(payload: Payload) -> Any:
    """Plain data alone survives, as on a real wire: what JSON can say, and the bytes of a video."""
    if "data" in payload and isinstance(payload["data"], bytes):
        return {"data": bytes(payload["data"])}
    return json.loads(json.dumps(payload))
