"""A real `kinema serve` process on a free port, stopped by its process id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

START_TIMEOUT_S = 120


@dataclass
class Server:
    """A running process; `log` is the file that holds its JSON log."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    reader: threading.Thread

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)  # type: ignore[arg-type]

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        code = self.process.wait(timeout=30)
        self.reader.join()
        return code


def start_server(folder: Path, *arguments: str) -> Server:
    """Start the service with its data in ``folder`` and wait until it says where it listens."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "serve.log"
    environment = {**os.environ, "KINEMA_LOG_FORMAT": "json", "KINEMA_JOBS_LEASE_S": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kinema", "serve", "--port", "0", "--data-dir", str(folder / "data"), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
    )
    found: list[str] = []
    is_known = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        with process.stderr, log.open("a", encoding="utf-8") as file:
            for line in process.stderr:
                file.write(line)
                file.flush()
                if '"listening"' in line:
                    found.append(json.loads(line)["url"])
                    is_known.set()
        is_known.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    if not is_known.wait(START_TIMEOUT_S) or not found:
        process.kill()
        pytest.fail(f"kinema serve did not start:\n{log.read_text(encoding='utf-8')}")
    return Server(process, found[0], log, reader)


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with no configuration but a free port and its own folder: the bundled model on the CPU."""
    server = start_server(tmp_path_factory.mktemp("tiny"))
    yield server
    server.stop()
