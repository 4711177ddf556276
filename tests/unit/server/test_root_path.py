"""A proxy has the service under a path, which it takes off, or does not."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from pydantic import ValidationError

from kinema.settings import ServerSettings
from tests.serving import SMALL, serving


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """Of a service under /media/kinema. Its calls are not held to the description, which has no path before them."""
    async with serving(server=ServerSettings(root_path="/media/kinema/")) as it:
        transport = httpx.ASGITransport(app=it.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


@pytest.mark.parametrize("prefix", ["", "/media/kinema"])
async def test_calls_are_answered_with_the_path_and_without_it(client: httpx.AsyncClient, prefix: str) -> None:
    """Links have it in any case, and open."""
    answer = await client.post(f"{prefix}/v1/videos/generations", json=SMALL)
    body = answer.raise_for_status().json()
    url = body["data"][0]["url"]
    assert url == f"http://test/media/kinema/v1/videos/{body['id']}/content"
    assert (await client.get(url)).content == (await client.get(f"/v1/videos/{body['id']}/content")).content
    assert (await client.get(f"{prefix}/videos/{body['id']}")).json()["id"] == body["id"]  # a /v1 is forgotten
    assert (await client.get(f"{prefix}/live")).status_code == 200
    assert (await client.get(f"{prefix}/docs")).status_code == 200
    assert (await client.get(f"{prefix}/openapi.json")).json()["servers"] == [{"url": "/media/kinema"}]


@pytest.mark.parametrize("path", ["/media/kinemas/live", "/media/live", "/kinema/live", "/media/kinema", "/"])
async def test_other_paths_are_not_taken_for_it(client: httpx.AsyncClient, path: str) -> None:
    """Also one that begins alike, and the path alone."""
    assert (await client.get(path)).status_code == 404


async def test_a_request_and_its_repetition_may_come_on_either_way(client: httpx.AsyncClient) -> None:
    """An idempotency key belongs to the call, whatever the proxy does."""
    headers = {"idempotency-key": "once"}
    first = await client.post("/media/kinema/v1/videos", json=SMALL, headers=headers)
    again = await client.post("/v1/videos", json=SMALL, headers=headers)
    assert first.json()["id"] == again.json()["id"]


@pytest.mark.parametrize("path", ["kinema", "//kinema", "/kin ema", "/kinema?a", "/../kinema", "/a//b", "http://a/b"])
def test_what_is_no_path_is_refused(path: str) -> None:
    """In a sentence that says what is accepted."""
    with pytest.raises(ValidationError, match="a path such as /kinema is accepted"):
        ServerSettings(root_path=path)
