"""A group of processes that end together, as Linux lists it.

Python's tracker of shared memory is not killed: it ends by itself after the others, and removes the named semaphores
and the like that a killed process leaves behind.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_TRACKER = b"multiprocessing.resource_tracker"


def members_of(group: int) -> list[int]:
    """The ids of the group's processes that have not ended; a zombie has."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # After the name, which may hold anything and ends at the last bracket: state, parent, group.
            state, _, in_group, *_ = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(in_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def kill_group(group: int, patience_s: float) -> None:
    """Kill all processes of the group. This process may be one of them: it stays, and so does the tracker.

    They end at once, but for one that waits for a device; after ``patience_s`` seconds this returns all the same.
    """
    until = time.monotonic() + patience_s
    own = os.getpid()
    while (others := [pid for pid in members_of(group) if pid != own]) and time.monotonic() < until:
        computing = [pid for pid in others if not _is_tracker(pid)]
        for pid in computing:
            _kill(pid)
        if not computing and group == os.getpgrp():
            return
        time.sleep(0.01)
    for pid in others:
        _kill(pid)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _is_tracker(pid: int) -> bool:
    with suppress(OSError):
        return _TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
