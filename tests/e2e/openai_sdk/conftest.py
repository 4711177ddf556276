"""Servers, and clients of the official SDK with a key of their own, so that no test sees the videos of another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import OpenAI

from tests.e2e.openai_sdk.sdk import connect
from tests.server_process import Server, start_server

_API_KEYS = [f"sk-client-{number}" for number in range(400)]
_next_key = itertools.count()

Connect = Callable[..., OpenAI]


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with the engine that needs no model, and keys. Slow videos leave room for others."""
    folder = tmp_path_factory.mktemp("fake")
    settings = f'[server]\napi_keys = "{",".join(_API_KEYS)}"\n[worker]\nmax_active = 4\n'
    yield from _served(folder, settings)


@pytest.fixture(scope="session")
def narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that refuses soon: one video at a time, one that waits, bodies of 1 MiB, storage that is away for a second;
    no keys, as by default."""
    folder = tmp_path_factory.mktemp("narrow")
    worker = "[worker]\nmax_active = 1\nstorage_patience_s = 1\n"
    yield from _served(folder, f"[server]\nmax_body_mb = 1\n[jobs]\nmax_queued = 1\n{worker}")


def _served(folder: Path, settings: str) -> Iterator[Server]:
    (folder / "kinema.toml").write_text(settings, encoding="utf-8")
    server = start_server(folder, "--engine", "fake", "--storage", f"file://{folder / 'files'}")
    yield server
    server.stop()


@pytest.fixture
def api_key() -> str:
    """One that no test has had before."""
    return _API_KEYS[next(_next_key)]


@pytest.fixture
def connected(fake_server: Server, api_key: str) -> Iterator[Connect]:
    """Makes clients of the fake engine with this test's key; options are those of ``OpenAI``."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(connect(fake_server, **{"api_key": api_key} | options))


@pytest.fixture
def client(connected: Connect) -> OpenAI:
    """A client of the fake engine."""
    return connected()


@pytest.fixture
def tiny(tiny_server: Server) -> Iterator[OpenAI]:
    """A client of the real tiny model, on a server that asks for no key."""
    with connect(tiny_server) as client:
        yield client


@pytest.fixture
def narrow(narrow_server: Server) -> Iterator[OpenAI]:
    """A client of the server that refuses soon; it leaves nothing running."""
    with connect(narrow_server, max_retries=0) as client:
        yield client
        for video in client.videos.list():
            client.videos.delete(video.id)
