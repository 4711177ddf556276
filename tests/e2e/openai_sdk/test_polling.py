"""``create_and_poll`` and ``poll``: how the SDK waits for a video, and what it gives in the end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import AsyncOpenAI, OpenAI

from tests.e2e.openai_sdk.conftest import Connect
from tests.e2e.openai_sdk.sdk import QUICK, SMALL, cancel, count_frames, create, download, recording, wait_for
from tests.server_process import Server


def test_create_and_poll_gives_the_finished_video(tiny: OpenAI) -> None:
    """By the real model, at the interval that the server asks for."""
    video = tiny.videos.create_and_poll(**SMALL, extra_body=QUICK)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert count_frames(download(tiny, video)) == 5


def test_a_failed_video_is_an_answer_and_no_exception(connected: Connect) -> None:
    """HTTP 200, asked once, and the reason is in the video."""
    sent: list[Any] = []
    with recording(sent) as http:
        client = connected(http_client=http)
        video = client.videos.create_and_poll(**SMALL | {"prompt": "a cat [fail]"}, extra_body=QUICK)
    assert video.status == "failed"
    assert video.error is not None
    assert (video.error.code, "asks for a failure" in video.error.message) == ("engine_failed", True)
    assert all(request.headers["x-stainless-retry-count"] == "0" for request in sent)


def test_a_cancelled_video_reads_as_failed(client: OpenAI) -> None:
    """With a code of its own, so that the loop of the SDK ends; it is cancelled while it polls."""
    video = create(client, prompt="[slow] waves", num_inference_steps=200)
    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(client.videos.poll, video.id, poll_interval_ms=20)
        wait_for(client, video, lambda found: found.status == "in_progress")
        cancel(client, video)
        ended = polling.result(timeout=30)
    assert ended.status == "failed"
    assert ended.error is not None
    assert (ended.error.code, bool(ended.error.message)) == ("cancelled", True)
    assert cancel(client, video).status == "failed"


def test_the_interval_is_a_whole_number_of_milliseconds(client: OpenAI) -> None:
    """On the first answer and on all others: the SDK reads it as an int, and 0 would make it a busy loop."""
    video = create(client, prompt="[slow] waves", num_inference_steps=3)
    intervals = []
    while video.status in {"queued", "in_progress"}:
        raw = client.videos.with_raw_response.retrieve(video.id)
        intervals.append(raw.headers["openai-poll-after-ms"])
        video = raw.parse()
    assert all(text.isdigit() and 100 <= int(text) <= 10_000 for text in intervals)


def test_the_polls_of_the_sdk_are_answered(connected: Connect) -> None:
    """The first one comes at once and finds the video; the headers that mark them change nothing."""
    sent: list[Any] = []
    with recording(sent) as http:
        client = connected(http_client=http)
        client.videos.create_and_poll(**SMALL, extra_body=QUICK, poll_interval_ms=15)
    assert [request.method for request in sent[:2]] == ["POST", "GET"]
    assert sent[1].headers["x-stainless-poll-helper"] == "true"
    assert sent[1].headers["x-stainless-custom-poll-interval"] == "15"


async def test_the_asynchronous_client_does_all_of_it(fake_server: Server, api_key: str) -> None:
    """Create, poll, list, download, remix, delete."""
    async with AsyncOpenAI(base_url=f"{fake_server.url}/v1", api_key=api_key) as client:
        video = await client.videos.create_and_poll(**SMALL, extra_body=QUICK, poll_interval_ms=20)
        assert video.status == "completed"
        assert [found.id async for found in client.videos.list(limit=1)] == [video.id]
        content = await client.videos.download_content(video.id)
        assert count_frames(await content.aread()) == 5
        async with client.videos.with_streaming_response.download_content(video.id) as streamed:
            assert b"".join([chunk async for chunk in streamed.iter_bytes()]) == content.content
        remix = await client.videos.remix(video.id, prompt="at night")
        assert (await client.videos.poll(remix.id, poll_interval_ms=20)).status == "completed"
        assert (await client.videos.delete(video.id)).deleted is True


def test_many_clients_poll_at_once(connected: Connect) -> None:
    """Each gets the end of its own video."""
    client, ready = connected(), threading.Barrier(8)

    def make(seed: int) -> tuple[int, str]:
        ready.wait()
        video = client.videos.create_and_poll(**SMALL, extra_body=QUICK | {"seed": seed}, poll_interval_ms=20)
        return video.seed, video.status

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, range(8))) == [(seed, "completed") for seed in range(8)]
