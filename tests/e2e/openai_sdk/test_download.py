"""``videos.download_content``: the film, its previews, parts of it, and what there is before it is ready."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Video
from PIL import Image

from tests.e2e.openai_sdk.conftest import Connect
from tests.e2e.openai_sdk.sdk import cancel, count_frames, create, download, finish, recording


@pytest.fixture
def video(client: OpenAI) -> Video:
    """A finished video."""
    return finish(client, create(client, num_frames=17))


def test_the_film_is_the_default(client: OpenAI, video: Video, tmp_path: Path) -> None:
    """Without a variant and with ``video``, in memory and to a file."""
    content = client.videos.download_content(video.id)
    assert content.response.headers["content-type"] == "video/mp4"
    assert int(content.response.headers["content-length"]) == len(content.content)
    assert "content-encoding" not in content.response.headers
    assert count_frames(content.content) == 17
    assert download(client, video, variant="video") == content.content
    client.videos.download_content(video.id, variant="video").write_to_file(tmp_path / "film.mp4")
    assert (tmp_path / "film.mp4").read_bytes() == content.content


@pytest.mark.parametrize(
    ("variant", "media_type", "kind"),
    [("thumbnail", "image/webp", "WEBP"), ("spritesheet", "image/jpeg", "JPEG")],
)
def test_previews_are_images(client: OpenAI, video: Video, variant: Any, media_type: str, kind: str) -> None:
    """A WebP of one frame, a JPEG of several."""
    content = client.videos.download_content(video.id, variant=variant)
    assert content.response.headers["content-type"] == media_type
    image = Image.open(io.BytesIO(content.content))
    image.load()
    assert image.format == kind
    assert image.width * image.height >= 64 * 64


def test_an_unknown_variant_is_refused(client: OpenAI, video: Video) -> None:
    """400 that lists the known ones, and not the film under a wrong name."""
    with pytest.raises(openai.BadRequestError, match="thumbnail") as caught:
        client.videos.download_content(video.id, variant="poster")  # type: ignore[arg-type]
    assert caught.value.param == "variant"


def test_a_download_is_streamed(client: OpenAI, video: Video, tmp_path: Path) -> None:
    """Chunk by chunk into a file."""
    with client.videos.with_streaming_response.download_content(video.id) as response:
        assert response.headers["content-type"] == "video/mp4"
        response.stream_to_file(tmp_path / "film.mp4")
    assert (tmp_path / "film.mp4").read_bytes() == download(client, video)


@pytest.mark.parametrize("asked", ["bytes=0-9", "bytes=100-", "bytes=-50"])
def test_a_part_can_be_asked_for(client: OpenAI, video: Video, asked: str) -> None:
    """206 with the place of the part in the whole."""
    whole = download(client, video)
    part = client.videos.download_content(video.id, extra_headers={"Range": asked})
    first, last = asked.removeprefix("bytes=").split("-")
    start = int(first) if first else len(whole) - int(last)
    end = int(last) + 1 if first and last else len(whole)
    assert part.response.status_code == 206
    assert part.response.headers["content-range"] == f"bytes {start}-{end - 1}/{len(whole)}"
    assert part.content == whole[start:end]


def test_a_part_beyond_the_end_is_refused(client: OpenAI, video: Video) -> None:
    """416 with the size, and a body like that of every error."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.videos.download_content(video.id, extra_headers={"Range": "bytes=99999999-"})
    error = caught.value
    assert (error.status_code, error.code) == (416, "range_not_satisfiable")
    assert error.response.headers["content-range"] == f"bytes */{len(download(client, video))}"


def test_before_its_end_a_video_is_not_found(connected: Connect) -> None:
    """404, as OpenAI answers; a 409 would be asked again."""
    sent: list[Any] = []
    with recording(sent) as http:
        client = connected(http_client=http)
        video = create(client, prompt="[slow] waves", num_inference_steps=100)
        for variant in ("video", "thumbnail", "spritesheet"):
            with pytest.raises(openai.NotFoundError, match="not ready") as caught:
                client.videos.download_content(video.id, variant=variant)  # type: ignore[arg-type]
            assert caught.value.code == "not_finished"
        cancel(client, video)
        with pytest.raises(openai.NotFoundError, match="cancelled"):
            client.videos.download_content(video.id)
    assert len(sent) == 6


def test_a_failed_video_says_why_there_is_no_film(client: OpenAI) -> None:
    """404 with the reason of the failure."""
    video = finish(client, create(client, prompt="waves [fail]"))
    with pytest.raises(openai.NotFoundError, match="asks for a failure"):
        client.videos.download_content(video.id)


def test_the_link_of_the_answer_opens_without_a_key(client: OpenAI, video: Video) -> None:
    """In a browser, for instance."""
    with openai.DefaultHttpxClient() as browser:
        answer = browser.get(video.data[0]["url"])  # type: ignore[attr-defined]
    assert (answer.status_code, answer.content) == (200, download(client, video))
