"""What Dynamo itself sees of a worker: a model with its endpoint, bare items, errors by its classes, and health."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from dynamo.runtime import DistributedRuntime

from kinema.cluster.dynamo import serve, slug
from kinema.cluster.transport import ModelCard, Payload, Serving
from kinema.errors import EngineFailed, InvalidRequest, NoWorker, Overloaded
from tests.integration.cluster.conftest import StartWorker, connected, only_instance
from tests.integration.cluster.handlers import Handlers
from tests.integration.cluster.settings import Settings

CARD = ModelCard("Wan-AI/Wan2.1", {"sizes": ["832x480"]})
ERRORS = {cls.code: cls for cls in (InvalidRequest, Overloaded, NoWorker, EngineFailed)}


async def videos(payload: Payload) -> AsyncGenerator[Payload, None]:
    """Fails as it is asked to, else answers after longer than a heartbeat."""
    if "fail" in payload:
        raise ERRORS[payload["fail"]]("said there")
    await asyncio.sleep(1.2)
    yield {"status": "completed", "asked": payload}


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Serving]:
    worker = await serve(settings, {"run": Handlers().run}, CARD, videos)
    yield worker
    await worker.close()


async def asked_by_dynamo(settings: Settings, payload: dict[str, Any]) -> list[Any]:
    """As Dynamo's own frontend asks."""
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    client = await runtime.endpoint(f"{settings.namespace}.{slug(CARD.name)}.videos").client()
    try:
        await client.wait_for_instances()
        return [item async for item in await client.round_robin(payload, annotated=False)]
    finally:
        runtime.shutdown()


def cards(settings: Settings) -> list[dict[str, Any]]:
    assert settings.file_dir is not None
    folder: Path = settings.file_dir / "v1" / "mdc"
    return [json.loads(path.read_text(encoding="utf-8"))["card_json"] for path in folder.glob("*")]


async def test_the_model_is_registered_under_its_own_name(settings: Settings) -> None:
    """With what we say of it, until the worker drains."""
    async with serving(settings) as worker:
        [card] = cards(settings)
        assert (card["display_name"], card["user_data"]) == (CARD.name, CARD.user_data)
        await worker.drain()
        assert cards(settings) == []


async def test_videos_are_answered_without_frames(settings: Settings) -> None:
    """No heartbeat and no end, which Dynamo would take for videos."""
    async with serving(settings):
        answers = await asked_by_dynamo(settings, {"prompt": "a cat"})
        assert answers == [{"status": "completed", "asked": {"prompt": "a cat"}}]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("invalid_value", "InvalidArgument: said there"),
        ("overloaded", "429"),
        ("no_worker", "503"),
        ("engine_failed", "500"),
    ],
)
async def test_an_error_has_the_class_that_gives_its_status(settings: Settings, code: str, told: str) -> None:
    """The request's faults with their words, the others by their number."""
    async with serving(settings):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the runtime has a class for one of them alone
            await asked_by_dynamo(settings, {"fail": code})
        assert told in f"{type(caught.value).__name__}: {caught.value}"


async def test_health_follows_the_canary(
    settings: Settings, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo's own health check asks it, whatever else the worker does."""
    port = low_port()
    monkeypatch.setenv("DYN_SYSTEM_PORT", str(port))
    monkeypatch.setenv("DYN_SYSTEM_HOST", "127.0.0.1")
    monkeypatch.setenv("DYN_HEALTH_CHECK_ENABLED", "true")
    monkeypatch.setenv("DYN_CANARY_WAIT_TIME", "1")
    await start_worker(settings)
    monkeypatch.delenv("DYN_SYSTEM_PORT")
    async with connected(settings) as connection:
        instance = await only_instance(connection)
        for is_well, status in ((True, 200), (False, 503), (True, 200)):
            await anext(connection.call(instance, "be", {"well": is_well}))
            async with asyncio.timeout(30):
                while await health(port) != status:
                    pass


def low_port() -> int:
    """A free one: the runtime reads this port as a number of 15 bits."""
    for port in range(20000, 32768):
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
    pytest.fail("no free port below 32768")


async def health(port: int) -> int:
    def ask() -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as exc:
            exc.close()
            return exc.code

    return await asyncio.to_thread(ask)
