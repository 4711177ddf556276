"""What ``kinema bench start`` reads off a server's log and its port."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from kinema.bench.server import NotStarted, stop
from kinema.bench.wan.start import _Watch


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that runs until it is stopped."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield started
    stop(started)


def line(event: str, **fields: object) -> str:
    return json.dumps({"event": event, **fields}) + "\n"


def test_stages_end_where_the_next_begins(process: subprocess.Popen[bytes]) -> None:
    """All of them together are the time to ready; a line that is no JSON is passed over."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200)

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        watch = _Watch(process, client)
        for told in (
            "a warning of a library\n",
            line("listening", url="http://127.0.0.1:1"),
            line("starting", stage="importing the engine"),
            line("start: imports 2.00 s"),
            line("starting", stage="reading weights"),
            line("ready"),
        ):
            watch.look(told)
    start = watch.result()
    assert asked == ["http://127.0.0.1:1/live"]
    assert start.notes == ["start: imports 2.00 s"]
    assert list(start.stages) == ["process", "importing the engine", "reading weights"]
    assert sum(start.stages.values()) == pytest.approx(start.ready_s, abs=0.01)
    assert 0 <= start.port_s <= start.ready_s  # rounded to milliseconds


def test_a_server_that_ends_is_an_error_with_its_last_words(process: subprocess.Popen[bytes]) -> None:
    with httpx.Client() as client:
        watch = _Watch(process, client)
        watch.look("no such folder\n")
        stop(process)
        with pytest.raises(NotStarted, match="no such folder"):
            watch.look("")
