"""``/openapi.json`` says what the routes do.

The tests of all routes ask through a transport that compares each answer with it (``tests/described.py``).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

import kinema.server
from kinema.request.bodies import Body
from kinema.server import app, routes, videos, webhook_routes
from kinema.server.schemas import ErrorBody, Video
from tests.described import NOT_DESCRIBED, check, description, operations_of
from tests.serving import Serving
from tests.unit.server.test_bad_input import error_of

SOURCES = sorted(Path(kinema.server.__file__).parent.glob("*.py"))
PATHS = sorted(description()["paths"])
# HTTP's own, or set by browsers alone.
HEADERS_OF_HTTP = {"content-type", "content-length", "transfer-encoding", "host", "origin"}


@pytest.fixture
def it(shared: Serving) -> Serving:
    """One service for all tests here: they change nothing."""
    return shared


def example_of(template: str) -> str:
    return re.sub("{.*?}", "x", template)


def test_every_route_is_described() -> None:
    """With every method that it takes."""
    routers = (routes.router, routes.probes, videos.router, videos.content_router, webhook_routes.router)
    found = [route for router in routers for route in router.routes]
    assert len(found) > 25
    for route in found:
        assert isinstance(route, APIRoute)
        path = example_of(route.path_format)
        assert NOT_DESCRIBED.fullmatch(path) or route.methods <= operations_of(path).keys(), route.path


def test_every_reference_resolves() -> None:
    """Schemas, headers and parameters, and each of them is used."""
    components = description()["components"]
    known = {f"{kind}/{name}" for kind in ("schemas", "headers", "parameters") for name in components[kind]}
    used = set(re.findall('"#/components/([^"]*)"', json.dumps(description())))
    assert used == known


def test_no_handler_reads_a_query_parameter_past_its_signature() -> None:
    """A parameter of the signature is in the description by itself."""
    assert not [path.name for path in SOURCES if "query_params" in path.read_text(encoding="utf-8")]


def read_headers(tree: ast.AST) -> Iterator[str]:
    """The names in ``headers.get("...")`` and its like, ``headers["..."]`` and ``"..." in headers``."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Attribute(holder, "get" | "getlist"), [ast.Constant(str(name)), *_]):
                pass
            case ast.Subscript(value=holder, slice=ast.Constant(value=str(name)), ctx=ast.Load()):
                pass
            case ast.Compare(left=ast.Constant(value=str(name)), comparators=[holder]):
                pass
            case _:
                continue
        if ast.unparse(holder).endswith("headers"):
            yield name.lower()


def test_every_header_that_is_read_is_described() -> None:
    """As a parameter of some route, or as the place of a key."""
    components = description()["components"]
    described = {name.lower() for name in components["parameters"]} | {"authorization", "api-key"}
    read = {name for path in SOURCES for name in read_headers(ast.parse(path.read_text(encoding="utf-8")))}
    assert read - HEADERS_OF_HTTP == described
    assert components["securitySchemes"].keys() == {"bearer", "api-key"}


def test_a_video_is_described_with_all_of_its_fields() -> None:
    """Also in a list, and in the order in which they are answered."""
    schemas = description()["components"]["schemas"]
    assert list(schemas["Video"]["properties"]) == list(Video.model_fields)
    assert schemas["VideoList"]["properties"]["data"]["items"] == {"$ref": "#/components/schemas/Video"}
    assert schemas["Datum"]["properties"].keys() == {"url", "b64_json", "output_format", "fps"}


@pytest.mark.parametrize("form", app._FORMS)
def test_a_body_is_described_with_all_of_its_fields(form: type[Body]) -> None:
    """In both encodings. In a form a file is a part."""
    schemas = description()["components"]["schemas"]
    as_json, as_form = schemas[form.__name__], schemas[form.__name__.removesuffix("Body") + "Form"]
    fields = {*form.model_fields, *form.envelopes}
    assert as_json["properties"].keys() == fields
    assert as_form["properties"].keys() == fields | ({"video[id]"} if "video" in fields else set())
    assert as_json.get("required", []) == [*form.required]
    form.parse(form.example)
    for name in fields & {"input_reference", "last_frame", "video"}:
        assert as_form["properties"][name]["format"] == "binary"


def test_every_post_has_a_body_in_both_encodings_or_none() -> None:
    """The handlers read it themselves. A call whose path says all has none."""
    for path, operations in description()["paths"].items():
        if "post" in operations and not path.endswith(("/cancel", "/star")):
            assert operations["post"]["requestBody"]["content"].keys() == {"application/json", "multipart/form-data"}


def test_every_example_of_an_error_is_one() -> None:
    """Of the one shape, with the status's own type."""
    for operations in description()["paths"].values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                for code, example in answer.get("content", {}).get("application/json", {}).get("examples", {}).items():
                    error = ErrorBody.model_validate(example["value"]).error
                    assert (error.code, error.type == "server_error") == (code, int(status) >= 500)


def test_probes_and_links_need_no_key() -> None:
    """All other calls take either scheme, or none where the server has no keys."""
    assert description()["security"] == [{"bearer": []}, {"api-key": []}, {}]
    for path, operations in description()["paths"].items():
        for operation in operations.values():
            assert (operation.get("security") == []) == (not path.startswith("/v1/"))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
async def test_a_wrong_method_is_405_with_all_methods_that_the_path_takes(it: Serving, path: str) -> None:
    """Whichever route takes them."""
    methods = operations_of(path := example_of(path)).keys()
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - methods:
        answer = await it.client.request(method, path)
        error_of(answer, 405)
        assert set(answer.headers["allow"].split(", ")) == methods


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
async def test_a_slash_at_the_end_is_404(it: Serving, path: str) -> None:
    """An error in the one shape and no redirect, which clients follow without the body or not at all."""
    for method in operations_of(path := example_of(path)).keys() - {"HEAD"}:
        error_of(await it.client.request(method, path + "/"), 404)


@pytest.mark.parametrize(
    ("method", "path", "answer", "says"),
    [
        ("GET", "/v1/videos", httpx.Response(201, json={}), "201 is not described"),
        ("GET", "/v1/videos", httpx.Response(200, text="a"), "text/plain is not described"),
        ("GET", "/v1/videos", httpx.Response(200, json={}, headers={"x-new": "1"}), "x-new"),
        ("GET", "/v1/videos?page=2", httpx.Response(200, json={}), "page"),
        ("GET", "/v1/videos", httpx.Response(500, json={"error": {"code": "odd"}}), "odd"),
        ("PATCH", "/v1/videos", httpx.Response(200, json={}), "PATCH /v1/videos is not described"),
        ("GET", "/v1/other", httpx.Response(200, json={}), "/v1/other is not described"),
    ],
)
def test_an_answer_that_is_not_described_fails_its_test(
    method: str, path: str, answer: httpx.Response, says: str
) -> None:
    """So a new status, type, header, code or parameter is described when it is made."""
    with pytest.raises(AssertionError, match=says):
        check(httpx.Request(method, "http://test" + path), answer)
