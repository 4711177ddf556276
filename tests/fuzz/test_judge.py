"""The judge of the fuzzers finds what is wrong with an answer, and nothing else."""

from __future__ import annotations

import json

import pytest

from kinema.errors import StorageUnavailable
from kinema.server.errors import InternalError, error_object, response_for
from tests.fuzz.judge import Findings, check
from tests.hostile.raw import Answer

pytestmark = pytest.mark.fuzz

_JSON = {"content-type": "application/json", "x-request-id": "req_1", "date": "now"}
_ERROR = json.dumps({"error": error_object(404, "no video", code="not_found")}).encode()


def test_right_answers_pass() -> None:
    """A described success, a described error, and an unknown path."""
    check("GET", "/live", Answer(200, _JSON, b'{"status": "live"}'))
    check("GET", "/v1/videos/video_0", Answer(404, _JSON, _ERROR))
    check("GET", "/nowhere", Answer(404, _JSON, _ERROR))
    check("POST", "/v1/videos", Answer(503, _JSON, bytes(response_for(StorageUnavailable()).body)))


@pytest.mark.parametrize(
    ("method", "path", "answer", "what"),
    [
        ("GET", "/live", Answer(500, _JSON, bytes(response_for(InternalError()).body)), "500 internal_error"),
        ("G\x01T", "/live", Answer(400, {"content-type": "text/plain"}, b"Invalid"), "400 is not JSON"),
        ("GET", "/v1/videos/a", Answer(404, _JSON, b'{"detail": "Not Found"}'), "not the shape of an error"),
        ("GET", "/v1/videos/a", Answer(404, _JSON, _ERROR.replace(b'"not_found"', b'"other"')), "is not described"),
        ("GET", "/v1/videos/a", Answer(418, _JSON, _ERROR), "is not described"),
        ("GET", "/v1/videos/a", Answer(404, _JSON | {"x-powered-by": "a"}, _ERROR), "headers that are not described"),
        ("GET", "/v1/videos/a", Answer(404, _JSON, _ERROR.replace(b"no video", b"/site-packages/a")), "shows"),
        ("GET", "/v1/videos", Answer(200, _JSON, b'{"object": "list"}'), "the body is no VideoList or VideoRowList"),
        ("GET", "/v1/models", Answer(200, _JSON, b"{"), "EOF"),
        ("GET", "/nowhere", Answer(200, _JSON, b"{}"), "is not described"),
        ("GET", "/live", None, "no answer"),
    ],
)
def test_wrong_answers_are_found(method: str, path: str, answer: Answer | None, what: str) -> None:
    """Each is told with what is wrong, and counted once for all requests of its kind."""
    findings = Findings()
    for _ in range(2):
        findings.judge(method, path, answer, "the request")
    assert what in str(findings)
    assert "2 x " in str(findings)
    assert len(str(findings).splitlines()) < 5
