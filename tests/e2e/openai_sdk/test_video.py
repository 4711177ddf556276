"""The Video object as the SDK reads it: every field, its type, in every state."""

from __future__ import annotations

import time

import pytest
from openai import OpenAI
from openai.types import Video

from tests.e2e.openai_sdk.conftest import Connect
from tests.e2e.openai_sdk.sdk import cancel, create, finish, wait_for

# The 13 fields of OpenAI's Video; a tuple lists what else it may be.
FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "object": (str,),
    "created_at": (int,),
    "status": (str,),
    "model": (str,),
    "progress": (int,),
    "seconds": (str,),
    "size": (str,),
    "prompt": (str,),
    "completed_at": (int, type(None)),
    "expires_at": (int, type(None)),
    "error": (dict, type(None)),
    "remixed_from_video_id": (str, type(None)),
}


def check(video: Video, status: str) -> None:
    """Every field is on the wire with exactly its type; True is no int here."""
    sent = video.model_dump()
    assert {name for name in FIELDS if name not in video.model_fields_set} == set()
    assert {name: type(sent[name]) for name, types in FIELDS.items() if type(sent[name]) not in types} == {}
    assert (video.object, video.status) == ("video", status)
    assert 0 <= video.progress <= 100
    assert abs(video.created_at - time.time()) < 600
    assert (video.completed_at is not None) == (status in {"completed", "failed"})
    assert (video.error is not None) == (status == "failed")


def test_every_field_has_its_type_in_every_state(client: OpenAI) -> None:
    """Queued, in progress, completed, failed, cancelled: by creation, by retrieval and in a list."""
    running = create(client, prompt="[slow] waves", num_inference_steps=200)
    check(running, "queued")
    check(wait_for(client, running, lambda video: video.status == "in_progress"), "in_progress")
    check(cancel(client, running), "failed")
    check(finish(client, create(client)), "completed")
    check(finish(client, create(client, prompt="waves [fail]")), "failed")
    for video in client.videos.list():
        check(video, video.status)


def test_the_ends_of_progress(client: OpenAI) -> None:
    """A bar can be drawn from it: 0 at first, 100 when it is done, and never back."""
    video = create(client, prompt="[slow] waves", num_inference_steps=4)
    seen = [video.progress]
    while video.status in {"queued", "in_progress"}:
        video = client.videos.retrieve(video.id)
        seen.append(video.progress)
    assert (seen[0], seen[-1]) == (0, 100)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2


def test_the_strict_client_accepts_every_answer(connected: Connect) -> None:
    """It checks every type, and allows four sizes; 1280x720 is one of them."""
    strict = connected(_strict_response_validation=True)
    video = strict.videos.create(
        prompt="a cat", size="1280x720", extra_body={"num_frames": 5, "num_inference_steps": 1}
    )
    assert strict.videos.poll(video.id, poll_interval_ms=50).status == "completed"
    failed = create(strict, prompt="a cat [fail]", size="1280x720")
    assert strict.videos.poll(failed.id, poll_interval_ms=50).status == "failed"
    remix = strict.videos.remix(video.id, prompt="a dog", extra_body={"num_frames": 1, "num_inference_steps": 1})
    assert strict.videos.poll(remix.id, poll_interval_ms=50).remixed_from_video_id == video.id
    assert [found.id for found in strict.videos.list(order="asc")] == [video.id, failed.id, remix.id]
    deleted = strict.videos.delete(video.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (video.id, "video.deleted", True)


def test_our_own_fields_are_attributes(client: OpenAI) -> None:
    """What OpenAI does not have comes through the SDK too."""
    video = finish(client, create(client, num_frames=4))
    assert (video.num_frames, video.seed, video.fps) == (5, 7, 8)
    assert video.warnings == ["num_frames 4 -> 5: must be a multiple of 4 plus 1"]
    assert video.timings["total_s"] > 0
    assert video.data[0]["url"].startswith("http://127.0.0.1")


def test_a_video_knows_its_place_in_the_queue(narrow: OpenAI) -> None:
    """The first runs, the second is next."""
    running = create(narrow, prompt="[slow] waves", num_inference_steps=200)
    wait_for(narrow, running, lambda video: video.status == "in_progress")
    waiting = create(narrow)
    assert narrow.videos.retrieve(waiting.id).status == "queued"
    wait_for(narrow, waiting, lambda video: video.queue_position is not None)


@pytest.mark.parametrize("name", ["with_raw_response", "with_streaming_response"])
def test_raw_answers_have_a_request_id(client: OpenAI, name: str) -> None:
    """On the answer, and on the object that is read from it."""
    video = create(client)
    if name == "with_raw_response":
        raw = client.videos.with_raw_response.retrieve(video.id)
        assert raw.parse().id == video.id
        assert raw.request_id == raw.headers["x-request-id"]
    else:
        with client.videos.with_streaming_response.retrieve(video.id) as response:
            assert response.parse().id == video.id
            assert response.request_id
    assert video._request_id
