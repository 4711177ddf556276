"""Pages of a list, as OpenAI's lists have them, and their parameters ``after``, ``limit`` and ``order``.

The handlers take the parameters as text, so that an error about one has the shape of all errors. An empty parameter is
an absent one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Generic, Literal, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel, WithJsonSchema

from kinema.errors import InvalidRequest

_MAX_LIMIT = 100
_DEFAULT_LIMIT = 20
_ORDERS = ("asc", "desc")

After = Annotated[str | None, Query(description="The `last_id` of the page before; by default the list begins.")]
Limit = Annotated[
    str | None,
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": _MAX_LIMIT}),
    Query(description=f"The largest number of entries; by default {_DEFAULT_LIMIT}."),
]
Order = Annotated[
    str | None,
    WithJsonSchema({"type": "string", "enum": list(_ORDERS)}),
    Query(description="By age: `desc` (default) begins with the newest, `asc` with the oldest."),
]


Ids = Annotated[
    list[str] | None,
    WithJsonSchema({"type": "array", "items": {"type": "string"}}),
    Query(
        description=f"Ids, {_MAX_LIMIT} at most, separated by commas or each in an `ids` of its own; without after, "
        "limit and order."
    ),
]


class Listed(BaseModel):
    """An entry of a list."""

    id: str


ListedT = TypeVar("ListedT", bound=Listed)


class Page(BaseModel, Generic[ListedT]):
    """One page of a list. To get the next page, send ``last_id`` as ``after``."""

    object: Literal["list"] = "list"
    data: list[ListedT]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, entries: Sequence[ListedT], *, has_more: bool, last_id: str | None = None) -> Self:
        """Return the page of these entries. ``last_id`` is given where the page ends behind its last entry."""
        ids = [entry.id for entry in entries]
        first, last = (ids[0], ids[-1]) if ids else (None, None)
        return cls(data=list(entries), first_id=first, last_id=last_id or last, has_more=has_more)


def read_after(text: str | None, is_id: Callable[[str], bool], what: str) -> str | None:
    """Return the id after which the page begins. ``what`` names an entry of the list. Raises InvalidRequest."""
    if not text:
        return None
    if is_id(text):
        return text
    raise InvalidRequest(f"after {text[:40]!r} is not the id of a {what}", param="after")


def read_ids(texts: Sequence[str] | None, is_id: Callable[[str], bool], what: str) -> Sequence[str]:
    """Return the ids, each once. Raises InvalidRequest when there is none, or too many, or something else."""
    found = dict.fromkeys(filter(None, map(str.strip, ",".join(texts or ()).split(","))))
    if not 0 < len(found) <= _MAX_LIMIT:
        raise InvalidRequest(f"ids takes 1 to {_MAX_LIMIT} ids, separated by commas", param="ids")
    if (wrong := next((one for one in found if not is_id(one)), None)) is not None:
        raise InvalidRequest(f"ids: {wrong[:40]!r} is not the id of a {what}", param="ids")
    return list(found)


def read_limit(text: str | None) -> int:
    """Return the largest number of entries. Raises InvalidRequest."""
    if not text:
        return _DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= _MAX_LIMIT):
        raise InvalidRequest(f"limit must be a whole number from 0 to {_MAX_LIMIT}", param="limit")
    return int(text)


def read_is_ascending(text: str | None) -> bool:
    """Tell whether the oldest entry comes first. Raises InvalidRequest."""
    if text and text not in _ORDERS:
        raise InvalidRequest(f"order must be one of {', '.join(_ORDERS)}", param="order")
    return text == "asc"
