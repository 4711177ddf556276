"""JSON from clients and of checkpoints, read with care: it takes no more memory and time than a request may."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from kinema.errors import InvalidRequest

# More digits than any parameter takes; Python itself refuses to read thousands of them.
MAX_DIGITS = 40
# The three longest texts (32,000 characters each) cannot have more brackets and commas. A body with so many values
# takes some MB of memory. Base64 has none of these characters.
_MAX_VALUES = 100_000
# Of an object; a form has no more parts. Every field that is left costs time: its value is checked, or it is refused.
_MAX_FIELDS = 200
_MAX_NAME_CHARS = 200
# Names that an error tells.
_MAX_TOLD = 10
_SURROGATE = re.compile("[\ud800-\udfff]")
# One of a pair, too.
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_text(name: str, text: str) -> str:
    """Return the text. Raises InvalidRequest when it cannot be stored and written as UTF-8."""
    if "\0" in text:
        raise InvalidRequest(f"{name} must not contain NUL characters", param=name)
    try:
        text.encode()
    except UnicodeEncodeError as exc:  # from JSON's escapes, or a byte of the command line that is not UTF-8
        raise InvalidRequest(f"{name} is not valid Unicode: it has a lone surrogate", param=name) from exc
    return text


def parse_json(text: str, name: str, max_fields: int | None = _MAX_FIELDS) -> Any:  # noqa: ANN401 - whatever was sent
    """Return the value of a JSON text. ``name`` is the name of the text in an error.

    An object has at most ``max_fields``; None, for a list of tensors, bounds them as all values are. Raises
    InvalidRequest.
    """
    if sum(map(text.count, "{[,")) > _MAX_VALUES:
        raise InvalidRequest(f"{name} has too many values; at most {_MAX_VALUES:,} brackets and commas are read")
    try:
        return json.loads(
            text,
            parse_constant=partial(_refuse_constant, name),
            parse_int=_read_int,
            object_pairs_hook=partial(_read_object, max_fields=_MAX_VALUES if max_fields is None else max_fields),
        )
    except InvalidRequest:
        raise
    except RecursionError as exc:
        raise InvalidRequest(f"{name} is nested too deeply") from exc
    except ValueError as exc:
        raise InvalidRequest(f"{name} is not valid JSON: {exc}") from exc


def parse_file(text: str) -> Any:  # noqa: ANN401 - whatever it has
    """Return the value of the JSON of a model's file, whose texts may be shown to clients. Raises InvalidRequest."""
    value = parse_json(text, "it", max_fields=None)
    if _ESCAPED_SURROGATE.search(text) and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise InvalidRequest("it is not valid Unicode: it has a lone surrogate")
    return value


def _read_object(pairs: Sequence[tuple[str, Any]], max_fields: int) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(pairs) > max_fields:
        raise InvalidRequest(f"an object has {len(pairs):,} fields ({told(names)}); at most {max_fields} are read")
    for name in names:
        if len(name) > _MAX_NAME_CHARS:
            raise InvalidRequest(f"unknown field {name[:40]!a}...; names have at most {_MAX_NAME_CHARS} characters")
        if _SURROGATE.search(name):
            raise InvalidRequest(f"the field name {name[:40]!a} is not valid Unicode: it has a lone surrogate")
    fields = dict(pairs)
    if len(fields) < len(pairs):
        doubled = Counter(names).most_common(1)[0][0]
        raise InvalidRequest(f"{doubled[:100]} is given more than once", param=doubled[:100])
    return fields


def told(names: Sequence[str]) -> str:
    """The first ten names, and how many there are beside them; each cut short."""
    some = ", ".join(ascii(name[:40]) for name in names[:_MAX_TOLD])
    return some + (f" and {len(names) - _MAX_TOLD:,} more" if len(names) > _MAX_TOLD else "")


def _refuse_constant(name: str, word: str) -> NoReturn:
    raise InvalidRequest(f"{name} is not valid JSON: {word} is not a JSON number")


def _read_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.copysign(math.inf, -1 if digits[0] == "-" else 1)
