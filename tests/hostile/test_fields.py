"""Bodies of many or long values, and headers and URLs that no honest client writes: refused in a sentence, at once."""

from __future__ import annotations

import json

import pytest

from tests.hostile.raw import Answer, ask, head
from tests.hostile.watched import watched
from tests.server_process import Server

pytestmark = pytest.mark.hostile

_MANY = 99_000
_LONG = 8 * 2**20


def _fields(*fields: str) -> str:
    """A JSON object of fields as they stand."""
    return "{" + ",".join(fields) + "}"


_UNKNOWN = [f'"f{number}": 0' for number in range(_MANY)]
_PROMPT = '"prompt": "a"'
# A field of one kind, as many or as long as a body may have it.
_BODIES = {
    "unknown-fields": _fields(*_UNKNOWN),
    "unknown-fields-in-nvext": _fields(_PROMPT, f'"nvext": {_fields(*_UNKNOWN)}'),
    "unknown-fields-in-a-text": json.dumps({"prompt": "a", "extra_body": _fields(*_UNKNOWN)}),
    "the-same-field-again": _fields(*[_PROMPT] * _MANY),
    "entries-of-a-list": json.dumps({"prompt": "a", "nvext": {"annotations": list(range(_MANY))}}),
    "objects-in-a-list": json.dumps({"prompt": [{}] * (_MANY // 2)}),
    "lists-in-lists": _fields('"prompt": ' + "[" * _MANY + "]" * _MANY),
    "a-long-name": json.dumps({"a" * _LONG: 0}),
    "a-long-number": _fields(_PROMPT, '"seed": ' + "1" * _LONG),
    "a-long-fraction": _fields(_PROMPT, '"seconds": 0.' + "1" * _LONG),
    "a-long-number-as-text": json.dumps({"prompt": "a", "seed": "1" * _LONG + "x"}),
    "spaces-for-a-number": json.dumps({"prompt": "a", "seed": " " * _LONG}),
    "spaces-for-a-size": json.dumps({"prompt": "a", "size": " " * _LONG}),
}


def _post(server: Server, path: str, body: bytes, *headers: str) -> Answer:
    told = ("content-type: application/json", f"content-length: {len(body)}", *headers)
    answer = ask(server, head("POST", path, *told) + body)
    assert answer is not None
    return answer


@pytest.mark.parametrize("kind", _BODIES)
def test_many_or_long_values_hold_nobody_up(fake_server: Server, kind: str) -> None:
    """They are counted before they are looked at, and the answer names a few of them."""
    body = _BODIES[kind].encode()
    with watched(fake_server) as seen:
        answers = [_post(fake_server, "/v1/videos/generations", body) for _ in range(3)]
    for answer in answers:
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
        assert len(answer.error["message"]) < 1000
    seen.check(grown_mb=200, wait_s=0.5)


@pytest.mark.parametrize(
    "url",
    [
        "http://xn--/",
        "http://xn--a/",
        "http://" + "xn--a." * 300,
        "http://localhost:\u0663/",
        "http://localhost:+80/",
        "http://localhost:8_0/",
        "http://[fe80::1%25lo]/",
        "http://a:b@localhost/",
        "http://local%68ost/",
        "http://192.88.99.1/",
        "http://[2001:0:7f00:1::1]/",
    ],
)
def test_an_address_of_a_webhook_is_refused_before_anything_is_sent(fake_server: Server, url: str) -> None:
    """Whatever is wrong with it: its host, its port, or where it leads."""
    fields = {"name": "hook", "url": url, "event_types": ["video.completed"]}
    answer = _post(fake_server, "/v1/webhook_endpoints", json.dumps(fields).encode())
    assert (answer.status, answer.error["param"]) == (400, "url")


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("x-stainless-retry-count: \u00b2", 200),
        ("x-stainless-retry-count: " + "9" * 5000, 200),
        ("last-event-id: \u00b2", 200),
        ("idempotency-key: " + "k" * 255, 200),
        ("idempotency-key: " + "k" * 256, 400),
        ("range: bytes=\u00b2-\u00b3", 200),
        ("origin: http://[", 403),
        ("authorization: \u00b2", 200),
        ("api-key: \u00ff", 200),
    ],
)
def test_a_strange_header_is_no_mistake_of_the_server(fake_server: Server, header: str, status: int) -> None:
    """It says nothing, or it is refused."""
    body = json.dumps({"prompt": "a", "size": "64x64", "num_frames": 1, "num_inference_steps": 1}).encode()
    assert _post(fake_server, "/v1/videos", body, header).status == status
