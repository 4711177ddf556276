"""What goes wrong after a job was accepted: its client is told which one, and not to ask for it again."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from kinema.errors import StorageUnavailable, StoreUnavailable
from kinema.job import JobStatus
from tests.serving import SMALL, Serving, serving
from tests.unit.server.test_generations import URL, sse


async def test_a_video_that_cannot_be_read_is_not_made_again(it: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is done: its id is in the answer, and an SDK does not repeat the request."""

    def away(*_: object) -> None:
        raise StorageUnavailable

    monkeypatch.setattr(it.storage, "read", away)
    answer = await it.client.post(URL, json=SMALL | {"response_format": "b64_json"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
    error = answer.json()["error"]
    assert error["code"] == "storage_unavailable"
    assert (await it.service.get(error["id"])).status is JobStatus.COMPLETED


@pytest.mark.parametrize("failure", [StorageUnavailable(), RuntimeError("the password is hunter2")])
async def test_a_stream_ends_with_an_event_when_the_video_cannot_be_read(
    it: Serving, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """It has all but the data, and says why."""

    def away(*_: object) -> None:
        raise failure

    monkeypatch.setattr(it.storage, "read", away)
    answer = await it.client.post(URL, json=SMALL | {"response_format": "b64_json", "stream": True})
    _, name, last = sse(answer.text)[-1]
    assert (name, last["status"], last["data"]) == ("completed", "completed", [])
    assert last["error"]["code"] in ("storage_unavailable", "internal_error")
    assert "hunter2" not in answer.text


@pytest.mark.parametrize(("failure", "status"), [(StoreUnavailable(), 503), (RuntimeError("a mistake"), 500)])
@pytest.mark.parametrize("is_streaming", [False, True])
async def test_a_job_that_nobody_can_wait_for_is_cancelled(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, status: int, is_streaming: bool
) -> None:
    """The database was away for a moment while the client waited: it is not asked to send its request again."""

    async def broken(*_: object, **_named: object) -> AsyncGenerator[None, None]:
        raise failure
        yield

    async with serving(is_dispatching=False) as it:
        monkeypatch.setattr(it.store, "watch", broken)
        monkeypatch.setattr(it.store, "wait_for_end", lambda job_id: anext(broken(job_id)))
        answer = await it.client.post(URL, json=SMALL | {"stream": is_streaming})
        assert await it.service.count_waiting() == 0
        if not is_streaming:
            assert (answer.status_code, answer.headers["x-should-retry"]) == (status, "false")
            assert (await it.service.get(answer.json()["error"]["id"])).status is JobStatus.CANCELLED
