"""A service that is started to be measured: a process with an engine, a database and a temporary folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kinema.errors import ServiceError

_STOP_S = 20
# More than any measurement submits, so that nothing is refused.
_MAX_QUEUED = "1000000"


class NotStarted(ServiceError):
    """The service to measure did not start."""

    code = "not_started"


@contextmanager
def running_server(
    database_url: str | None, model: str = "fake", settings: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Start ``kinema serve`` on a free port and give its address once it is ready; ``settings`` have dotted keys.

    Raises NotStarted, with the end of its log.
    """
    with TemporaryDirectory(prefix="kinema-bench-") as folder:
        log = Path(folder) / "serve.log"
        with log.open("w", encoding="utf-8") as file:
            process = _start(Path(folder), database_url, model, settings or {}, file.fileno())
        try:
            yield _address(process, log)
        finally:
            stop(process)


def _start(
    folder: Path, database_url: str | None, model: str, settings: Mapping[str, str], log: int
) -> subprocess.Popen[bytes]:
    engine = "fake" if model == "fake" else "wan"
    command = [sys.executable, "-m", "kinema", "serve", "--engine", engine, "--model", model, "--port", "0"]
    command += ["--data-dir", str(folder / "data")]
    if database_url is not None:
        command += ["--database", database_url]
    given = {"log_format": "json", "jobs.max_queued": _MAX_QUEUED, **settings}
    environment = os.environ | {f"KINEMA_{key.replace('.', '_').upper()}": value for key, value in given.items()}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)  # noqa: S603 - our own words


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """What its log says: where it listens, and then that it is ready."""
    address = ""
    with log.open(encoding="utf-8") as file:
        while process.poll() is None:
            line = file.readline()
            if '"event": "listening"' in line:
                address = str(json.loads(line)["url"])
            if '"event": "ready"' in line:
                return address
            if not line:
                _pause(process)
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
    raise NotStarted(f"the service to measure did not start: {' '.join(last) or f'it ended with {process.returncode}'}")


def _pause(process: subprocess.Popen[bytes]) -> None:
    """Wait a moment for the process to write more, or to end."""
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        return


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a service that was started here, and wait for its end."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
