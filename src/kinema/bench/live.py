"""A running service under an open-loop load: each video is asked for at its time and followed to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from statistics import median

from kinema.bench.report import Outcome
from kinema.bench.workload import Arrival, Body
from kinema.client.asynchronous import AsyncClient
from kinema.client.errors import ClientError
from kinema.client.models import EndEvent, ProgressEvent, Video
from kinema.errors import ServiceError

_PROMPT = "a red circle moves right"
# A client keeps at most so many connections, and a video that is followed takes one.
_VIDEOS_PER_CLIENT = 50
_TIMED_ALONE = 3


class NotMade(ServiceError):
    """The service did not make a video that the measurement needs."""

    code = "not_made"


class LiveService:
    """One service. Every method may raise ClientError, or NotMade."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url
        self._api_key = api_key

    async def alone_s(self, bodies: Mapping[str, Body]) -> dict[str, float]:
        """The seconds of a video with nothing beside it, by class: the median of some, after one that is not timed."""
        found: dict[str, float] = {}
        async with self._client() as client:
            for name, body in bodies.items():
                seconds = [await self._timed(client, body) for _ in range(_TIMED_ALONE + 1)]
                found[name] = median(seconds[1:])
        return found

    async def behind(self, long: Body, short: Body) -> float:
        """The seconds of a short video that comes when a long one has taken a step; the long one is cancelled."""
        async with self._client() as client:
            first = await _create(client, long)
            async for event in client.events(first):
                if isinstance(event, ProgressEvent):
                    break
            try:
                return await self._timed(client, short)
            finally:
                await client.cancel(first)

    async def run(self, arrivals: Sequence[Arrival], alone_s: Mapping[str, float]) -> list[Outcome]:
        """Ask for each video at its time and follow it; one that was refused or failed has no latency."""
        async with AsyncExitStack() as stack:
            count = 1 + (len(arrivals) - 1) // _VIDEOS_PER_CLIENT
            clients = [await stack.enter_async_context(self._client()) for _ in range(count)]
            start = time.monotonic()
            asking = [
                self._outcome(clients[number % count], arrival, start, alone_s[arrival.name])
                for number, arrival in enumerate(arrivals)
            ]
            return await asyncio.gather(*asking)

    async def _outcome(self, client: AsyncClient, arrival: Arrival, start: float, alone_s: float) -> Outcome:
        """Count from the time when the video was due, so that a service that is slow to answer is slow."""
        await asyncio.sleep(max(start + arrival.at_s - time.monotonic(), 0.0))
        eta_s = latency_s = None
        try:
            video = await _create(client, arrival.body)
            eta_s = video.eta_s
            await _until_made(client, video)
            latency_s = time.monotonic() - start - arrival.at_s
        except (ClientError, NotMade):
            pass
        return Outcome(arrival.name, arrival.at_s, latency_s, alone_s, eta_s)

    async def _timed(self, client: AsyncClient, body: Body) -> float:
        started = time.monotonic()
        await _until_made(client, await _create(client, body))
        return time.monotonic() - started

    def _client(self) -> AsyncClient:
        return AsyncClient(self._url, api_key=self._api_key, max_retries=0)


async def _create(client: AsyncClient, body: Body) -> Video:
    fields = {**body}
    return await client.create(fields.pop("prompt", _PROMPT), extra=fields)


async def _until_made(client: AsyncClient, video: Video) -> None:
    async for event in client.events(video):
        if isinstance(event, EndEvent) and event.video.status != "completed":
            raise NotMade(f"a video of the measurement was not made: {event.video.error or event.video.status}")
