"""Webhooks of a real process: what it could not deliver, its successor does."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.receiver import accept, is_signed, receiving, status
from tests.server_process import start_server
from tests.serving import SMALL, until

SECRET = "plain text"


async def test_a_message_outlives_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 between two attempts: after the restart the same message comes, once, with a signature of its time."""
    async with receiving() as receiver:
        receiver.answer = status(503)
        monkeypatch.setenv("KINEMA_WEBHOOKS_URL", receiver.url)
        monkeypatch.setenv("KINEMA_WEBHOOKS_SECRET", SECRET)
        monkeypatch.setenv("KINEMA_WEBHOOKS_ALLOW_PRIVATE", "true")
        server = await asyncio.to_thread(start_server, tmp_path, "--engine", "fake")
        try:
            with server.client() as client:
                video = await asyncio.to_thread(client.post, "/v1/videos", json=SMALL)
            await until(lambda: "was not delivered yet" in server.log.read_text(encoding="utf-8"))
        finally:
            await asyncio.to_thread(server.stop, signal.SIGKILL)
        receiver.answer = accept
        server = await asyncio.to_thread(start_server, tmp_path, "--engine", "fake")
        try:
            await until(lambda: len(receiver.received) > 1)
        finally:
            await asyncio.to_thread(server.stop)
    first, last = receiver.received
    assert (first.id, first.body) == (last.id, last.body)
    assert last.event["data"] == {"id": video.json()["id"]}
    assert is_signed(last, SECRET)
