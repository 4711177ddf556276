"""The names of this machine's devices, found without torch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import threading
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


def wake_gpu() -> None:
    """Begin what a GPU needs before its first use, on a thread, where this machine has NVIDIA's driver.

    The driver is initialised (a quarter of a second on an H200), and CUDA's libraries are read into the page cache, for
    which a first start on a machine waits. Both go on while torch is imported, since neither holds the interpreter.
    What is wrong with the driver is for torch to say.
    """
    if has_nvidia():
        threading.Thread(target=_wake_gpu, name="wake gpu", daemon=True).start()


def _wake_gpu() -> None:
    for library in _cuda_libraries():
        with suppress(OSError), library.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuInit(0)


def _cuda_libraries() -> list[Path]:
    """The files of the packages nvidia-*, which have CUDA's libraries for torch."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return [path for folder in folders for path in Path(folder).glob("*/lib/*.so*")]
