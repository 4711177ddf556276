"""What runs inside the library's own workers, between two denoising steps: whether to go on, and where it is.

The library cannot abort a video. Both of its backends pass a place after each step, and there this is put: diffusers'
``callback_on_step_end``, which the library hands through, and by its hooks for plugins the progress bar of its own
pipelines. Nothing else of Kinema is used in that process, and nothing of the library is imported before it is there.
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


class Cancelled(Exception):
    """The video is not wanted any more."""


def stop_file(folder: Path, job: int) -> Path:
    """The video ends before its next step once this is there, where the temporary files of all processes go."""
    return folder / f"stop-{job}"


def reporter(address: Path, job: int) -> partial[dict[str, Any]]:
    """A ``callback_on_step_end`` that can be pickled: it sends datagrams to the socket at ``address``."""
    return partial(report, str(address), job)


def report(
    address: str, job: int, _pipeline: object, step: int, _timestep: object, _tensors: dict[str, Any]
) -> dict[str, Any]:
    """``step`` counts from 0. Raises Cancelled."""
    check(job)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(f"{job} {step + 1}".encode(), address)
    return {}


def register() -> None:
    """Have ``before_advance`` called by the library's own pipelines. For a new worker, before it applies its hooks."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType  # noqa: PLC0415 - see above

    HookRegistry.register(_BAR, before_advance, HookType.BEFORE)
    # It warns of modules that are there before it is ready, and means the one of its hooks.
    logging.getLogger(_BOOTSTRAP).setLevel(logging.ERROR)


def before_advance(bar: Any, _steps: float) -> None:  # noqa: ANN401 - the library's progress bar
    """The bar itself tells the library's progress socket where it is. Raises Cancelled."""
    for job in bar._request_ids:
        check(int(job))


def check(job: int) -> None:
    """Raises Cancelled."""
    if stop_file(Path(tempfile.gettempdir()), job).exists():
        raise Cancelled("the video is not wanted any more")
