"""A real etcd for the tests: its own process, in a temporary folder, on free ports of this machine."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.postgres import free_port

_START_TIMEOUT_S = 60


class EtcdServer:
    """One member. It can be killed, and started again on the same ports with its data or without."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self._peer = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{free_port()}"

    def start(self) -> None:
        """Return when it answers."""
        listening = ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        peering = ["--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer]
        members = ["--name", "one", "--initial-cluster", f"one={self._peer}"]
        command = [self._program, "--data-dir", str(self._folder / "data"), *listening, *peering, *members]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        self._wait_until_it_answers(self._process)

    def kill(self) -> None:
        """At once, as when its machine fails."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=60)
            self._process = None

    def restart(self, *, wiped: bool) -> None:
        """Kill it and start it again, with all that it knew or with nothing."""
        self.kill()
        if wiped:
            shutil.rmtree(self._folder / "data")
        self.start()

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1) as answer:
                    if b'"true"' in answer.read():
                        return
            except OSError:
                pass
            time.sleep(0.02)
        pytest.fail(f"etcd did not start:\n{(self._folder / 'log').read_text(encoding='utf-8')}")


@contextmanager
def running_etcd() -> Iterator[EtcdServer]:
    """Skips the test where etcd is not installed."""
    program = shutil.which("etcd")
    if program is None:
        pytest.skip("etcd is not installed; on Debian: apt-get install etcd-server")
    folder = Path(tempfile.mkdtemp(prefix="kinema-etcd-"))
    server = EtcdServer(program, folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
