"""Calls between a frontend and a worker, with discovery in a folder."""

from __future__ import annotations

import asyncio
import time

import pytest

from kinema.cluster.transport import Unreachable
from kinema.errors import Drained, EngineFailed, InvalidRequest, KinemaError, NoWorker, OutOfMemory, WorkerLost
from tests.integration.cluster.conftest import Pair


async def test_items_travel_both_ways_as_they_are(pair: Pair) -> None:
    """Bytes too, and the names that Dynamo's own envelopes use."""
    payload = {"text": "ü", "bytes": b"\x00\xff", "data": {"event": [1, 2.5, True]}}
    assert [item async for item in pair.connection.call(pair.instance, "echo", payload)] == [payload]


async def test_a_handler_without_items_ends_well(pair: Pair) -> None:
    """An empty stream is an answer."""
    assert [item async for item in pair.connection.call(pair.instance, "nothing", {})] == []


@pytest.mark.parametrize("cls", [NoWorker, Drained, WorkerLost, OutOfMemory, InvalidRequest])
async def test_an_error_arrives_as_it_was_raised(pair: Pair, cls: type[KinemaError]) -> None:
    """Class, code and message, after the items that came before it."""
    call = pair.connection.call(pair.instance, "fail", {"code": cls.code, "message": "said there"})
    assert await anext(call) == {"before": 1}
    with pytest.raises(cls, match="said there") as caught:
        await anext(call)
    assert type(caught.value) is cls


async def test_a_crash_arrives_without_its_details(pair: Pair) -> None:
    """They are for the log over there."""
    with pytest.raises(EngineFailed) as caught:
        await anext(pair.connection.call(pair.instance, "crash", {}))
    assert "secret" not in str(caught.value)


async def test_closing_a_call_closes_its_handler(pair: Pair) -> None:
    """Within a fraction of a second, although the runtime leaves the generator of a stopped stream alone."""
    call = pair.connection.call(pair.instance, "run", {"name": "long", "n": 1000, "every_s": 60})
    await anext(call)
    began = time.monotonic()
    await call.aclose()
    async with asyncio.timeout(5):
        await pair.handlers.until_closed("long")
    assert time.monotonic() - began < 0.5


async def test_cancelling_the_task_that_reads_closes_the_handler(pair: Pair) -> None:
    """As when a client of ours has gone."""

    async def read() -> None:
        async for _ in pair.connection.call(pair.instance, "run", {"name": "long", "n": 1000, "every_s": 0.01}):
            pass

    reading = asyncio.create_task(read())
    await _until_running(pair, "long")
    reading.cancel()
    async with asyncio.timeout(5):
        await pair.handlers.until_closed("long")


async def test_a_silent_handler_shows_signs_of_life(pair: Pair) -> None:
    """Its call outlives the silence that a dead worker's would not."""
    payload = {"n": 2, "every_s": 2.5}
    call = pair.connection.call(pair.instance, "run", payload, silence_s=1.5)
    assert [item["i"] async for item in call] == [0, 1]


async def test_a_slow_reader_holds_the_handler_back(pair: Pair) -> None:
    """The memory of a stream is bounded on both sides, and nothing is lost."""
    call = pair.connection.call(pair.instance, "run", {"name": "fast", "n": 2000, "every_s": 0})
    assert await anext(call) == {"i": 0}
    assert [item["i"] async for item in call] == list(range(1, 2000))


async def test_no_such_instance_is_unreachable(pair: Pair) -> None:
    """Nothing was started, and the error says so by its class."""
    with pytest.raises(Unreachable):
        await anext(pair.connection.call(pair.instance + 1, "echo", {}))


async def test_no_such_endpoint_is_unreachable(pair: Pair) -> None:
    """An older worker may not have it."""
    with pytest.raises(Unreachable):
        await anext(pair.connection.call(pair.instance, "unheard-of", {}))


async def test_too_large_a_request_is_refused_by_name(pair: Pair) -> None:
    """And the worker is as reachable as before."""
    with pytest.raises(InvalidRequest, match="max_message_mb"):
        await anext(pair.connection.call(pair.instance, "echo", {"blob": bytes(5 * 2**20)}))
    assert [item async for item in pair.connection.call(pair.instance, "echo", {"a": 1})] == [{"a": 1}]


async def test_answers_may_be_larger_than_requests(pair: Pair) -> None:
    """The limit is on what a worker takes in."""
    [item] = [item async for item in pair.connection.call(pair.instance, "blob", {"size": 20 * 2**20})]
    assert len(item["blob"]) == 20 * 2**20


async def test_sixteen_streams_at_once_come_whole(pair: Pair) -> None:
    """Each with its own items in order."""

    async def read() -> list[int]:
        call = pair.connection.call(pair.instance, "run", {"n": 50, "every_s": 0.005})
        return [item["i"] async for item in call]

    assert await asyncio.gather(*(read() for _ in range(16))) == [list(range(50))] * 16


async def test_a_draining_worker_takes_nothing_new(pair: Pair) -> None:
    """What runs goes on, and it can still be cancelled and asked who it is."""
    running = pair.connection.call(pair.instance, "run", {"n": 1000, "every_s": 0.01})
    await anext(running)
    await pair.serving.drain()
    with pytest.raises(Unreachable):
        await _call_until_refused(pair)
    assert [item async for item in pair.connection.call(pair.instance, "cancel", {"a": 1})] == [{"a": 1}]
    assert (await anext(running))["i"] > 0
    await running.aclose()


async def test_closing_a_worker_waits_for_what_runs(pair: Pair) -> None:
    """And ends the streams that would last for ever, so that frontends see it go."""
    info = pair.connection.call(pair.instance, "info", {})
    await anext(info)
    running = pair.connection.call(pair.instance, "run", {"n": 20, "every_s": 0.02})
    await anext(running)
    closing = asyncio.create_task(pair.serving.close())
    assert [item["i"] async for item in running] == list(range(1, 20))
    assert [item async for item in info] == []
    await closing
    async with asyncio.timeout(10):
        while pair.connection.instances():
            await pair.connection.wait_for_change(1.0)


async def test_closing_a_connection_breaks_its_calls_off(pair: Pair) -> None:
    """They say so, and the handlers are closed."""
    call = pair.connection.call(pair.instance, "run", {"name": "long", "n": 1000, "every_s": 0.01})
    await anext(call)
    await pair.connection.close()
    with pytest.raises(WorkerLost):
        [item async for item in call]
    async with asyncio.timeout(5):
        await pair.handlers.until_closed("long")


async def _until_running(pair: Pair, name: str) -> None:
    async with asyncio.timeout(10):
        while True:
            [state] = [item async for item in pair.connection.call(pair.instance, "state", {})]
            if name in state["running"]:
                return


async def _call_until_refused(pair: Pair) -> None:
    """A frontend learns of it a moment later."""
    async with asyncio.timeout(10):
        while True:
            [item async for item in pair.connection.call(pair.instance, "run", {"n": 1, "every_s": 0})]
