"""A real `kinema serve` process on a free port, stopped by its process id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.forked import Forked

START_TIMEOUT_S = 120
KINEMA = ("-m", "kinema")


@dataclass
class Process:
    """One that runs; `log` is the file that holds its JSON log."""

    process: subprocess.Popen[str] | Forked
    log: Path
    reader: threading.Thread

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        code = self.process.wait(timeout=30)
        self.reader.join()
        return code

    def said(self, event: str) -> list[dict[str, Any]]:
        """The lines of its log that say so."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [entry for line in lines if line.startswith("{") and (entry := json.loads(line))["event"] == event]


@dataclass
class Server(Process):
    """One that answers over HTTP."""

    url: str

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)  # type: ignore[arg-type]


def start_process(
    log: Path,
    *command: str,
    until: str,
    settings: Mapping[str, str] | None = None,
    program: Sequence[str] | None = None,
) -> tuple[Process, dict[str, Any]]:
    """Run a command of kinema in the log's folder and wait until it logs that event, which is returned too.

    ``settings`` are variables of its environment. ``program`` is what Python runs as a new program; without one the
    process is forked, which is all that most tests need.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "KINEMA_LOG_FORMAT": "json", "KINEMA_JOBS_LEASE_S": "1", **(settings or {})}
    process: subprocess.Popen[str] | Forked
    if program is None:
        process = Forked(command, environment, log.parent)
    else:
        arguments = [sys.executable, *program, *command]
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment, cwd=log.parent)
    found: list[dict[str, Any]] = []
    is_known = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        with process.stderr, log.open("a", encoding="utf-8") as file:
            for line in process.stderr:
                file.write(line)
                file.flush()
                if f'"event": "{until}"' in line:
                    found.append(json.loads(line))
                    is_known.set()
        is_known.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    if not is_known.wait(START_TIMEOUT_S) or not found:
        process.kill()
        pytest.fail(f"kinema {command[0]} did not start:\n{log.read_text(encoding='utf-8')}")
    return Process(process, log, reader), found[0]


@contextmanager
def running_server(
    folder: Path, *arguments: str, settings: Mapping[str, str] | None = None, program: Sequence[str] | None = None
) -> Iterator[Server]:
    """The service, ready, with its data in ``folder``; stopped at the end."""
    server = start_server(folder, *arguments, settings=settings, program=program)
    try:
        yield server
    finally:
        server.stop()


def start_server(
    folder: Path, *arguments: str, settings: Mapping[str, str] | None = None, program: Sequence[str] | None = None
) -> Server:
    """Start the service with its data in ``folder`` and wait until it is ready."""
    server = begin_server(folder, *arguments, settings=settings, program=program)
    with server.client() as client:
        # Its log is asked first: an answer takes milliseconds of a core from what is waited for.
        while not server.said("ready") or client.get("/ready").status_code != 200:
            if server.process.poll() is not None:
                pytest.fail(f"kinema serve did not start:\n{server.log.read_text(encoding='utf-8')}")
            time.sleep(0.02)
    return server


def begin_server(
    folder: Path, *arguments: str, settings: Mapping[str, str] | None = None, program: Sequence[str] | None = None
) -> Server:
    """Start the service with its data in ``folder`` and wait until its port is open."""
    data = str(folder / "data")
    started, line = start_process(
        folder / "serve.log",
        *("serve", "--port", "0", "--data-dir", data, *arguments),
        until="listening",
        settings=settings,
        program=program,
    )
    return Server(started.process, started.log, started.reader, line["url"])


def steps_of(client: httpx.Client, video_id: str) -> list[list[int]]:
    """The denoising steps that its events tell of, for each of its attempts."""
    text = client.get(f"/v1/videos/{video_id}/events", params={"follow": False}).raise_for_status().text
    attempts: list[list[int]] = []
    for block in text.strip().split("\n\n"):
        said = dict(line.split(": ", 1) for line in block.splitlines())
        data = json.loads(said["data"])
        if said["event"] == "started":
            attempts.append([])
        elif said["event"] == "progress" and data["stage"] == "denoise":
            attempts[-1].append(data["step"])
    return attempts
