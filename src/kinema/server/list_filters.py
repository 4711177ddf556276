"""What a client looks for in its list of videos: the parameters ``status``, ``model``, ``prompt`` and ``starred``.

They are taken as text, so that an error about one has the shape of all errors. An empty parameter is an absent one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import Query
from pydantic import WithJsonSchema

from kinema.errors import InvalidRequest
from kinema.job import JobStatus
from kinema.jobs.listing import Wanted
from kinema.request.fields import TRUTHS

# A client sees a cancelled video as a failed one; by itself it has a word of its own.
_STATUSES: Mapping[str, Sequence[JobStatus]] = {
    "queued": (JobStatus.QUEUED,),
    "in_progress": (JobStatus.IN_PROGRESS,),
    "completed": (JobStatus.COMPLETED,),
    "failed": (JobStatus.FAILED, JobStatus.CANCELLED),
    "cancelled": (JobStatus.CANCELLED,),
}
_MAX_TEXT = 200
_SLIM = "slim"

Statuses = Annotated[
    list[str] | None,
    WithJsonSchema({"type": "array", "items": {"type": "string", "enum": list(_STATUSES)}}),
    Query(
        alias="status",
        description="Those with one of these statuses, separated by commas or each in a `status` of its own. `failed` "
        "has cancelled videos too; `cancelled` has them alone.",
    ),
]
OfModel = Annotated[str | None, Query(alias="model", description="Those of this model, by its name or an alias.")]
InPrompt = Annotated[
    str | None,
    WithJsonSchema({"type": "string", "maxLength": _MAX_TEXT}),
    Query(
        alias="prompt",
        description="Those with this text in their prompt, in whatever case. A page looks through a thousand videos at "
        "most, also for `model`: it may be short, or empty, while `has_more` is true, and `last_id` leads on.",
    ),
]
Starred = Annotated[
    str | None,
    WithJsonSchema({"type": "boolean"}),
    Query(description="`true`: those with a star; `false`: the others."),
]
Fields = Annotated[
    str | None,
    WithJsonSchema({"type": "string", "enum": [_SLIM]}),
    Query(description="`slim`: of each video what a list shows, without its parameters."),
]


def read_wanted(statuses: Sequence[str] | None, model: str | None, text: str | None, starred: str | None) -> Wanted:
    """Return what is looked for. Raises InvalidRequest."""
    if text and len(text) > _MAX_TEXT:
        raise InvalidRequest(f"prompt is too long; at most {_MAX_TEXT} characters", param="prompt")
    is_starred = TRUTHS.get((starred or "").lower())
    if starred and is_starred is None:
        raise InvalidRequest("starred must be true or false", param="starred")
    return Wanted(_read_statuses(statuses), model or None, text or "", is_starred)


def read_is_slim(fields: str | None) -> bool:
    """Tell whether short answers are asked for. Raises InvalidRequest."""
    if fields and fields != _SLIM:
        raise InvalidRequest(f"fields must be {_SLIM}, or absent for all of them", param="fields")
    return bool(fields)


def _read_statuses(texts: Sequence[str] | None) -> Sequence[JobStatus]:
    names = [name for name in map(str.strip, ",".join(texts or ()).split(",")) if name]
    if (wrong := next((name for name in names if name not in _STATUSES), None)) is not None:
        raise InvalidRequest(
            f"status {wrong[:40]!r} is not known; accepted: {', '.join(_STATUSES)}, with commas between", param="status"
        )
    found = {status for name in names for status in _STATUSES[name]} or set(JobStatus)
    return [status for status in JobStatus if status in found]
