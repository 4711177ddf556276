"""Measures a server while somebody attacks it: its memory and open files, and what another client waits.

It is a process of its own, so that what the attacker's threads do cannot lengthen what it measures. It knows a process
id and a URL, takes them as JSON, and prints a line when it has begun and one with what it saw when its input ends.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# A process that lives shorter than this may be missed. The peak of one that is seen is the kernel's own, so it is not.
_SAMPLE_S = 0.01
# Between two asks. It is a polite client, and it needs no core of its own.
_ASK_S = 0.02
# Longer than anybody waits; a client that hears nothing for this long counts as shut out.
PATIENCE_S = 60.0


def tree(pid: int) -> Iterator[int]:
    """The process and all that it has started, directly or not."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread may end between two lines
            for child in children.read_text().split():
                yield from tree(int(child))


def resident_bytes(pid: int, *, peak: bool = False) -> int:
    """The memory that a process has now, or its peak since ``forget_peak``; 0 for one that has ended."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(wanted):
                return int(line.split()[1]) * 1024
    return 0


def forget_peak(pid: int) -> None:
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def num_files(pid: int) -> int:
    """How many files and connections a process has open."""
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


class Sampler(threading.Thread):
    """Keeps the peak of the sum over all processes, each with its own peak since the sample before."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._known = {pid}
        self.ended = threading.Event()
        self.sample()  # the peaks of the time before do not count
        self.before = self.peak = self.sample()
        self.peak_files = num_files(pid)

    def run(self) -> None:
        while not self.ended.wait(_SAMPLE_S):
            self.look()
        self.look()

    def look(self) -> None:
        self.peak = max(self.peak, self.sample())
        self.peak_files = max(self.peak_files, num_files(self._pid))

    def sample(self) -> int:
        self._known.update(tree(self._pid))  # a child whose parent has ended is still the server's
        total = 0
        for pid in list(self._known):
            found = resident_bytes(pid, peak=True)
            total += found
            forget_peak(pid)
            if not found and pid != self._pid:
                self._known.discard(pid)
        return total


class Client:
    """Asks for one path after another, each time over a new connection, and keeps how long each took."""

    def __init__(self, url: str, asks: Sequence[str], headers: Mapping[str, str]) -> None:
        self._at = urlsplit(url)
        self._asks = asks
        self._headers = {**headers, "connection": "close"}
        self.waits: list[dict[str, Any]] = []

    def ask_all(self) -> None:
        for path in self._asks:
            self.ask(path)

    def ask(self, path: str) -> None:
        began, status, failure = time.monotonic(), 0, ""
        connection = http.client.HTTPConnection(str(self._at.hostname), self._at.port, timeout=PATIENCE_S)
        try:
            connection.request("GET", path, headers=self._headers)
            answer = connection.getresponse()
            answer.read()
            status = answer.status
        except (OSError, http.client.HTTPException) as exc:
            failure = repr(exc)
        finally:
            connection.close()
        wait_s = time.monotonic() - began
        self.waits.append({"path": path, "wait_s": wait_s, "status": status, "failure": failure})


def main() -> None:
    told = json.loads(sys.argv[1])
    client = Client(told["url"], told["asks"], told["headers"])
    client.ask_all()
    sampler = Sampler(told["pid"])
    sampler.start()
    has_ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), has_ended.set()), daemon=True).start()
    print("watching", flush=True)
    while True:
        is_last = has_ended.is_set()
        client.ask_all()
        if is_last:
            break
        has_ended.wait(_ASK_S)
    sampler.ended.set()
    sampler.join()
    seen = {"before": sampler.before, "peak": sampler.peak, "peak_files": sampler.peak_files, "waits": client.waits}
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
