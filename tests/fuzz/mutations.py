"""Changes to a request, each drawn from a generator of random numbers, so that a seed gives the same request."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from tests.fuzz.lines import HEADER_VALUES, HEADERS, METHODS, PATH_PARTS, QUERY_NAMES, QUERY_VALUES
from tests.fuzz.requests import BOUNDARY, Body, Form, Json, Part, Raw, Request, percent_encoded
from tests.fuzz.values import FIELD_VALUES, NAMES, TEXT_PIECES, VALUES

_Mutation = Callable[[Random, Request], Request]


def mutated(random: Random, request: Request) -> Request:
    """The request with one to four changes."""
    for _ in range(random.choice([1, 1, 1, 2, 3, 4])):
        request = random.choices(list(_MUTATIONS), list(_MUTATIONS.values()))[0](random, request)
    return request


Swap = tuple[int, Sequence[Any], Any]


def swaps(random: Random, requests: Sequence[Request]) -> Sequence[Swap]:
    """Every field of every JSON body, with each value that is odd for a field of its name, in random order.

    A swap is the index of the request, the path to the field and the value.
    """
    found: list[Swap] = [
        (index, path, value)
        for index, request in enumerate(requests)
        if isinstance(request.body, Json)
        for path in _paths(request.body.value)
        for value in FIELD_VALUES.get(path[-1], [])
    ]
    random.shuffle(found)
    return found


def swapped(requests: Sequence[Request], swap: Swap) -> Request:
    index, (*outer, name), value = swap
    request = requests[index]
    assert isinstance(request.body, Json)
    body = copy.deepcopy(request.body.value)
    holder = body
    for key in outer:
        holder = holder[key]
    holder[name] = value
    return replace(request, body=Json(body))


def _paths(value: Any) -> Iterator[Sequence[Any]]:
    """The paths to all fields of objects within the value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield [name]
            yield from ([name, *path] for path in _paths(inner))


def _body(random: Random, request: Request) -> Request:
    return replace(request, body=_changed(random, request.body))


def _changed(random: Random, body: Body) -> Body:
    match body:
        case Json(value):
            return Json(_json(random, value)) if random.random() < 0.7 else _as_raw(random, body, "application/json")
        case Form(parts):
            if random.random() < 0.7:
                return Form(_parts(random, list(parts)))
            return _as_raw(random, body, f"multipart/form-data; boundary={BOUNDARY}")
        case Raw(kind, data):
            return Raw(kind, damaged(random, data))
        case None:
            return random.choice([Json({}), Json([]), Form([]), Raw("application/json", b"")])


def _as_raw(random: Random, body: Json | Form, kind: str) -> Raw:
    kinds = [kind] * 6 + [
        "application/json",
        "multipart/form-data",
        "text/plain",
        "application/x-www-form-urlencoded",
        "",
    ]
    return Raw(random.choice(kinds), damaged(random, body.encoded))


def _json(random: Random, value: Any) -> Any:
    """The value with a change somewhere within."""
    value = copy.deepcopy(value)
    holder, key = _place(random, value)
    if holder is None:
        return random.choice(VALUES)
    drawn = random.random()
    if drawn < 0.6:
        holder[key] = random.choice(_values(random, key))
    elif drawn < 0.7:
        del holder[key]
    elif drawn < 0.8:
        holder[key] = random.choice([[holder[key]], {"a": holder[key]}, json.dumps(holder[key]), str(holder[key])])
    elif isinstance(holder[key], str):
        holder[key] = _text(random, holder[key])
    elif isinstance(holder, dict):
        holder[random.choice(NAMES)] = random.choice(VALUES)
    return value


def _place(random: Random, value: Any) -> tuple[Any, Any]:
    """A container within the value, and a key of it."""
    places = [(value, key) for key in _keys(value)]
    for holder, key in places:
        places += [(holder[key], inner) for inner in _keys(holder[key])]
    return random.choice(places) if places and random.random() < 0.95 else (None, None)


def _values(random: Random, name: Any) -> Sequence[Any]:
    """What to put there: anything, or something that is odd for a field of that name."""
    known = FIELD_VALUES.get(name) if isinstance(name, str) else None
    return known if known is not None and random.random() < 0.5 else VALUES


def _keys(value: Any) -> Sequence[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def _parts(random: Random, parts: list[Part]) -> list[Part]:
    if not parts:
        return [Part("prompt", b"a cat")]
    index = random.randrange(len(parts))
    part = parts[index]
    match random.randrange(8):
        case 0:
            parts[index] = replace(part, name=random.choice([*NAMES, f"{part.name}[]", f"{part.name}[a]", ""]))
        case 1:
            parts.insert(random.randrange(len(parts) + 1), part)
        case 2:
            del parts[index]
        case 3:
            parts[index] = replace(part, file_name=random.choice([None, "", "a.png", "../../a", "a\0b", "ä.mp4"]))
        case 4:
            parts[index] = replace(
                part, content_type=random.choice(["", "text/plain; charset=utf-16", "a/b", "x" * 5000])
            )
        case 5:
            parts.extend(Part(random.choice(NAMES), b"1") for _ in range(random.choice([3, 250])))
        case 6:
            value = random.choice(_values(random, part.name))
            parts[index] = replace(part, value=str(value).encode("utf-8", "surrogatepass"))
        case _:
            # Files are the largest surface: most of these changes go to one.
            index = max(range(len(parts)), key=lambda i: (parts[i].file_name is not None, i == index))
            parts[index] = replace(parts[index], value=damaged(random, parts[index].value))
    return parts


def damaged(random: Random, data: bytes) -> bytes:
    """Bytes with some flipped, cut out, doubled, put in, or with another number of four bytes in their place."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        at = random.randrange(len(changed) + 1)
        match random.randrange(7):
            case 0 | 1 if changed:
                changed[at % len(changed)] ^= 1 << random.randrange(8)
            case 2:
                del changed[at : at + random.choice([1, 4, 64, len(changed)])]
            case 3:
                changed[at:at] = changed[at : at + random.choice([1, 4, 64])]
            case 4:
                number = random.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, len(changed), random.getrandbits(32)])
                changed[at : at + 4] = number.to_bytes(4, random.choice(["big", "little"]))
            case 5:
                changed[at:at] = random.choice(TEXT_PIECES).encode("utf-8", "surrogatepass")
            case _:
                changed[at : at + 8] = random.randbytes(8)
    return bytes(changed)


def _text(random: Random, text: str) -> str:
    at = random.randrange(len(text) + 1)
    return text[:at] + random.choice(TEXT_PIECES) + text[at + random.choice([0, 0, 1, 5]) :]


def _header(random: Random, request: Request) -> Request:
    name, values = random.choice(list(HEADERS.items()))
    value: str | bytes = random.choice(values if random.random() < 0.7 else HEADER_VALUES)
    changed = request.with_header(name, value)
    is_framed = request.is_framed and name not in {"content-length", "transfer-encoding", "expect", "upgrade"}
    return replace(changed, is_framed=is_framed)


def _doubled_header(random: Random, request: Request) -> Request:
    """A header that comes twice, with two values."""
    name, values = random.choice(list(HEADERS.items()))
    value = random.choice(values)
    encoded = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    is_framed = request.is_framed and name not in {"content-length", "transfer-encoding", "expect", "upgrade"}
    return replace(request, headers=[*request.headers, (name, encoded)], is_framed=is_framed)


def _query(random: Random, request: Request) -> Request:
    pairs = list(request.query)
    if pairs and random.random() < 0.5:
        index = random.randrange(len(pairs))
        pairs[index] = (pairs[index][0], random.choice(QUERY_VALUES))
    else:
        pairs.append((random.choice(QUERY_NAMES), random.choice(QUERY_VALUES)))
    return replace(request, query=pairs)


def _path(random: Random, request: Request) -> Request:
    parts = request.path.split("/")
    index = random.randrange(1, len(parts)) if len(parts) > 1 else 0
    match random.randrange(4):
        case 0:
            parts[index] = random.choice(PATH_PARTS)
        case 1:
            parts.insert(index, random.choice(PATH_PARTS))
        case 2:
            del parts[index]
        case _:
            parts[index] = percent_encoded(_text(random, parts[index]))
    return replace(request, path="/".join(parts) or "/")


def _method(random: Random, request: Request) -> Request:
    return replace(request, method=random.choice(METHODS))


# How often each of them is drawn.
_MUTATIONS: dict[_Mutation, int] = {
    _body: 12,
    _header: 5,
    _doubled_header: 1,
    _query: 4,
    _path: 3,
    _method: 1,
}
