"""``remix``, ``extend`` and the characters: videos from videos."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI, omit
from openai.types import Video

from tests.e2e.openai_sdk.conftest import Connect
from tests.e2e.openai_sdk.sdk import (
    AS_JSON,
    cancel,
    count_frames,
    create,
    download,
    effective,
    finish,
    frames_of,
    picture,
    recording,
)

STEPS = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture
def first(client: OpenAI) -> Video:
    """A finished video of nine frames, at eight a second."""
    return finish(client, create(client, num_frames=9))


def same_but(video: Video, *others: str) -> dict[str, Any]:
    return {name: value for name, value in effective(video).items() if name not in others}


def test_a_remix_keeps_everything_but_the_prompt(client: OpenAI, first: Video) -> None:
    """The seed too, and it says what it was made from."""
    remix = finish(client, client.videos.remix(first.id, prompt="a blue one"))
    assert (remix.status, remix.prompt, remix.remixed_from_video_id) == ("completed", "a blue one", first.id)
    assert remix.id != first.id
    assert same_but(remix, "prompt", "remixed_from_video_id") == same_but(first, "prompt", "remixed_from_video_id")


def test_a_remix_takes_other_parameters(client: OpenAI, first: Video) -> None:
    """Those that ``extra_body`` has; the rest is as it was."""
    remix = client.videos.remix(first.id, prompt="a blue one", extra_body={"seed": 1, "guidance_scale": 2.0})
    assert (remix.seed, remix.guidance_scale, remix.num_frames) == (1, 2.0, 9)


def test_a_remix_of_an_image_keeps_the_image(client: OpenAI) -> None:
    """With the same prompt it is the same video."""
    made = finish(client, create(client, input_reference=picture()))
    remix = finish(client, client.videos.remix(made.id, prompt=made.prompt or ""))
    assert download(client, remix) == download(client, made)


@pytest.mark.parametrize("fields", [{"prompt": ""}, {"prompt": "x", "extra_body": {"seed": "x"}}])
def test_a_bad_remix_is_refused(client: OpenAI, first: Video, fields: dict[str, Any]) -> None:
    """400 like a creation."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.remix(first.id, **fields)
    assert caught.value.param in {"prompt", "seed"}


def sources(client: OpenAI, video: Video, folder: Path) -> dict[str, dict[str, Any]]:
    """The arguments of every way to name a video: files, its id in multipart, its id in JSON."""
    film, by_id = download(client, video), {"video": {"id": video.id}}
    (folder / "film.mp4").write_bytes(film)
    return {
        "bytes": {"video": film},
        "tuple": {"video": ("猫.mp4", film, "application/octet-stream")},
        "path": {"video": folder / "film.mp4"},
        "id": {"video": omit, "extra_body": by_id},
        "json": {"video": omit, "extra_body": by_id, "extra_headers": AS_JSON},
    }


def test_an_extension_is_the_first_video_and_more(client: OpenAI, first: Video, tmp_path: Path) -> None:
    """Its seconds are those of the whole."""
    for form, arguments in sources(client, first, tmp_path).items():
        body = STEPS | arguments.pop("extra_body", {})
        longer = finish(client, client.videos.extend(prompt="on and on", seconds="4", **arguments, extra_body=body))
        assert (longer.error, longer.status, longer.prompt, longer.size) == (None, "completed", "on and on", "64x64")
        assert float(longer.seconds) > 4 + float(first.seconds) - 0.3, form
        frames = count_frames(download(client, longer))
        assert abs(frames - 8 * float(longer.seconds)) < 1, form


def test_an_extension_by_the_real_model(tiny: OpenAI) -> None:
    """The stitched clip begins with the first one."""
    made = finish(tiny, create(tiny, num_frames=5, fps=8))
    body = {"video": {"id": made.id}, "num_inference_steps": 2}
    longer = finish(tiny, tiny.videos.extend(prompt="it moves up", seconds="1", video=omit, extra_body=body))  # type: ignore[arg-type]
    assert (longer.error, longer.status) == (None, "completed")
    assert float(longer.seconds) > float(made.seconds) + 0.5
    first, whole = frames_of(download(tiny, made)), frames_of(download(tiny, longer))
    assert len(whole) > 5 + 4
    assert np.abs(whole[:5] - first).mean() < 6


@pytest.mark.parametrize("method", ["edit", "extend"])
def test_what_is_no_video_is_refused(connected: Connect, method: str) -> None:
    """400 that names ``video``, 404 for an id of nobody; sent once, and no job is left."""
    sent: list[Any] = []
    more: dict[str, Any] = {"seconds": "4"} if method == "extend" else {}
    with recording(sent) as http:
        client = connected(http_client=http)
        make = getattr(client.videos, method)
        for video in (b"no film", b"", picture()):
            with pytest.raises(openai.BadRequestError) as caught:
                make(prompt="x", video=video, **more)
            assert caught.value.param == "video"
        for body in ({}, {"video": {"url": "https://example.com/x.mp4"}}):
            with pytest.raises(openai.BadRequestError) as caught:
                make(prompt="x", video=omit, extra_body=body, **more)
            assert caught.value.param == "video"
        with pytest.raises(openai.NotFoundError):
            make(prompt="x", video=omit, extra_body={"video": {"id": "video_" + "0" * 32}}, **more)
        assert client.videos.list().data == []
    assert len(sent) == 7


@pytest.mark.parametrize("method", ["edit", "extend"])
def test_an_unfinished_video_cannot_be_worked_on(client: OpenAI, method: str) -> None:
    """A 4xx that the SDK does not repeat."""
    video = create(client, prompt="[slow] waves", num_inference_steps=100)
    more: dict[str, Any] = {"seconds": "4"} if method == "extend" else {}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
        getattr(client.videos, method)(prompt="x", video=omit, extra_body={"video": {"id": video.id}}, **more)
    cancel(client, video)


def test_characters_are_refused_at_once(connected: Connect) -> None:
    """400 and not 501, which the SDK would send three times."""
    sent: list[Any] = []
    with recording(sent) as http:
        client = connected(http_client=http)
        with pytest.raises(openai.BadRequestError) as made:
            client.videos.create_character(name="Ada", video=base64.b64decode("AAAA"))
        with pytest.raises(openai.BadRequestError) as found:
            client.videos.get_character("char_1")
    assert [made.value.code, found.value.code] == ["unsupported", "unsupported"]
    assert len(sent) == 2
