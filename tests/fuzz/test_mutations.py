"""Valid requests with some mutations each: every answer is as it is described, and none is a fault."""

from __future__ import annotations

import http.client
import socket
from random import Random

import pytest

from tests.fuzz.conftest import Target, errors_in, make_known
from tests.fuzz.corpus import refused_for, removals_for, requests_for
from tests.fuzz.judge import Findings, check
from tests.fuzz.mutations import Swap, mutated, swapped, swaps
from tests.fuzz.requests import Request
from tests.hostile.raw import Answer, connected, read_answer, send
from tests.hostile.watched import watched

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]

# A client leaves a stream of events after such a silence.
_QUIET_S = 1.0
# After as many, new ids: a mutated request may have deleted the video, or changed the endpoint.
_ROUND = 100
_REMOVED = 0.01


def ask(target: Target, request: Request) -> Answer | None:
    """The answer to it over a connection of its own; None when there is none."""
    with connected(target.server) as connection:
        send(connection, request.encoded)
        if not request.is_framed:  # the server may wait for a body that does not come
            connection.shutdown(socket.SHUT_WR)
        return read_answer(connection, request.method, _QUIET_S)


def test_every_request_of_the_corpus_is_accepted_as_it_is(target: Target) -> None:
    """Mutations begin with what the server takes; else they would only show that it refuses."""
    with target.client() as client:
        known = make_known(client)
    for request in [*requests_for(known), *removals_for(known)]:
        answer = ask(target, _with_key(target, request))
        assert answer is not None, str(request)
        assert answer.status in {200, 206}, f"{request}\n{answer}"
        check(request.method, request.path, answer)


def test_a_webhook_leads_to_this_machine_alone(target: Target) -> None:
    """The stand-in for the name service is in place: a name that nobody has is known, and nobody answers there."""
    with target.client() as client:
        known = make_known(client)
    (request,) = refused_for(known)
    answer = ask(target, _with_key(target, request))
    assert answer is not None
    assert (answer.status, answer.error["code"]) == (400, "webhook_failed")


def test_no_mutation_is_answered_with_a_fault(target: Target, num_requests: int, fuzz_seed: int) -> None:
    """A fixed seed gives the same requests in every run; other clients are answered meanwhile."""
    findings = Findings()
    random = Random(f"{fuzz_seed}:{target.headers}")
    with target.client() as client, watched(target.server, asks=["/live"]) as seen:
        left: list[Swap] = []
        for number in range(num_requests):
            if number % _ROUND == 0:
                known = make_known(client)
                calls = [*requests_for(known), *refused_for(known)]
                left = left or list(swaps(random, calls))
            if left and number % 2:
                request = swapped(calls, left.pop())
            else:
                request = mutated(random, random.choice(removals_for(known) if random.random() < _REMOVED else calls))
            request = _with_key(target, request)
            try:
                answer = ask(target, request)
            except (OSError, http.client.HTTPException) as exc:
                findings.add(f"{request.method} {type(exc).__name__}", request)
                continue
            findings.judge(request.method, request.path, answer, request, is_framed=request.is_framed)
    for what, line in errors_in(target.server.log.read_text()):
        findings.add(f"in the log: {what}", line)
    if findings:
        pytest.fail(str(findings), pytrace=False)
    seen.check(grown_mb=500, wait_s=5)


def _with_key(target: Target, request: Request) -> Request:
    """The request with the key, unless a mutation has put something else in its place."""
    if any(name == "authorization" for name, _ in request.headers):
        return request
    for name, value in target.headers.items():
        request = request.with_header(name, value)
    return request
