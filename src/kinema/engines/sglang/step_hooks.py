"""Hooks that run inside the library's own workers after each denoising step: they end a cancelled video, and tell the
progress.

The library cannot abort a video, but both of its backends call something after each step: diffusers'
``callback_on_step_end``, which the library hands through, and the progress bar of its own pipelines, which its hooks
for plugins reach. Those processes import nothing else of Kinema, and nothing of the library before it is loaded.
"""

from __future__ import annotations

import logging
import socket
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

_BAR = "sglang.multimodal_gen.runtime.managers.progress_reporter.ReportingTqdm._advance"
_BOOTSTRAP = "sglang.multimodal_gen.runtime.managers.worker_bootstrap"


class VideoCancelled(Exception):
    """The video was cancelled."""


def stop_file(folder: Path, number: int) -> Path:
    """The file that ends a video before its next step, in the folder of all processes' temporary files."""
    return folder / f"stop-{number}"


def reporter(address: Path, number: int) -> partial[dict[str, Any]]:
    """A ``callback_on_step_end`` that can be pickled: it sends datagrams to the socket at ``address``."""
    return partial(report, str(address), number)


def report(
    address: str, number: int, _pipeline: object, step: int, _timestep: object, _tensors: dict[str, Any]
) -> dict[str, Any]:
    """Send the number of steps that are done; ``step`` counts from 0. Raises VideoCancelled."""
    check(number)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(f"{number} {step + 1}".encode(), address)
    return {}


def register() -> None:
    """Let the library's own pipelines call ``before_advance``. A new worker calls this before it applies its hooks."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType  # noqa: PLC0415 - see above

    HookRegistry.register(_BAR, before_advance, HookType.BEFORE)
    # It warns of modules that are imported before it is ready, and means the one with its hooks.
    logging.getLogger(_BOOTSTRAP).setLevel(logging.ERROR)


def before_advance(bar: Any, _steps: float) -> None:  # noqa: ANN401 - the library's progress bar
    """Check for a cancel; the bar itself sends the progress to the library's socket. Raises VideoCancelled."""
    for number in bar._request_ids:
        check(int(number))


def check(number: int) -> None:
    """Raises VideoCancelled when the video of this number was cancelled."""
    if stop_file(Path(tempfile.gettempdir()), number).exists():
        raise VideoCancelled("the video is not wanted any more")
