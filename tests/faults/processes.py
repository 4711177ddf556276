"""Processes of Kinema: started, watched through their JSON logs, sent signals, and gone at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.forked import ForkedProcess, forked_with_log

PATIENCE_S = 120.0
_POLL_S = 0.02
_T = TypeVar("_T")


def until(condition: Callable[[], _T], what: str, patience_s: float = PATIENCE_S) -> _T:
    """What the condition says once that is something; the test fails when it takes too long."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not in {patience_s:.0f} s: {what}")
        time.sleep(_POLL_S)
    return found


class Process:
    """``kinema`` with these arguments; ``log`` is its log file, to which a later process of that name adds.

    It is a program of its own, or is forked from a process that has the imports.
    """

    def __init__(
        self, folder: Path, name: str, arguments: Sequence[str], environment: Mapping[str, str], *, is_forked: bool
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._start = self.log.stat().st_size if self.log.exists() else 0
        start = forked_with_log if is_forked else _started
        self._process: ForkedProcess | subprocess.Popen[bytes]
        self._process = start(arguments, {**os.environ, **environment}, folder, self.log)
        self.pid = self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def is_up(self) -> bool:
        """It has said that it works, whether or not it still does."""
        return self.said("listening") is not None or self.said("serving") is not None

    def send(self, number: signal.Signals) -> None:
        if self.is_alive:
            self._process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send the signal and wait for the end; the exit code. A frozen one goes on first, else it could not end."""
        self.send(number)
        if number is not signal.SIGKILL:
            self.send(signal.SIGCONT)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self._process.wait(timeout=PATIENCE_S)

    def said(self, event: str) -> dict[str, Any] | None:
        """The log line of that event."""
        for line in self._lines():
            if f'"{event}"' in line and (said := _parsed(line)).get("event") == event:
                return said
        return None

    def wait_until_said(self, event: str) -> dict[str, Any]:
        """That log line, once it is there; fails with the log's end when the process ends without it."""

        def look() -> dict[str, Any] | None:
            said = self.said(event)
            if said is None and not self.is_alive:
                pytest.fail(f"{self.name} ended before it said {event!r}:\n{self.tail()}")
            return said

        return until(look, f"{self.name} says {event!r}")

    def tail(self, num_lines: int = 40) -> str:
        """The end of its log, without the line that Dynamo's runtime writes for every call."""
        return "\n".join([line for line in self._lines() if "request_span" not in line][-num_lines:])

    def _lines(self) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(self._start)
            return log.read().decode(errors="replace").splitlines()


def _started(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kinema", *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env=environment)


def _parsed(line: str) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return said if isinstance(said, dict) else {}
