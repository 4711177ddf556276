"""``/v1/usage``: what a key has made, by day."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import WithJsonSchema
from starlette.responses import Response

from kinema.errors import InvalidRequest
from kinema.server.api import CallerParam, json_response
from kinema.server.description import reads
from kinema.server.schemas import Usage, UsageList

_DEFAULT_DAYS = 30
_MAX_DAYS = 366

_DAY_SCHEMA = WithJsonSchema({"type": "string", "format": "date"})
First = Annotated[
    str | None,
    _DAY_SCHEMA,
    Query(alias="from", description=f"The first day (UTC); by default {_DEFAULT_DAYS - 1} days before the last."),
]
Last = Annotated[str | None, _DAY_SCHEMA, Query(alias="to", description="The last day (UTC); by default today.")]

router = APIRouter()


@router.get("/v1/usage", response_model=UsageList, responses=reads("What was made.", InvalidRequest), tags=["usage"])
async def usage(caller: CallerParam, first: First = None, last: Last = None) -> Response:
    """Tell what this key has made on each day, also of videos that were deleted since. A key that may see all gets the
    days of every key.

    A day on which nothing was finished is left out. Videos that failed or were cancelled do not count.
    """
    last_day = _read_day(last, "to") or datetime.now(UTC).date()
    first_day = _read_day(first, "from") or last_day - timedelta(
        days=min(_DEFAULT_DAYS - 1, (last_day - date.min).days)
    )
    if not 0 <= (last_day - first_day).days < _MAX_DAYS:
        raise InvalidRequest(
            f"from is the same day as to or an earlier one, {_MAX_DAYS} days in all at most", param="from"
        )
    keys = caller.api.keys
    of_key = None if keys.sees_all_usage(caller.key_id) else caller.key_id
    found = await caller.api.service.usage(of_key, first_day, last_day)
    return json_response(
        UsageList(
            data=[
                Usage(
                    day=one.day.isoformat(),
                    key=keys.name(one.key_id),
                    videos=one.num_videos,
                    device_s=round(one.device_s, 3),
                    bytes=one.size_bytes,
                )
                for one in found
            ]
        )
    )


def _read_day(text: str | None, name: str) -> date | None:
    if not text:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).date()
    except ValueError:
        raise InvalidRequest(f"{name} must be a day such as 2026-12-31", param=name) from None
