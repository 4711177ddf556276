"""Webhook endpoints over HTTP, as the OpenAI SDK calls them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from kinema.settings import ServerSettings, WebhookSettings
from tests.receiver import is_signed, receiving, status
from tests.serving import SMALL, Serving, serving, until
from tests.unit.server.test_bad_input import error_of

URL = "http://127.0.0.1:9/hook"
BODY = {"name": "mine", "url": URL, "event_types": ["video.completed", "video.failed"]}
ENDPOINTS = "/v1/webhook_endpoints"


@pytest.fixture
async def it() -> AsyncIterator[Serving]:
    """With keys, and receivers on this machine allowed."""
    async with serving(
        server=ServerSettings(api_keys=SecretStr("ann,bob")), webhooks=WebhookSettings(allow_private=True)
    ) as running:
        running.client.headers["authorization"] = "Bearer ann"
        yield running


async def create(it: Serving, **changes: object) -> dict[str, Any]:
    answer = await it.client.post(ENDPOINTS, json=BODY | changes)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def test_a_new_endpoint_tells_its_secret_once(it: Serving) -> None:
    """In the answer to its creation; afterwards there is a hint."""
    made = await create(it)
    secret = made.pop("signing_secret")
    assert secret.startswith("whsec_")
    assert made["signing_secret_hint"] == f"whsec_...{secret[-4:]}"
    assert made | {"id": "", "created_at": 0, "updated_at": 0, "signing_secret_hint": ""} == {
        "id": "",
        "object": "webhook_endpoint",
        "created_at": 0,
        "updated_at": 0,
        "signing_secret_hint": "",
        **BODY,
    }
    assert isinstance(made["created_at"], int)
    assert (await it.client.get(f"{ENDPOINTS}/{made['id']}")).json() == made
    assert (await it.client.get(ENDPOINTS)).json()["data"] == [made]


async def test_a_finished_video_is_told_of(it: Serving) -> None:
    """To the endpoint of the key that made it, with a signature of the secret that it was given."""
    async with receiving() as receiver:
        made = await create(it, url=receiver.url)
        await create(it, url=receiver.url, event_types=["video.failed"])
        await it.client.post(ENDPOINTS, json=BODY | {"url": receiver.url}, headers={"authorization": "Bearer bob"})
        video = (await it.client.post("/v1/videos/generations", json=SMALL)).json()
        await until(lambda: receiver.received)
        (received,) = receiver.received
        assert is_signed(received, made["signing_secret"])
        assert received.event["type"] == "video.completed"
        assert received.event["data"] == {"id": video["id"]}


async def test_another_key_does_not_see_it(it: Serving) -> None:
    """Every call says 404, and the list is empty; without a key it is 401."""
    made = await create(it)
    path = f"{ENDPOINTS}/{made['id']}"
    calls = [
        ("GET", path),
        ("POST", path),
        ("DELETE", path),
        ("POST", f"{path}/rotate_secret"),
        ("POST", f"{path}/test"),
    ]
    for method, url in calls:
        answer = await it.client.request(method, url, headers={"authorization": "Bearer bob"})
        assert error_of(answer, 404)["code"] == "not_found"
    listed = await it.client.get(ENDPOINTS, headers={"authorization": "Bearer bob"})
    assert listed.json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    for method, url in [*calls, ("GET", ENDPOINTS), ("POST", ENDPOINTS), ("GET", "/v1/webhook_event_types")]:
        error_of(await it.client.request(method, url, headers={"authorization": ""}), 401)
    assert (await it.client.get(path)).status_code == 200


async def test_pages_go_on_after_the_last_id(it: Serving) -> None:
    """The newest first."""
    made = [(await create(it, name=str(number)))["id"] for number in range(3)]
    seen: list[str] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        page = (await it.client.get(ENDPOINTS, params={"limit": 2, "after": seen[-1] if seen else ""})).json()
        ids = [endpoint["id"] for endpoint in page["data"]]
        assert (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
        seen += ids
    assert sorted(seen) == sorted(made)
    assert seen == sorted(seen, reverse=True)


async def test_what_is_sent_is_changed(it: Serving) -> None:
    """And the rest stays; the secret is not told again."""
    made = await create(it)
    path = f"{ENDPOINTS}/{made['id']}"
    changed = (await it.client.post(path, json={"name": "new", "event_types": ["video.failed"]})).json()
    assert (changed["name"], changed["event_types"], changed["url"]) == ("new", ["video.failed"], URL)
    assert "signing_secret" not in changed
    assert (await it.client.post(path)).json() == changed
    assert (await it.client.get(path)).json() == changed


async def test_a_deleted_endpoint_is_gone(it: Serving) -> None:
    """Deleting it again is a 404."""
    made = await create(it)
    path = f"{ENDPOINTS}/{made['id']}"
    deleted = (await it.client.delete(path)).json()
    assert deleted == {"id": made["id"], "object": "webhook_endpoint.deleted", "deleted": True}
    error_of(await it.client.get(path), 404)
    error_of(await it.client.delete(path), 404)


async def test_a_rotation_gives_a_new_secret(it: Serving) -> None:
    """With or without a body; the old one signs for a day more when that was asked for."""
    async with receiving() as receiver:
        made = await create(it, url=receiver.url)
        path = f"{ENDPOINTS}/{made['id']}"
        plain = (await it.client.post(f"{path}/rotate_secret")).json()
        kept = (
            await it.client.post(f"{path}/rotate_secret", json={"keep_old_secret_active_for_24_hours": True})
        ).json()
        secrets = [answer["signing_secret"] for answer in (made, plain, kept)]
        assert len(set(secrets)) == 3
        await it.client.post(f"{path}/test", json={"event_type": "video.failed"})
        assert [is_signed(receiver.received[0], secret) for secret in secrets] == [False, True, True]


async def test_a_test_event_is_sent_at_once(it: Serving) -> None:
    """The answer has the status that the endpoint gave, whichever it was."""
    async with receiving() as receiver:
        made = await create(it, url=receiver.url)
        receiver.answer = status(302, "location: /elsewhere")
        answer = await it.client.post(f"{ENDPOINTS}/{made['id']}/test", json={"event_type": "video.failed"})
        assert answer.json() == {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": made["id"],
            "event_type": "video.failed",
            "status_code": 302,
            "success": True,
        }
        (received,) = receiver.received
        assert received.event["type"] == "video.failed"


async def test_an_endpoint_that_does_not_answer_its_test_is_a_400(it: Serving) -> None:
    """Not a 5xx, which SDKs would repeat."""
    made = await create(it)
    answer = await it.client.post(f"{ENDPOINTS}/{made['id']}/test", json={"event_type": "video.failed"})
    assert error_of(answer, 400)["code"] == "webhook_failed"


async def test_event_types_are_listed(it: Serving) -> None:
    """As plain words."""
    answer = await it.client.get("/v1/webhook_event_types")
    assert answer.json() == {"object": "list", "data": ["video.completed", "video.failed"]}


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"name": None}, "name", "missing"),
        ({"url": None}, "url", "missing"),
        ({"event_types": None}, "event_types", "missing"),
        ({"name": " "}, "name", "1 to 255"),
        ({"name": "x" * 256}, "name", "1 to 255"),
        ({"name": "a\0"}, "name", "NUL"),
        ({"name": 5}, "name", "must be text"),
        ({"url": ""}, "url", "http:// or https://"),
        ({"url": "ftp://example.com"}, "url", "http:// or https://"),
        ({"url": "http://a:b@example.com"}, "url", "user name"),
        ({"url": "http://nowhere.invalid/"}, "url", "lead to an address"),
        ({"url": ["x"]}, "url", "must be text"),
        ({"event_types": []}, "event_types", "accepted: video.completed, video.failed"),
        ({"event_types": ["batch.completed"]}, "event_types", "accepted: video.completed, video.failed"),
        ({"event_types": "video.completed"}, "event_types", "valid list"),
        ({"event_types": [5]}, "event_types.0", "valid string"),
        ({"event_types": ["x" * 60_000]}, "event_types", "accepted"),
        ({"secret": "whsec_"}, "secret", "unknown field"),
    ],
)
async def test_a_bad_field_is_named(it: Serving, changes: dict[str, object], param: str, says: str) -> None:
    """With what would be accepted; on creation, and on a change unless it is merely missing."""
    error = error_of(await it.client.post(ENDPOINTS, json=BODY | changes), 400)
    assert error["param"] == param
    assert says in error["message"]
    if says != "missing":
        made = await create(it)
        error = error_of(await it.client.post(f"{ENDPOINTS}/{made['id']}", json=changes), 400)
        assert says in error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"{", "application/json", 400),
        (b"x", "text/plain", 415),
        (b"{" + b" " * 70_000 + b"}", "application/json", 413),
    ],
)
async def test_a_bad_body_is_refused(it: Serving, content: bytes, kind: str, code: int) -> None:
    """In the one shape of errors."""
    error_of(await it.client.post(ENDPOINTS, content=content, headers={"content-type": kind}), code)


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "limit=101", "limit=1.5", "after=x", "after=we_1"])
async def test_a_bad_page_is_refused(it: Serving, query: str) -> None:
    """The parameter is named."""
    error = error_of(await it.client.get(f"{ENDPOINTS}?{query}"), 400)
    assert error["param"] == query.partition("=")[0]


async def test_a_test_of_an_unknown_event_is_refused(it: Serving) -> None:
    """Before anything is sent."""
    made = await create(it)
    answer = await it.client.post(f"{ENDPOINTS}/{made['id']}/test", json={"event_type": "batch.failed"})
    assert error_of(answer, 400)["param"] == "event_type"


async def test_private_addresses_are_refused_by_default() -> None:
    """At registration and on a change, in one sentence whether or not the inner network knows the name."""
    async with serving() as it:
        said = set()
        for host in ("127.0.0.1", "localhost", "169.254.169.254", "[::1]", "10.0.0.1", "nowhere.invalid"):
            answer = await it.client.post(ENDPOINTS, json=BODY | {"url": f"http://{host}/"})
            said.add(error_of(answer, 400)["message"])
        assert len(said) == 1
        made = (await it.client.post(ENDPOINTS, json=BODY | {"url": "http://1.1.1.1/"})).json()
        error_of(await it.client.post(f"{ENDPOINTS}/{made['id']}", json={"url": URL}), 400)


async def test_a_page_of_another_site_may_not_register_one(it: Serving) -> None:
    """The visitor's browser would do it for that page."""
    answer: httpx.Response = await it.client.post(ENDPOINTS, json=BODY, headers={"origin": "http://evil.example"})
    error_of(answer, 403)
