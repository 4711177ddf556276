"""The names of a form's fields, of which brackets make lists and objects: one rule for all fields.

A name is a field and what of it is meant: ``a[b]`` is a field of an object, ``a[]`` one more entry of a list, and
``a[0]`` an entry by its number. They go on inside each other: ``a[0][b]``, ``a[b][c]``, and ``a[][b]``, as the OpenAI
SDKs spell the objects of a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kinema.errors import InvalidRequest

# Fields that may come several times under one name; others have [] behind it.
_REPEATED = ("loras",)
# Lists whose entries may have their numbers behind the name, from any start.
_LISTS = ("control_video", "input_reference", "loras", "reference_images")
# No field of ours is nested more deeply than extra_body[input_reference][0][image_url][url].
_MAX_BRACKETS = 4
_NAME = re.compile(rf"([^\[\]]+)((?:\[[^\[\]]*\]){{0,{_MAX_BRACKETS}}})")
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"[0-9]{1,4}")

Path = tuple[str, ...]


def fold(parts: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
    """Make lists and objects of the parts of a form. A file is bytes, and several of one name are a list.

    Raises InvalidRequest, which names the field, for one that is given more than once.
    """
    fields: dict[str, Any] = {}
    columns: dict[Path, dict[Path, list[str | bytes]]] = {}
    for name, value in parts:
        path = _path(name)
        if "" in path[:-1]:
            at = path.index("")
            columns.setdefault(path[:at], {}).setdefault(path[at + 1 :], []).append(value)
        else:
            _put(fields, path, value, name)
    for path, found in columns.items():
        name = "".join([path[0], *(f"[{inner}]" for inner in path[1:])])
        holder = _holder(fields, path, name)
        others = holder.setdefault(path[-1], [])
        if not isinstance(others, list):
            raise _doubled(name, path[0])
        holder[path[-1]] = [*_rows(name, found), *others]
    return _with_lists(fields)


def _path(name: str) -> Path:
    """The field and its brackets; a name of another form is that of a field, which nobody knows."""
    match = _NAME.fullmatch(name)
    inner = _BRACKET.findall(match[2]) if match else []
    return (name,) if match is None or inner.count("") > 1 else (match[1], *inner)


def _holder(fields: dict[str, Any], path: Path, name: str) -> dict[str, Any]:
    """The object in which the last field of the path is."""
    for step in path[:-1]:
        fields = fields.setdefault(step, {})
        if not isinstance(fields, dict):
            raise _doubled(name, path[0])
    return fields


def _put(fields: dict[str, Any], path: Path, value: str | bytes, name: str) -> None:
    has_end = len(path) > 1 and not path[-1]
    is_entry, path = has_end and isinstance(value, str), path[:-1] if has_end else path
    fields, key = _holder(fields, path, name), path[-1]
    there, may_repeat = fields.get(key), is_entry or isinstance(value, bytes) or key in _REPEATED
    if there is None:
        fields[key] = [value] if is_entry else value
    elif may_repeat and isinstance(there, list):
        there.append(value)
    elif may_repeat and not is_entry and isinstance(there, type(value)):
        fields[key] = [there, value]
    else:
        raise _doubled(name, path[0])


def _rows(name: str, columns: Mapping[Path, Sequence[str | bytes]]) -> list[dict[str, Any]]:
    """Return the objects whose fields came column by column. Raises InvalidRequest when some have more than others."""
    if len(set(map(len, columns.values()))) > 1:
        raise InvalidRequest(
            f"the entries of {name[:100]} have different fields, which a form cannot tell apart; number them, "
            f"{name[:100]}[0], {name[:100]}[1], or send it as JSON text",
            param=name.partition("[")[0],
        )
    rows: list[dict[str, Any]] = []
    for values in zip(*columns.values(), strict=True):
        rows.append({})
        for path, value in zip(columns, values, strict=True):
            _put(rows[-1], path, value, name)
    return rows


def _with_lists(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, in which objects that number the entries of a list are lists."""
    return {
        name: (_in_order(value) if name in _LISTS else _with_lists(value)) if isinstance(value, dict) else value
        for name, value in fields.items()
    }


def _in_order(entries: dict[str, Any]) -> object:
    """The entries of a list by their numbers, or the fields of an object as they are."""
    if not all(map(_NUMBER.fullmatch, entries)):
        return entries
    return [entry for _, entry in sorted(entries.items(), key=lambda item: int(item[0]))]


def _doubled(name: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"{name[:100]} is given more than once", param=param)
