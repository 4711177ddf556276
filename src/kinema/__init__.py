"""Kinema: Wan video models behind an OpenAI-compatible HTTP API.

Importing it is cheap: each name below is imported when it is first used, and neither torch nor dynamo is loaded until
an engine or a cluster that needs them is chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kinema.errors import KinemaError
    from kinema.events import Event
    from kinema.job import Job, JobStatus
    from kinema.request.options import GenerationOptions
    from kinema.request.request import GenerationRequest
    from kinema.settings import Settings

    __version__: str
else:
    import importlib

    _MODULES = {
        "Event": "kinema.events",
        "GenerationOptions": "kinema.request.options",
        "GenerationRequest": "kinema.request.request",
        "Job": "kinema.job",
        "JobStatus": "kinema.job",
        "KinemaError": "kinema.errors",
        "Settings": "kinema.settings",
    }

    def __getattr__(name: str) -> object:
        if name == "__version__":
            value: object = _installed_version()
        elif name in _MODULES:
            value = getattr(importlib.import_module(_MODULES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow to import, and seldom asked

    try:
        return version("kinema")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


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
