"""The servers that are fuzzed, with keys and without, and how many requests they get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.faults.processes import until
from tests.fuzz import server as fuzzed
from tests.fuzz.corpus import SMALL, Known
from tests.hostile.watched import pytest_terminal_summary  # noqa: F401 - a hook, found by its name
from tests.server_process import Server, running_server

KEY = "first-key"
_SETTINGS = {
    # Webhooks lead to an address of this machine: see tests/fuzz/server.py.
    "KINEMA_WEBHOOKS_ALLOW_PRIVATE": "true",
    # A synchronous call waits for all that is queued before it.
    "KINEMA_JOBS_MAX_QUEUED": "20",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--requests", type=int, default=10_000, help="how many requests each fuzzer sends")
    parser.addoption("--fuzz-seed", type=int, default=1, help="the seed of all requests")


@dataclass(frozen=True)
class Target:
    """A server, and the headers with which it is asked."""

    server: Server
    headers: dict[str, str]

    def client(self) -> httpx.Client:
        return self.server.client(headers=self.headers)


@pytest.fixture(scope="session", params=["no-keys", "keys"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    has_keys = request.param == "keys"
    settings = _SETTINGS | ({"KINEMA_SERVER_API_KEYS": f"{KEY},second-key"} if has_keys else {})
    folder, program = tmp_path_factory.mktemp("fuzz"), [fuzzed.__file__]
    with running_server(folder, "--engine", "fake", settings=settings, program=program) as server:
        yield Target(server, {"authorization": f"Bearer {KEY}"} if has_keys else {})
        assert server.process.poll() is None, "the server has ended"


@pytest.fixture
def num_requests(request: pytest.FixtureRequest) -> int:
    """The share of one server: each is asked half of them."""
    return int(request.config.getoption("--requests")) // 2


@pytest.fixture
def fuzz_seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz-seed"))


def make_known(client: httpx.Client) -> Known:
    """A finished video, and an endpoint for webhooks; those before are deleted, since their number is bounded."""
    for endpoint in client.get("/v1/webhook_endpoints", params={"limit": 100}).raise_for_status().json()["data"]:
        client.delete(f"/v1/webhook_endpoints/{endpoint['id']}").raise_for_status()
    body = {"name": "fuzz", "url": "http://fuzz.invalid/hook", "event_types": ["video.completed"]}
    endpoint = client.post("/v1/webhook_endpoints", json=body).raise_for_status().json()
    until(lambda: client.get("/health").json()["jobs_waiting"] == 0, "the queue is empty")
    video = client.post("/v1/videos/generations", json=SMALL).raise_for_status().json()
    return Known(video["id"], endpoint["id"])


def errors_in(log: str) -> Iterator[tuple[str, str]]:
    """What the lines of a JSON log say about mistakes of the server, each with its line."""
    for line in log.splitlines():
        said = json.loads(line) if line.startswith("{") else {"event": line, "level": "error"}
        causes = [f"{cause['exc_type']}: {cause['exc_value']}" for cause in said.get("exception", [])]
        if causes or said["level"] == "error":
            yield " from ".join([said["event"], *causes])[:200], line
