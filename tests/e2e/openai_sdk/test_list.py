"""``videos.list`` and ``videos.delete``: pages, and what is left of a video."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

import openai
import pytest
from openai import OpenAI
from openai.types import Video

from tests.e2e.openai_sdk.conftest import Connect
from tests.e2e.openai_sdk.sdk import cancel, create, download, finish, wait_for
from tests.server_process import Server


@pytest.fixture
def five(client: OpenAI) -> list[str]:
    """The ids of five videos, oldest first. An id is made of the millisecond, so each waits for the one before."""
    return [finish(client, create(client, seed=seed)).id for seed in range(5)]


def ids(videos: object) -> list[str]:
    return [video.id for video in videos]  # type: ignore[attr-defined]


def test_pages_follow_each_other_to_the_end(client: OpenAI, five: list[str]) -> None:
    """Newest first unless asked otherwise; iteration asks for page after page."""
    page = client.videos.list(limit=2)
    assert ids(page.data) == five[:2:-1]
    assert (page.object, page.first_id, page.last_id, page.has_more) == ("list", five[4], five[3], True)
    second = page.get_next_page()
    assert ids(second.data) == five[2:0:-1]
    last = second.get_next_page()
    assert (ids(last.data), last.has_more, last.has_next_page()) == (five[:1], False, False)
    assert ids(client.videos.list(limit=2)) == five[::-1]
    assert ids(client.videos.list(limit=2, order="asc")) == five
    assert ids(client.videos.list(limit=2, order="desc")) == five[::-1]
    assert ids(client.videos.list(limit=5)) == ids(client.videos.list()) == five[::-1]
    assert ids(client.videos.list(limit=100, order="asc", after=five[1])) == five[2:]


def test_an_empty_list_is_a_page(client: OpenAI) -> None:
    """With nothing on it."""
    page = client.videos.list()
    assert (page.data, page.has_more, page.first_id, page.last_id) == ([], False, None, None)
    assert list(client.videos.list(limit=2, order="asc")) == []


def test_no_items_of_a_page_is_no_endless_loop(client: OpenAI) -> None:
    """OpenAI's limit may be 0."""
    create(client)
    assert list(client.videos.list(limit=0)) == []


def test_a_deleted_video_still_marks_its_place(client: OpenAI, five: list[str]) -> None:
    """A page after it goes on where it was."""
    client.videos.delete(five[2])
    assert ids(client.videos.list(after=five[2], limit=1)) == [five[1], five[0]]
    assert ids(client.videos.list(after=five[2], order="asc")) == five[3:]


def test_a_list_can_be_emptied_while_it_is_read(client: OpenAI, five: list[str]) -> None:
    """Every video is seen once."""
    seen = []
    for video in client.videos.list(limit=2):
        assert client.videos.delete(video.id).deleted is True
        seen.append(video.id)
    assert seen == five[::-1]
    assert client.videos.list().data == []


@pytest.mark.parametrize(
    ("query", "param"),
    [({"limit": 101}, "limit"), ({"limit": -1}, "limit"), ({"order": "up"}, "order"), ({"after": "video_x"}, "after")],
)
def test_a_bad_page_is_refused_by_name(client: OpenAI, query: dict[str, object], param: str) -> None:
    """400; the first page again would be an endless loop."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.list(**query)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_each_key_has_a_list_of_its_own(connected: Connect) -> None:
    """And finds nothing of another's."""
    mine, other = connected(), connected(api_key="sk-client-399")
    video = create(mine)
    assert ids(mine.videos.list()) == [video.id]
    assert other.videos.list().data == []
    calls = (
        lambda: other.videos.retrieve(video.id),
        lambda: other.videos.delete(video.id),
        lambda: other.videos.download_content(video.id),
        lambda: other.videos.remix(video.id, prompt="mine now"),
        lambda: cancel(other, video),
    )
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    assert mine.videos.retrieve(video.id).id == video.id


def is_gone(client: OpenAI, video: Video) -> None:
    """By every call."""
    calls = (
        lambda: client.videos.retrieve(video.id),
        lambda: client.videos.download_content(video.id),
        lambda: client.videos.delete(video.id),
        lambda: client.videos.remix(video.id, prompt="again"),
        lambda: client.videos.poll(video.id),
    )
    for call in calls:
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert (caught.value.code, caught.value.type) == ("not_found", "invalid_request_error")


def test_a_deleted_video_is_gone(client: OpenAI) -> None:
    """A finished one with its file."""
    video = finish(client, create(client))
    assert download(client, video)
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (video.id, "video.deleted", True)
    is_gone(client, video)


@pytest.mark.parametrize("prompt", ["waves [fail]", "[slow] waves"])
def test_a_video_can_be_deleted_in_any_state(client: OpenAI, prompt: str) -> None:
    """A failed one; one in progress is stopped, without the 409 that the SDK would repeat."""
    video = create(client, prompt=prompt, num_inference_steps=100)
    wait_for(client, video, lambda found: found.status in {"in_progress", "failed"})
    assert client.videos.delete(video.id).deleted is True
    is_gone(client, video)


def test_a_deletion_has_a_content_type_and_no_body(client: OpenAI, fake_server: Server, api_key: str) -> None:
    """As the SDK sends it: JSON by its header, neither a length nor a byte after the headers."""
    video, address = create(client), urlsplit(fake_server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    try:
        connection.putrequest("DELETE", f"/v1/videos/{video.id}", skip_accept_encoding=True)
        connection.putheader("authorization", f"Bearer {api_key}")
        connection.putheader("content-type", "application/json")
        connection.endheaders()
        answer = connection.getresponse()
        assert (answer.status, b'"deleted":true' in answer.read().replace(b" ", b"")) == (200, True)
    finally:
        connection.close()


@pytest.mark.parametrize("video_id", ["video_no", "a/b c?d#e", "猫", "video_" + "0" * 32])
def test_an_unknown_id_is_not_found(client: OpenAI, video_id: str) -> None:
    """404 with our error, whatever is in it; the SDK escapes it."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.retrieve(video_id)
    assert (caught.value.code, bool(caught.value.request_id)) == ("not_found", True)
