"""The ids of jobs: how they are made, and what they look like."""

from __future__ import annotations

import re
import secrets
import time
from typing import NewType

JobId = NewType("JobId", str)
_JOB_ID = re.compile(r"video_[0-9a-f]{32}", re.ASCII)


def new_job_id(now: float | None = None) -> JobId:
    """Return an id that nobody can guess and that sorts by age.

    It is ``video_`` and, in hexadecimal, 48 bits of milliseconds and 80 random bits. The order makes any id a place in
    a list, even after its job was deleted. ``now`` is in seconds since the epoch.
    """
    milliseconds = int((time.time() if now is None else now) * 1000)
    return JobId(f"video_{milliseconds:012x}{secrets.token_hex(10)}")


def is_job_id(text: str) -> bool:
    """Tell whether the text has the form of an id."""
    return _JOB_ID.fullmatch(text) is not None
