"""What is sent twice is made once: the SDK repeats a request whose answer was lost, and a client may repeat its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI, omit

from tests.e2e.openai_sdk.conftest import Connect
from tests.e2e.openai_sdk.sdk import AS_JSON, QUICK, SMALL, Unsized, create, download, finish, picture


class LosesAnswers(httpx2.HTTPTransport):
    """The first ``count`` answers to a POST are lost after the server has given them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count
        self.tries: list[str] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        answer = super().handle_request(request)
        if request.method == "POST":
            self.tries.append(request.headers["x-stainless-retry-count"])
            if self.left:
                self.left -= 1
                answer.close()
                raise httpx2.ReadTimeout("the answer was lost", request=request)
        return answer


@pytest.fixture
def losing(connected: Connect) -> Callable[[int], tuple[OpenAI, LosesAnswers]]:
    """A client whose first answers to a POST are lost."""

    def make(count: int) -> tuple[OpenAI, LosesAnswers]:
        transport = LosesAnswers(count)
        return connected(http_client=openai.DefaultHttpxClient(transport=transport)), transport

    return make


Losing = Callable[[int], tuple[OpenAI, LosesAnswers]]
CREATIONS: dict[str, Callable[[OpenAI], Any]] = {
    "multipart": create,
    "json": lambda it: create(it, as_json=True),
    "file": lambda it: create(it, input_reference=("f.png", picture(), "image/png")),
    "drawn_seed": lambda it: it.videos.create(**SMALL, extra_body={"num_frames": 5}),
}


@pytest.mark.parametrize("name", CREATIONS)
def test_a_repeated_creation_is_one_video(losing: Losing, client: OpenAI, name: str) -> None:
    """The answer was lost; the SDK asks again and gets the video that was made then."""
    unlucky, transport = losing(1)
    video = CREATIONS[name](unlucky)
    assert transport.tries == ["0", "1"]
    assert [found.id for found in client.videos.list()] == [video.id]


def test_two_lost_answers_are_one_video_too(losing: Losing, client: OpenAI) -> None:
    """As often as the SDK tries."""
    unlucky, transport = losing(2)
    video = create(unlucky)
    assert transport.tries == ["0", "1", "2"]
    assert [found.id for found in client.videos.list()] == [video.id]


def test_repeated_remakes_are_one_video(losing: Losing, client: OpenAI) -> None:
    """Of a remix, an edit and extensions."""
    first = finish(client, create(client))
    film = download(client, first)
    remakes: list[Callable[[OpenAI], Any]] = [
        lambda it: it.videos.remix(first.id, prompt="again"),
        lambda it: it.videos.edit(prompt="anew", video=film, extra_body={"num_inference_steps": 2}),
        lambda it: it.videos.extend(prompt="on", seconds="4", video=film),
        lambda it: it.videos.extend(prompt="on", seconds="4", video=omit, extra_body={"video": {"id": first.id}}),
    ]
    for count, remake in enumerate(remakes, 2):
        unlucky, transport = losing(1)
        video = remake(unlucky)
        assert transport.tries == ["0", "1"]
        found = client.videos.list().data
        assert (found[0].id, len(found)) == (video.id, count)


def test_the_same_idempotency_key_is_the_same_video(client: OpenAI) -> None:
    """Whoever sends it, and whatever has become of the video meanwhile; another key is another video."""
    headers = {"Idempotency-Key": "order-17"}
    video = client.videos.create(**SMALL, extra_body=QUICK, extra_headers=headers)
    again = client.videos.create(**SMALL, extra_body=QUICK, extra_headers=headers)
    finish(client, video)
    later = client.videos.create(**SMALL, extra_body=QUICK, extra_headers=headers)
    assert video.id == again.id == later.id
    assert later.status == "completed"
    other = client.videos.create(**SMALL, extra_body=QUICK, extra_headers={"Idempotency-Key": "order-18"})
    assert other.id != video.id
    assert len(client.videos.list().data) == 2


def test_an_idempotency_key_belongs_to_one_request(client: OpenAI) -> None:
    """Another one under the same key is a mistake of the client: 400, and not the wrong video."""
    headers = {"Idempotency-Key": "order-17"}
    client.videos.create(**SMALL, extra_body=QUICK, extra_headers=headers)
    with pytest.raises(openai.BadRequestError, match="Idempotency-Key"):
        client.videos.create(**SMALL, extra_body=QUICK | {"seed": 8}, extra_headers=headers)
    assert len(client.videos.list().data) == 1


def test_an_idempotency_key_holds_for_one_client(connected: Connect) -> None:
    """Another API key may use the same."""
    headers = {"Idempotency-Key": "order-17"}
    mine, other = connected(), connected(api_key="sk-client-398")
    first = mine.videos.create(**SMALL, extra_body=QUICK, extra_headers=headers)
    assert other.videos.create(**SMALL, extra_body=QUICK, extra_headers=headers).id != first.id


def test_two_equal_requests_are_two_videos(client: OpenAI) -> None:
    """Nobody repeated anything: a client may want the same again."""
    assert create(client).id != create(client).id
    headers = {"x-stainless-retry-count": "0"} | AS_JSON
    assert client.videos.create(**SMALL, extra_body=QUICK, extra_headers=headers).id


def test_a_stream_that_cannot_be_rewound_is_sent_once(losing: Losing) -> None:
    """The SDK does not repeat it; the client's own repetition needs an Idempotency-Key."""
    unlucky, transport = losing(1)
    with pytest.raises(openai.APIConnectionError):
        create(unlucky, input_reference=("f.png", Unsized(picture()), "image/png"))
    assert transport.tries == ["0"]
