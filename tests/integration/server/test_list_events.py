"""The stream of all videos of a key, over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import cast

import pytest
from starlette.requests import Request

from kinema.client import AsyncClient, ListEvent, ListReset, VideoChanged, VideoDeleted, VideoOptions
from kinema.engines.fake import FakeEngine
from kinema.events import Cancelled
from kinema.jobs.store import QueueLimits
from kinema.server import list_feeds
from tests.integration.server.test_disconnect import listening
from tests.serving import Gate, Serving, make_job, serving, until

_SCOPE = {"type": "http", "method": "GET", "scheme": "http", "server": ("test", 80), "path": "/", "headers": []}
SMALL: VideoOptions = {"size": "64x64", "num_frames": 5, "num_inference_steps": 2}


async def _until_ended(events: AsyncGenerator[ListEvent, None]) -> list[VideoChanged]:
    seen = []
    async for event in events:
        seen.append(cast("VideoChanged", event))
        if seen[-1].video.is_over:
            break
    return seen


async def test_a_client_follows_all_of_its_videos() -> None:
    """From the reset on: their progress, their ends, their deletions; and behind any event it goes on in another
    stream."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it, listening(it) as address, AsyncClient(address) as client:
        async with asyncio.timeout(20), aclosing(client.list_events()) as events:
            assert isinstance(await anext(events), ListReset)
            made = await client.create("a", **SMALL)
            new = await anext(events)
            assert isinstance(new, VideoChanged)
            assert (new.video.id, new.video.is_over) == (made.id, False)
            gate.is_open.set()
            end = (await _until_ended(events))[-1]
            assert (end.video.id, end.video.status, end.video.prompt) == (made.id, "completed", "a")
            await client.delete(made)
            gone = await anext(events)
            assert isinstance(gone, VideoDeleted)
            assert gone.id == made.id
        await until(lambda: not it.app.state.api.list_feeds._feeds)
        again = await client.create("b", **SMALL)
        async with asyncio.timeout(20), aclosing(client.list_events(end.event_id)) as events:
            assert cast("VideoDeleted", await anext(events)).id == gone.id
            assert (await _until_ended(events))[-1].video.id == again.id


async def _cancel_new(it: Serving) -> str:
    job = await it.store.create(make_job(), limits=QueueLimits())
    await it.store.record(job.id, Cancelled())
    return job.id


async def _ids_until(stream: AsyncGenerator[bytes, None], last: str) -> list[str]:
    """The videos that a stream tells of, to the end of the last one."""
    text = ""
    async for chunk in stream:
        text += chunk.decode()
        if f'"id":"{last}"' in text and '"cancelled"' in text.rpartition(last)[2]:
            break
    return [line.partition('"id":"')[2][:38] for line in text.splitlines() if line.startswith("data: ")]


async def test_a_slow_client_holds_nobody_up_and_gets_each_video_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server keeps a few events for all clients; who is behind these reads by itself."""
    monkeypatch.setattr(list_feeds, "_KEPT", 4)
    monkeypatch.setattr(list_feeds, "_PAGE", 3)
    monkeypatch.setattr(list_feeds, "_REST_S", 0.0)
    async with serving(is_dispatching=False) as it, asyncio.timeout(20):
        streams = it.app.state.api.list_feeds
        mark, _ = await streams.begin("", "")
        make_row = partial(it.app.state.api.row, Request(_SCOPE))
        fast, slow = [streams.follow("", mark, None, make_row, same_for="", is_following=True) for _ in range(2)]
        first = await _cancel_new(it)
        assert first in await _ids_until(fast, first)
        begun = await anext(slow)
        made = [first]
        for _ in range(10):
            made.append(await _cancel_new(it))
            assert made[-1] in await _ids_until(fast, made[-1])
        [feed] = streams._feeds.values()
        assert len(feed._marks) == len(feed._events) == 4
        assert first in begun.decode()
        ids = await _ids_until(slow, made[-1])
        assert list(dict.fromkeys(ids)) == made[1:]
        assert len(ids) <= len(made[1:]) + 2  # two of those that are kept have two events
        await asyncio.gather(fast.aclose(), slow.aclose())
        assert not streams._feeds
