"""What an attack costs a server and its other clients, as a ``with`` around the attack."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.hostile import watcher
from tests.server_process import Server

_ROOT = Path(__file__).parents[2]
_MB = 1e6
# The server, the process that forks decoders, and one that is kept ready.
_NUM_PROCESSES = 3
_SETTLED: set[int] = set()


@dataclass(frozen=True)
class Wait:
    """One ask of the other client; ``failure`` says why no answer came."""

    path: str
    wait_s: float
    status: int
    failure: str


@dataclass
class Seen:
    """Complete when the ``with`` has ended. Memory is that of the server's process and its children together."""

    what: str
    before_mb: float = 0.0
    peak_mb: float = 0.0
    peak_files: int = 0
    took_s: float = 0.0
    waits: list[Wait] = field(default_factory=list)

    @property
    def grown_mb(self) -> float:
        """How far memory rose above what it was before."""
        return self.peak_mb - self.before_mb

    @property
    def worst_wait_s(self) -> float:
        return max(wait.wait_s for wait in self.waits)

    @property
    def p95_wait_s(self) -> float:
        waits = sorted(wait.wait_s for wait in self.waits)
        return waits[math.ceil(0.95 * len(waits)) - 1]

    @property
    def shut_out(self) -> list[Wait]:
        """The asks of the other client that were not answered as they should be."""
        return [wait for wait in self.waits if wait.status != 200]

    def check(self, *, grown_mb: float, wait_s: float) -> None:
        """Fail unless every ask of the other client was answered within ``wait_s``, and memory grew by no more."""
        assert not self.shut_out, f"{self}; not answered: {self.shut_out[:3]}"
        assert self.worst_wait_s <= wait_s, f"{self}; at most {wait_s:g} s are allowed"
        assert self.grown_mb <= grown_mb, f"{self}; at most {grown_mb:g} MB are allowed"

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.took_s:.2f} s; memory {self.before_mb:.0f} MB, then up to {self.peak_mb:.0f} MB; "
            f"{self.peak_files} files; others waited {self.worst_wait_s:.3f} s at most, {self.p95_wait_s:.3f} s (p95), "
            f"{len(self.shut_out)} of {len(self.waits)} in vain"
        )


# In the order of the tests, for the table at the end.
ALL_SEEN: list[Seen] = []


@contextmanager
def watched(
    server: Server,
    *,
    asks: Sequence[str] = ("/live", "/v1/videos?limit=1"),
    headers: Mapping[str, str] | None = None,
    is_whole: bool = True,
) -> Iterator[Seen]:
    """Measure the server during the block. ``asks`` are the paths that another client polls, with ``headers``.

    Without ``is_whole`` the server has no processes that decode.
    """
    if is_whole:
        _wait_until_settled(server)
    told = {"pid": server.process.pid, "url": server.url, "asks": list(asks), "headers": dict(headers or {})}
    seen = Seen(os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0].rpartition("::")[2])
    with subprocess.Popen(
        [sys.executable, "-m", watcher.__name__, json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=_ROOT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        began = time.monotonic()
        try:
            yield seen
            seen.took_s = time.monotonic() - began
            text, _ = process.communicate(timeout=4 * watcher.PATIENCE_S)
        finally:
            process.kill()
    _complete(seen, json.loads(text))
    ALL_SEEN.append(seen)
    assert server.process.poll() is None, f"the server has ended:\n{server.log.read_text()[-4000:]}"


def _wait_until_settled(server: Server) -> None:
    """Wait until the processes that decode are there and ready, which a server starts beside its first answers."""
    if server.process.pid in _SETTLED:
        return
    until, before = time.monotonic() + watcher.PATIENCE_S, 0.0
    while len([*watcher.tree(server.process.pid)]) < _NUM_PROCESSES or resident_mb(server) > before + 1:
        assert time.monotonic() < until, "the server goes on growing"
        before = resident_mb(server)
        time.sleep(0.3)
    _SETTLED.add(server.process.pid)


def _complete(seen: Seen, found: dict[str, object]) -> None:
    seen.before_mb, seen.peak_mb = (float(str(found[name])) / _MB for name in ("before", "peak"))
    seen.peak_files = int(str(found["peak_files"]))
    waits = found["waits"]
    assert isinstance(waits, list)
    seen.waits = [Wait(**wait) for wait in waits]


def resident_mb(server: Server) -> float:
    """What the server and its children have at this moment."""
    return sum(map(watcher.resident_bytes, watcher.tree(server.process.pid))) / _MB


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ALL_SEEN:
        terminalreporter.write_sep("=", "what the attacks cost")
    while ALL_SEEN:  # two suites in one run share this hook, which prints once
        terminalreporter.write_line(str(ALL_SEEN.pop(0)))
