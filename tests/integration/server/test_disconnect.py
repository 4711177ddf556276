"""Clients that go away, over real sockets and a real uvicorn server."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
import uvicorn

from kinema.engines.fake import FakeEngine
from kinema.job import JobStatus
from tests.serving import SMALL, Gate, Serving, has_heard_of_cancel, serving, until

URL = "/v1/videos/generations"
PATIENCE_S = 20

_HEADERS = "Host: localhost\r\nContent-Type: application/json\r\n"


@asynccontextmanager
async def listening(it: Serving) -> AsyncIterator[str]:
    """The service under uvicorn on a free port; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(it.app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await running


@asynccontextmanager
async def streaming(client: httpx.AsyncClient) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a streamed generation."""
    async with client.stream("POST", URL, json=SMALL | {"stream": True}) as answer:
        yield answer.aiter_lines()


def only_job_id(it: Serving) -> str:
    (run,) = it.dispatcher._runs.values()
    return run.job.id


@pytest.mark.parametrize("is_streaming", [False, True])
async def test_a_client_that_goes_away_cancels_its_generation(is_streaming: bool) -> None:
    """The connection breaks in the middle of the work: the worker stops, and the job ends as cancelled."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it, listening(it) as address:
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(SMALL | {"stream": is_streaming}).encode()
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {URL} HTTP/1.1\r\n{_HEADERS}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        assert await asyncio.to_thread(gate.has_arrived.wait, PATIENCE_S)
        job_id = only_job_id(it)
        writer.transport.abort()
        await until(lambda: has_heard_of_cancel(it))
        gate.is_open.set()
        async with asyncio.timeout(PATIENCE_S):
            assert (await it.service.wait(job_id)).status is JobStatus.CANCELLED
        assert it.engine.num_running == 0


async def test_a_stream_that_is_closed_midway_cancels_its_generation() -> None:
    """As an HTTP client does it that has read enough."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it, listening(it) as address:
        async with httpx.AsyncClient(base_url=address) as client, streaming(client) as lines:
            while await anext(lines) != "event: started":
                pass
            job_id = only_job_id(it)
        await until(lambda: has_heard_of_cancel(it))
        gate.is_open.set()
        async with asyncio.timeout(PATIENCE_S):
            assert (await it.service.wait(job_id)).status is JobStatus.CANCELLED


async def test_a_client_that_gives_up_waiting_cancels_its_generation() -> None:
    """A read timeout is a disconnect."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it, listening(it) as address:
        async with httpx.AsyncClient(base_url=address, timeout=0.3) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(URL, json=SMALL)
        await until(lambda: has_heard_of_cancel(it))
        gate.is_open.set()


async def test_a_waiting_job_of_a_gone_client_never_runs() -> None:
    """It is cancelled in the queue."""
    async with serving(is_dispatching=False) as it, listening(it) as address:
        async with httpx.AsyncClient(base_url=address, timeout=0.3) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(URL, json=SMALL)
        async with asyncio.timeout(PATIENCE_S):
            while await it.service.count_waiting():
                pass


async def test_events_arrive_while_the_work_goes_on() -> None:
    """Nothing between the worker and the socket holds them back."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it, listening(it) as address:
        async with httpx.AsyncClient(base_url=address) as client, streaming(client) as lines:
            while await anext(lines) != "event: started":
                pass
            gate.is_open.set()
            rest = [line async for line in lines]
        assert "event: completed" in rest


async def test_errors_leave_the_connection_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 4xx, a 500 and a good request, all on one connection."""
    async with serving() as it, listening(it) as address:
        async with httpx.AsyncClient(base_url=address, limits=httpx.Limits(max_connections=1)) as client:
            for _ in range(10):
                with monkeypatch.context() as broken:
                    broken.setattr(it.service, "models", lambda: 1 / 0)
                    assert (await client.get("/v1/models")).status_code == 500
                assert (await client.post(URL, json={})).status_code == 400
            made = await client.post(URL, json=SMALL)
            video = await client.get(made.json()["data"][0]["url"])
        assert made.json()["data"][0]["url"].startswith(address)
        assert (video.status_code, video.content[4:8]) == (200, b"ftyp")


async def test_a_body_of_100_mb_is_refused_early() -> None:
    """The client reads a 413 while it still sends."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 2**20

    async with serving() as it, listening(it) as address, httpx.AsyncClient(base_url=address) as client:
        answer = await client.post(URL, content=chunks(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


async def test_a_client_that_stops_sending_breaks_nothing() -> None:
    """A body that never ends, and a connection that goes: nothing is made, and the next request is served."""
    async with serving() as it, listening(it) as address:
        host, port = address.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {URL} HTTP/1.1\r\n{_HEADERS}Content-Length: 99\r\n\r\n{{".encode())
        await writer.drain()
        writer.transport.abort()
        async with httpx.AsyncClient(base_url=address) as client:
            assert (await client.post(URL, json=SMALL)).status_code == 200


async def test_a_server_that_stops_keeps_the_jobs_of_its_waiting_clients() -> None:
    """The server hung up and not the client: the job goes back to the queue and is not cancelled."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it, httpx.AsyncClient() as client:
        async with listening(it) as address:
            asking = asyncio.create_task(client.post(address + URL, json=SMALL))
            assert await asyncio.to_thread(gate.has_arrived.wait, PATIENCE_S)
            job_id = only_job_id(it)
        answer = await asking
        assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
        assert answer.headers["x-request-id"]
        error = answer.json()["error"]
        assert (error["code"], error["id"]) == ("server_stopping", job_id)
        assert "after the restart" in error["message"]
        stopping = asyncio.create_task(it.dispatcher.stop())
        await until(lambda: has_heard_of_cancel(it))
        gate.is_open.set()
        await stopping
        job = await it.service.get(job_id)
        assert (job.status, job.is_cancel_requested) == (JobStatus.IN_PROGRESS, False)
        assert await it.service.count_waiting() == 1


async def test_a_server_that_stops_ends_its_streams() -> None:
    """With a comment and the end that HTTP has for it, so that no client sees a broken connection; the job stays."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it, AsyncExitStack() as stack:
        async with listening(it) as address:
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=address))
            lines = await stack.enter_async_context(streaming(client))
            while await anext(lines) != "event: started":
                pass
            job_id = only_job_id(it)
        rest = [line async for line in lines]
        assert rest[-2:] == [": the server is stopping; the video is made after the restart", ""]
        assert not (await it.service.get(job_id)).is_cancel_requested
        gate.is_open.set()
