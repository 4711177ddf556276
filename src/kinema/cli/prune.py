"""``kinema jobs prune``: removes ended videos from the database and the storage of a service."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Collection

import typer

from kinema.cli.jobs_view import print_plain
from kinema.hosting import upkeep
from kinema.hosting.logs import configure_logs
from kinema.job import JobStatus
from kinema.settings import Settings
from kinema.shell import err, run

_AGE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)([mhdw])")
_UNITS_S = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def prune(settings: Settings, older_than: str, statuses: Collection[str], *, is_confirmed: bool) -> None:
    """Print the numbers of these videos, and remove them when it ``is_confirmed``."""
    ended_before = time.time() - _seconds(older_than)
    configure_logs(is_json=settings.log_format == "json")

    def call() -> None:
        found = asyncio.run(
            upkeep.prune(settings, ended_before, {JobStatus(status) for status in statuses}, removes=is_confirmed)
        )
        for status, count in sorted(found.items()):
            print_plain(f"{status}\t{count}")
        done = "removed" if is_confirmed else "nothing was removed; --yes removes them"
        err.print(f"{sum(found.values())} videos that ended more than {older_than} ago: {done}")

    run(call)


def _seconds(text: str) -> float:
    """Raises BadParameter for what is no time."""
    found = _AGE.fullmatch(text)
    seconds = math.nan if found is None else float(found[1]) * _UNITS_S[found[2]]
    if not seconds > 0:
        raise typer.BadParameter(
            "a number above 0 and a unit are accepted: 90m, 36h, 30d or 8w", param_hint="--older-than"
        )
    return seconds
