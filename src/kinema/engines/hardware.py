"""The names of this machine's devices, found without torch."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

_CPUS = Path("/proc/cpuinfo")
# The driver's own file, and the one that replaces it under WSL.
_NVIDIA = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


@cache
def cpu_name() -> str:
    """The processor's model, or at least its kind, on one line."""
    with suppress(OSError):
        for line in _CPUS.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()[:200]
    return platform.machine() or "unknown"


def has_nvidia() -> bool:
    """Whether this machine has a driver for NVIDIA's GPUs."""
    return any(path.exists() for path in _NVIDIA)
