"""Kinema: Wan video models behind an OpenAI-compatible HTTP API.

Importing it is cheap: neither torch nor dynamo is loaded until an engine or a cluster that needs them is chosen.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from kinema.errors import KinemaError
from kinema.events import Event
from kinema.job import Job, JobStatus
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.settings import Settings

try:
    __version__ = version("kinema")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Event",
    "GenerationOptions",
    "GenerationRequest",
    "Job",
    "JobStatus",
    "KinemaError",
    "Settings",
    "__version__",
]
