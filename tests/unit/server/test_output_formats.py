"""``output_format`` and sound, from the request to the file that opens."""

from __future__ import annotations

import io
from typing import Any

import av
import pytest

from kinema.engines.fake import FakeEngine
from kinema.ids import JobId
from tests.serving import SMALL, Serving, serving
from tests.unit.server.test_generations import URL as SYNCHRONOUS
from tests.unit.server.test_generations import as_form
from tests.unit.server.test_videos import URL, create, error, finished

KINDS = {"mp4": "video/mp4", "webm": "video/webm", "gif": "image/gif"}


def streams(film: bytes) -> list[str]:
    with av.open(io.BytesIO(film)) as container:
        return [stream.codec_context.name for stream in container.streams]


async def extended(it: Serving, film: bytes, **fields: Any) -> dict[str, Any]:
    form = as_form({"prompt": "on", "num_frames": 5} | fields)
    answer = await it.client.post(f"{URL}/extensions", files=form | {"video": ("film", film, "video/mp4")})
    assert answer.status_code == 200, answer.text
    return await finished(it, answer.json())


@pytest.mark.parametrize("kind", list(KINDS))
async def test_a_video_is_the_kind_of_file_that_was_asked_for(it: Serving, kind: str) -> None:
    """In every body: the answer, the file's type, name and content; and a remix is of the same kind."""
    asked = {"output_format": kind}
    answers = [
        await it.client.post(URL, json=SMALL | asked),
        await it.client.post(URL, files=as_form(SMALL | asked)),
        await it.client.post(URL, json=SMALL | {"extra_body": asked}),
    ]
    videos = [await finished(it, answer.json()) for answer in answers]
    remix = await it.client.post(f"{URL}/{videos[0]['id']}/remix", json={"prompt": "a blue one"})
    films = set()
    for video in (*videos, await finished(it, remix.json())):
        assert (video["status"], video["output_format"], video["data"][0]["output_format"]) == ("completed", kind, kind)
        file = await it.client.get(video["data"][0]["url"])
        assert file.headers["content-type"] == KINDS[kind]
        assert file.headers["content-disposition"] == f'inline; filename="{video["id"]}.{kind}"'
        films.add(streams(file.content)[0])
    assert films == {{"mp4": "h264", "webm": "vp9", "gif": "gif"}[kind]}
    stored = it.storage.list_jobs()
    assert all(f"1.{kind}" in stored[JobId(video["id"])].sizes for video in videos)


async def test_the_synchronous_call_has_them_too(it: Serving) -> None:
    """By its address and as base64."""
    for form in ("url", "b64_json"):
        answer = await it.client.post(SYNCHRONOUS, json=SMALL | {"output_format": "webm", "response_format": form})
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"][0]["output_format"] == "webm"
        assert form in answer.json()["data"][0]


async def test_a_kind_that_is_not_made_is_refused(it: Serving) -> None:
    """Before the job exists, in each call; models say what they make."""
    for path in (URL, SYNCHRONOUS, f"{URL}/estimate"):
        refused = error(await it.client.post(path, json=SMALL | {"output_format": "avi"}), 400)
        assert (refused["param"], refused["code"]) == ("output_format", "unsupported")
        assert "accepted: mp4, webm, gif" in refused["message"]
    (model,) = (await it.client.get("/v1/models")).json()["data"]
    assert model["output_formats"] == list(KINDS)


async def test_a_gif_is_not_continued_or_edited(it: Serving) -> None:
    """A WebM is, into any kind."""
    gif, webm = [await finished(it, await create(it, output_format=kind)) for kind in ("gif", "webm")]
    for call in ("extensions", "edits"):
        body = {"prompt": "on", "num_frames": 5, "video": {"id": gif["id"]}}
        assert "is a GIF" in error(await it.client.post(f"{URL}/{call}", json=body), 400)["message"]
        answer = await it.client.post(f"{URL}/{call}", json=body | {"video": {"id": webm["id"]}})
        assert (await finished(it, answer.json()))["status"] == "completed"


async def test_a_gif_of_a_fast_video_says_what_it_leaves_out(it: Serving) -> None:
    """Frames that no browser shows in time."""
    video = await create(it, output_format="gif", fps=60)
    assert video["warnings"] == ["some frames were left out: a GIF shows at most 50 a second, not 60"]


async def test_sound_is_in_the_file_and_left_out_of_a_gif_with_a_warning() -> None:
    """Of a model that has sound."""
    async with serving(FakeEngine(has_sound=True)) as it:
        for kind, expected in (("mp4", ["h264", "aac"]), ("webm", ["vp9", "opus"]), ("gif", ["gif"])):
            video = await finished(it, await create(it, output_format=kind))
            assert streams((await it.client.get(video["data"][0]["url"])).content) == expected
            left_out = ["the sound was left out: a file of output_format gif has none"] if kind == "gif" else []
            assert video["warnings"] == left_out


async def test_an_extension_keeps_the_sound_of_the_film() -> None:
    """Where one part has none it is silent, with a warning; an edit leaves it out, with a warning."""
    async with serving(FakeEngine(has_sound=True)) as it, serving(FakeEngine()) as silent:
        sound = await finished(it, await create(it))
        heard = (await it.client.get(sound["data"][0]["url"])).content
        mute = (await silent.client.get((await finished(silent, await create(silent)))["data"][0]["url"])).content
        assert (streams(heard), streams(mute)) == (["h264", "aac"], ["h264"])
        both = await extended(it, heard)
        assert (both["warnings"], streams((await it.client.get(both["data"][0]["url"])).content)[1:]) == ([], ["aac"])
        for server, film, warning in (
            (silent, heard, "the new part is silent: fake makes no sound"),
            (it, mute, "the video that is continued has no sound, so its part is silent"),
        ):
            video = await extended(server, film)
            assert video["warnings"] == [warning]
            assert streams((await server.client.get(video["data"][0]["url"])).content) == ["h264", "aac"]
        gif = await extended(silent, heard, output_format="gif")
        assert gif["warnings"] == ["the sound of the video was left out: the new video has none"]
        form = as_form({"prompt": "blue"}) | {"video": ("film", heard, "video/mp4")}
        edited = (await silent.client.post(f"{URL}/edits", files=form)).json()
        assert edited["warnings"] == ["the sound of the video was left out: the new video has none"]
        assert (await silent.client.post(f"{URL}/edits", files=form | {"output_format": (None, "webm")})).is_success
