"""A client's transport that holds every answer to the API's own description, so that every test that asks proves it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import parse_qsl

import httpx
from fastapi import FastAPI
from pydantic_core import from_json

from kinema.server.app import create_app
from kinema.settings import ServerSettings

Json = dict[str, Any]

# Served and not described: the description, its page, and a part of OpenAI's API that is always refused.
NOT_DESCRIBED = re.compile(r"/openapi\.json|/docs(/.*)?|/v1/videos/characters(/[^/]+)?")
# For a client that is gone: nobody reads it.
_CLIENT_CLOSED_REQUEST = 499
# OpenAPI has its own words for the one, and none for the other.
_HEADERS_OF_HTTP = {"content-type", "content-length"}


class DescribedTransport(httpx.AsyncBaseTransport):
    """Asks the application, and fails when the answer is not in its description."""

    def __init__(self, app: FastAPI) -> None:
        self._inner = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        await response.aread()
        check(request, response)
        return response


def check(request: httpx.Request, response: httpx.Response) -> None:
    """Fail unless the description has this answer: its status, type, headers and code, and what was asked with."""
    operation = check_answer(request.method, request.url.path, response.status_code, response.headers, response.content)
    if response.is_success and operation is not None:
        known = {parameter.get("name") for parameter in operation["parameters"] if parameter.get("in") == "query"}
        sent = {name for name, _ in parse_qsl(request.url.query.decode(), keep_blank_values=True)}
        assert sent <= known, f"{request.url}: parameters that are not described: {sent - known}"


def check_answer(method: str, path: str, status: int, headers: Mapping[str, str], content: bytes) -> Json | None:
    """Fail unless the description has this answer; the described operation, or None where there is none.

    Names of headers are in lower case.
    """
    path = re.sub("^/videos", "/v1/videos", path)
    operations = operations_of(path)
    if status == _CLIENT_CLOSED_REQUEST or NOT_DESCRIBED.fullmatch(path):
        return None
    if method not in operations:
        assert status == (405 if operations else 404), f"{method} {path} is not described"
        return None
    operation, asked = operations[method], f"{method} {path}: {status}"
    assert str(status) in operation["responses"], f"{asked} is not described"
    described = operation["responses"][str(status)]
    undescribed = headers.keys() - described["headers"].keys() - _HEADERS_OF_HTTP
    assert not undescribed, f"{asked}: headers that are not described: {undescribed}"
    if content and method != "HEAD":
        media_type = headers["content-type"].partition(";")[0]
        assert media_type in described["content"], f"{asked}: {media_type} is not described"
    if status >= HTTPStatus.BAD_REQUEST and method != "HEAD":
        examples = described["content"]["application/json"]["examples"]
        code = from_json(content)["error"]["code"]
        assert code in examples, f"{asked}: {content.decode(errors='replace')} is not described"
    return operation


@cache
def description() -> Json:
    """What ``/openapi.json`` says; it is the same for every application."""
    return create_app(cast("Any", None), ServerSettings(), cast("Any", None), b"").openapi()


def operations_of(path: str) -> Json:
    """The described operations of a path, by method; an exact path goes before one with parameters."""
    found = {}
    for template, pattern in reversed(_patterns()):
        if pattern.fullmatch(path):
            found = {method.upper(): operation for method, operation in description()["paths"][template].items()}
    return found


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    templates = sorted(description()["paths"], key=lambda path: path.count("{"))
    return [(template, re.compile(_pattern(template), re.DOTALL)) for template in templates]


def _pattern(template: str) -> str:
    """A model's name may have slashes, another parameter may not."""
    return template.replace("{model_id}", ".*").replace("{video_id}", "[^/]+").replace("{endpoint_id}", "[^/]+")
