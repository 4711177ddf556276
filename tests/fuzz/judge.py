"""What every answer must be, whatever was asked: no fault of the server, and a body of the described shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import jsonschema_rs
from pydantic_core import from_json

from kinema.errors import StorageUnavailable, by_code
from tests.described import check_answer, description, operations_of
from tests.hostile.raw import Answer

# Answered before a request has a route: a head that is none, too large, too long or for another host, or did not come.
_BEFORE_ROUTING = {400, 408, 413, 414, 421, 431}
# The HTTP server's own headers, which no handler knows.
_OF_CONNECTION = {"date", "transfer-encoding", "connection", "keep-alive"}
_ID = re.compile(r"(video|we)_[0-9a-f]{32}")
# What tells a stranger about the inside.
_INNARDS = (b"Traceback (most recent call last)", b"/site-packages/", b'.py", line')


@dataclass
class Findings:
    """What was wrong, by kind: each with its first request, and how often it came."""

    num_asked: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def judge(self, method: str, path: str, answer: Answer | None, request: object, *, is_framed: bool = True) -> None:
        self.num_asked += 1
        if answer is None:
            if is_framed:
                self.add(f"{method[:20]!r} {_ID.sub('ID', path)[:60]}: no answer", request)
            return
        self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
        try:
            check(method, path, answer)
        except (AssertionError, ValueError, LookupError) as exc:  # the last two: a body that is not what it says
            what = _ID.sub("ID", str(exc).splitlines()[0])[:300]
            self.add(f"{method[:20]!r} {what}", f"{request}\n    {answer.status} {answer.body[:500]!r}")

    def add(self, what: str, request: object) -> None:
        self._first.setdefault(what, str(request))
        self._counts[what] = self._counts.get(what, 0) + 1

    def __bool__(self) -> bool:
        return bool(self._first)

    def __str__(self) -> str:
        told = [f"{self._counts[what]} x {what}\n    {first}" for what, first in self._first.items()]
        return f"{self.num_asked} requests, statuses {dict(sorted(self.statuses.items()))}\n" + "\n".join(told)


def check(method: str, path: str, answer: Answer) -> None:
    """Fail unless this may be the answer to that request. ``path`` is as it was sent, without the query."""
    path = unquote(path)
    for word in _INNARDS:
        assert word not in answer.body, f"{path}: the answer shows {word!r}"
    if answer.status >= HTTPStatus.BAD_REQUEST:
        _check_error(method, answer)
    if answer.status in _BEFORE_ROUTING and str(answer.status) not in _described_statuses(method, path):
        return
    headers = {name: value for name, value in answer.headers.items() if name not in _OF_CONNECTION}
    operation = check_answer(method, path, answer.status, headers, answer.body)
    if operation is not None and answer.body and answer.status < HTTPStatus.BAD_REQUEST:
        _check_body(path, operation["responses"][str(answer.status)]["content"], answer)


def _described_statuses(method: str, path: str) -> Mapping[str, Any]:
    described: Mapping[str, Any] = operations_of(path).get(method, {"responses": {}})["responses"]
    return described


def _check_error(method: str, answer: Answer) -> None:
    if method == "HEAD":
        assert answer.status < HTTPStatus.INTERNAL_SERVER_ERROR, f"{answer.status} without a body"
        return
    assert answer.headers.get("content-type") == "application/json", f"{answer.status} is not JSON"
    problem = next(_validator(("ErrorBody",)).iter_errors(from_json(answer.body)), None)
    assert problem is None, f"{answer.status} has not the shape of an error: {problem and problem.message}"
    error = answer.error
    assert error["message"].strip(), f"{answer.status} without a sentence"
    assert error["code"], f"{answer.status} without a code"
    # A disk may be full and a storage away; everything else above 499 is a fault.
    is_of_storage = issubclass(by_code(error["code"]), StorageUnavailable)
    is_fault = answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not is_of_storage
    assert not is_fault, f"{answer.status} {error['code']}: {error['message'][:100]}"


def _check_body(path: str, content: Mapping[str, Any], answer: Answer) -> None:
    media_type = answer.headers["content-type"].partition(";")[0]
    if media_type == "text/event-stream":
        _check_events(answer.body)
    elif media_type == "application/json" and (names := _names(content[media_type].get("schema", {}))):
        problem = next(_validator(names).iter_errors(from_json(answer.body)), None)
        assert problem is None, f"{path}: the body is no {' or '.join(names)}: {problem and problem.message}"


def _names(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the schemas that a body may have: one, or one of several; empty where the description names none."""
    found = [one["$ref"] for one in schema.get("anyOf", [schema]) if "$ref" in one]
    return tuple(name.rpartition("/")[2] for name in found)


def _check_events(body: bytes) -> None:
    """Every event has a name and JSON, and the last of a stream that ended has the whole video."""
    blocks = [
        dict(line.split(": ", 1) for line in block.splitlines()) for block in body.decode().split("\n\n") if block
    ]
    for block in blocks:
        if "data" in block:
            assert block["event"], "an event without a name"
            from_json(block["data"])


@cache
def _validator(names: tuple[str, ...]) -> jsonschema_rs.Draft202012Validator:
    """Of a body that is one of these."""
    components = {"components": description()["components"]}
    schemas = [{"$ref": f"#/components/schemas/{name}"} for name in names]
    return jsonschema_rs.Draft202012Validator({"anyOf": schemas, **components})
