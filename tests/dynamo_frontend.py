"""NVIDIA Dynamo's own frontend, `python -m dynamo.frontend`, as its users start it: a process on a free port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

# Put there by scripts/setup; the runtime that it is a part of is in .venv itself.
INSTALLED = Path(sys.prefix) / "dynamo-frontend"
_PATIENCE_S = 60


@dataclass(frozen=True)
class DynamoFrontend:
    """Where it listens, and what it said."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def models(self) -> list[str]:
        """Those that it found workers of."""
        answer = httpx.get(f"{self.url}/v1/models", timeout=_PATIENCE_S).raise_for_status()
        return [model["id"] for model in answer.json()["data"]]

    def wait_until(self, condition: Callable[[DynamoFrontend], object], what: str) -> None:
        """Fails the test with the log when that does not come, or the process ends."""
        deadline = time.monotonic() + _PATIENCE_S
        while not self._holds(condition):
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"Dynamo's frontend: {what} did not come:\n{self.log.read_text(encoding='utf-8')[-5000:]}")
            time.sleep(0.02)

    def _holds(self, condition: Callable[[DynamoFrontend], object]) -> bool:
        try:
            return bool(condition(self))
        except httpx.TransportError:  # it does not listen yet
            return False


@contextmanager
def running_dynamo_frontend(folder: Path, discovery: Path, namespace: str) -> Iterator[DynamoFrontend]:
    """It finds workers of that namespace in the folder ``discovery``."""
    assert (INSTALLED / "dynamo" / "frontend").is_dir(), f"there is no {INSTALLED}; scripts/setup makes it"
    port, log = _free_port(), folder / "dynamo-frontend.log"
    command = [sys.executable, "-m", "dynamo.frontend", "--discovery-backend", "file", "--namespace", namespace]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")} | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(INSTALLED), os.environ.get("PYTHONPATH")])),
        "DYN_FILE_KV": str(discovery),
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--http-host", "127.0.0.1", "--http-port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
    frontend = DynamoFrontend(process, f"http://127.0.0.1:{port}", log)
    try:
        frontend.wait_until(lambda it: it.models() is not None, "an answer")
        yield frontend
    finally:
        process.terminate()
        process.wait(timeout=_PATIENCE_S)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
