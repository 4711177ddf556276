"""Requests that schemathesis makes from ``/openapi.json``, valid and invalid ones, for every call that it describes."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode

from kinema.request.fields import TRUTHS
from tests.described import description
from tests.fuzz.conftest import Target, errors_in, make_known
from tests.fuzz.corpus import Known
from tests.fuzz.judge import Findings
from tests.hostile.raw import Answer
from tests.hostile.watched import watched

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]

_PATIENCE_S = 60.0
# Its stream has an end only for a client that does not follow.
_ENDLESS = "/v1/videos/events"


def test_the_server_describes_what_the_answers_are_held_to(target: Target) -> None:
    """The judge's description is the server's own."""
    with target.client() as client:
        assert client.get("/openapi.json").json() == json.loads(json.dumps(description()))


def test_every_described_call_answers_as_it_is_described(target: Target, num_requests: int, fuzz_seed: int) -> None:
    """Half of the requests fit the description and half do not; some name a video that is there."""
    findings = Findings()
    with target.client() as client, requests.Session() as session, watched(target.server, asks=["/live"]) as seen:
        session.trust_env = False  # no proxy of the environment
        calls, known = _calls(), make_known(client)
        for number, (operation, mode) in enumerate(calls):
            share = math.ceil((num_requests - findings.num_asked) / (len(calls) - number))
            for case in cases_of(operation, mode, known, share, f"{fuzz_seed}:{target.headers}"):
                answer = _ask(target, session, case, findings)
                if answer is not None:
                    findings.judge(case.method, case.formatted_path, answer, _shown(case))
            if operation.method == "delete":
                known = make_known(client)
    for what, line in errors_in(target.server.log.read_text()):
        findings.add(f"in the log: {what}", line)
    if findings:
        pytest.fail(str(findings), pytrace=False)
    assert findings.num_asked >= num_requests
    seen.check(grown_mb=500, wait_s=5)


@cache
def _calls() -> list[tuple[APIOperation, GenerationMode]]:
    """Those with few different requests come first, and leave the rest of their share to the others.

    A call with neither a query nor a body fits its description whatever is sent.
    """
    schema = schemathesis.openapi.from_dict(description())
    operations = sorted((found.ok() for found in schema.get_all_operations()), key=lambda call: len(call.body))
    modes = {True: list(GenerationMode), False: [GenerationMode.POSITIVE]}
    return [(call, mode) for call in operations for mode in modes[bool(len(call.query) or len(call.body))]]


def cases_of(operation: APIOperation, mode: GenerationMode, known: Known, count: int, fuzz_seed: str) -> list[Case]:
    """Up to as many requests for one call; the same for the same seed."""
    found: list[Case] = []

    @seed(fuzz_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def collect(case: Case, is_known: bool) -> None:
        ids = {"video_id": known.video_id, "endpoint_id": known.endpoint_id, "model_id": "fake"}
        if operation.path == _ENDLESS and TRUTHS.get(str(case.query.get("follow", True)).lower(), False):
            case.query |= {"follow": "false"}
        if is_known and case.path_parameters:
            case.path_parameters |= {name: ids[name] for name in case.path_parameters if name in ids}
        found.append(case)

    collect()
    return found[:count]


def _ask(target: Target, session: requests.Session, case: Case, findings: Findings) -> Answer | None:
    try:
        answer = case.call(
            base_url=target.server.url,
            session=session,
            headers=dict(target.headers),
            timeout=_PATIENCE_S,
            allow_redirects=False,
        )
    except (OSError, requests.RequestException) as exc:
        findings.add(f"{case.method} {case.path}: {type(exc).__name__}", _shown(case))
        return None
    headers = {name.lower(): ", ".join(values) for name, values in answer.headers.items()}
    return Answer(answer.status_code, headers, answer.content)


def _shown(case: Case) -> str:
    return repr(case)[:1500]
