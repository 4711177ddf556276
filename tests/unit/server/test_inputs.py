"""``control_video``, ``reference_images``, ``conditioning`` and ``audio``, from the request to the frames."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kinema.engines.fake import FakeEngine
from kinema.media.film import open_film
from kinema.request.capabilities import Capabilities
from tests.serving import SMALL, Serving, serving
from tests.unit.server.test_generations import as_form, sse
from tests.unit.server.test_videos import URL, create, error, finished

# The frame of a picture, and how far its colour may be from what was sent.
CLOSE = 12


class TextEngine(FakeEngine):
    """Takes none of these inputs."""

    @property
    def capabilities(self) -> Capabilities:
        nothing = {"control_videos": (), "max_reference_images": 0, "takes_conditioning": False}
        return super().capabilities.model_copy(update=nothing)


class PoseEngine(FakeEngine):
    """Needs a picture and two films."""

    @property
    def capabilities(self) -> Capabilities:
        films = ("a film of poses", "a film of faces")
        needs = {"is_text_to_video": False, "needs_control_video": True, "control_videos": films}
        return super().capabilities.model_copy(update=needs)


def picture(colour: tuple[int, int, int], side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def as_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


PICTURE = as_url(picture((1, 1, 1)))


async def frames(it: Serving, video: dict[str, Any]) -> np.ndarray:
    done = await finished(it, video)
    assert done["status"] == "completed", done["error"]
    film = open_film((await it.client.get(done["data"][0]["url"])).content)
    return np.stack(list(film.frames(film.shape.size, 8)))


async def posted(it: Serving, path: str = URL, **arguments: Any) -> dict[str, Any]:
    answer = await it.client.post(path, **arguments)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


async def test_a_film_of_control_gives_size_and_length_and_counts(it: Serving) -> None:
    """By its id or as a file, in JSON, in forms and in envelopes; the video is the same each time."""
    source = await finished(it, await create(it, fps=10, num_frames=9, seed=1))
    film = (await it.client.get(source["data"][0]["url"])).content
    asked = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 7}
    named = {"control_video": {"id": source["id"]}}
    part = [("control_video", ("film.mp4", film, "video/mp4"))]
    form = [(name, value) for name, value in as_form(asked).items()]
    videos = [
        await posted(it, json=asked | named),
        await posted(it, json=asked | {"control_video": [{"id": source["id"]}]}),
        await posted(it, json=asked | {"extra_body": named}),
        await posted(it, files=as_form(asked | {"control_video": json.dumps([{"id": source["id"]}])})),
        *[
            await posted(it, files=as_form(asked) | {f"control_video{name}": (None, source["id"])})
            for name in ("[id]", "[0][id]", "[][id]", "[0]", "[]")
        ],
        await posted(it, files=[*form, *part]),
    ]
    made = [await frames(it, video) for video in videos]
    assert {(video["size"], video["fps"], video["num_frames"]) for video in videos} == {("64x64", 10, 9)}
    assert all(np.array_equal(made[0], other) for other in made[1:])
    plain = await frames(it, await posted(it, json=asked | {"size": "64x64", "num_frames": 9, "fps": 10}))
    assert not np.array_equal(made[0], plain)
    streamed = await it.client.post(f"{URL}/generations", json=asked | named | {"stream": True})
    assert sse(streamed.text)[-1][1] == "completed"
    estimate = await posted(it, f"{URL}/estimate", json=asked | named)
    assert (estimate["num_frames"], estimate["fps"]) == (9, 10)


async def test_a_remix_keeps_each_input_that_is_not_sent(it: Serving) -> None:
    """Also after the film of control is gone."""
    source = await finished(it, await create(it, num_frames=9))
    red, green = picture((200, 0, 0), 16), picture((0, 200, 0))
    first = await posted(
        it,
        json={
            "prompt": "a",
            "num_inference_steps": 1,
            "seed": 7,
            "control_video": {"id": source["id"]},
            "reference_images": [as_url(red)],
            "conditioning": {"4": as_url(green)},
        },
    )
    before = await frames(it, first)
    await it.client.delete(f"{URL}/{source['id']}")
    again = await posted(it, f"{URL}/{first['id']}/remix", json={"prompt": "a"})
    assert np.array_equal(await frames(it, again), before)
    blue = await posted(
        it, f"{URL}/{first['id']}/remix", json={"prompt": "a", "reference_images": as_url(picture((0, 0, 200), 16))}
    )
    changed = await frames(it, blue)
    assert np.abs(changed[8, 20:, 20:].astype(int) - before[8, 20:, 20:]).mean() < CLOSE
    assert int(changed[8, 4, 4, 2]) - int(before[8, 4, 4, 2]) > 100
    assert np.abs(changed[4].astype(int) - (0, 200, 0)).mean() < CLOSE


async def test_a_remix_with_another_film_of_control_keeps_its_length_or_takes_that_of_the_film(it: Serving) -> None:
    """Whichever is less."""
    films = [await finished(it, await create(it, num_frames=number)) for number in (5, 9, 13)]
    body = {"prompt": "a", "num_inference_steps": 1, "control_video": {"id": films[1]["id"]}}
    first = await posted(it, json=body)
    assert first["num_frames"] == 9
    lengths = []
    for film in films:
        again = {"prompt": "b", "control_video": {"id": film["id"]}}
        lengths.append((await posted(it, f"{URL}/{first['id']}/remix", json=again))["num_frames"])
    assert lengths == [5, 9, 9]
    longer = {"prompt": "b", "num_frames": 13, "control_video": {"id": films[2]["id"]}}
    assert (await posted(it, f"{URL}/{first['id']}/remix", json=longer))["num_frames"] == 13


@pytest.mark.parametrize("names", [("", ""), ("[]", "[]"), ("[0]", "[1]"), ("[10]", "[9]")])
async def test_a_list_in_a_form_may_have_brackets(it: Serving, names: tuple[str, str]) -> None:
    """Files and texts, in the order of their numbers; a later picture lies over an earlier one."""
    large, small = picture((200, 0, 0), 32), picture((0, 200, 0), 16)
    parts = [(f"reference_images{name}", data) for name, data in zip(names, (large, small), strict=True)]
    forms = [[(name, ("a.png", data, "image/png")) for name, data in parts]]
    if names[0]:
        urls = [(name, as_url(data)) for name, data in parts]
        forms.append([(name, (None, url)) for name, url in urls])
        forms.append([(f"{name}[image_url]", (None, url)) for name, url in urls])
        forms.append([(f"extra_body[{name.replace('[', '][', 1)}[image_url][url]", (None, url)) for name, url in urls])
    else:
        text = json.dumps([{"image_url": {"url": as_url(large)}}, as_url(small)])
        forms.append([("reference_images", (None, text))])
    for form in forms:
        made = await frames(it, await posted(it, files=[*as_form(SMALL).items(), *form]))
        is_small_seen = names != ("[10]", "[9]")
        assert np.abs(made[0, 2:14, 2:14].astype(int) - ((0, 200, 0) if is_small_seen else (200, 0, 0))).mean() < 24
        assert np.abs(made[0, 18:30, 18:30].astype(int) - (200, 0, 0)).mean() < 24


async def test_pictures_of_single_frames_and_of_what_is_seen_are_there(it: Serving) -> None:
    """In JSON, and as file parts of a form."""
    red, green = picture((200, 0, 0), 16), picture((0, 200, 0), 100)
    parts = [
        *as_form(SMALL).items(),
        ("reference_images", ("a.png", red, "image/png")),
        ("conditioning[3]", ("b.png", green, "image/png")),
    ]
    body = SMALL | {"reference_images": as_url(red), "conditioning": {"3": {"image_url": as_url(green)}}}
    for video in (await posted(it, json=body), await posted(it, files=parts)):
        assert "conditioning[3] 100x100 was scaled to 64x64" in " ".join(video["warnings"])
        made = await frames(it, video)
        assert np.abs(made[3].astype(int) - (0, 200, 0)).mean() < CLOSE
        assert np.abs(made[0, 2:14, 2:14].astype(int) - (200, 0, 0)).mean() < 2 * CLOSE


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"control_video": "x"}, "control_video", "no video"),
        ({"control_video": [5]}, "control_video", "must be a film"),
        ({"control_video": ["a"] * 5}, "control_video", "at most 4"),
        ({"control_video": [None, {"id": "x"}]}, "control_video", "in each place of the list a film"),
        ({"reference_images": [5]}, "reference_images", "must be an image"),
        ({"reference_images": [as_url(picture((1, 1, 1)))] * 3}, "reference_images", "takes at most 2"),
        ({"reference_images": ["AAAA"]}, "reference_images[0]", "PNG"),
        ({"reference_images": [as_url(picture((1, 1, 1))), None]}, "reference_images", "in each place of the list"),
        ({"reference_images": [as_url(picture((1, 1, 1))), "AAAA"]}, "reference_images[1]", "PNG"),
        ({"conditioning": []}, "conditioning", "by the numbers of their frames"),
        ({"conditioning": False}, "conditioning", "by the numbers of their frames"),
        ({"conditioning": {"4": "AAAA"}}, "conditioning[4]", "PNG"),
        ({"conditioning": [1]}, "conditioning", "by the numbers of their frames"),
        ({"conditioning": {"x": as_url(picture((1, 1, 1)))}}, "conditioning", "no picture of a frame in 'x'"),
        ({"conditioning": {"0": None}}, "conditioning", "no picture of a frame in '0'"),
        ({"conditioning": {"5": as_url(picture((1, 1, 1)))}}, "conditioning", "the frames 0 to 4"),
        ({"reference_images": [as_url(picture((1, 1, 1), side=8))]}, "reference_images[0]", "is 8x8; a picture whose"),
        ({"conditioning": {"0": PICTURE}, "input_reference": PICTURE}, "conditioning", "and so has input_reference"),
        (
            {"conditioning": {"4": PICTURE}, "input_reference": PICTURE, "last_frame": PICTURE},
            "conditioning",
            "a picture of frame 4, and so has last_frame; send one of them",
        ),
        ({"audio": "AAAA"}, "audio", "file part"),
        ({"control_video": {"id": "https://a.test/b"}}, "control_video", "not fetched"),
    ],
)
async def test_what_cannot_be_taken_is_refused_in_a_sentence(
    it: Serving, fields: dict[str, object], param: str, said: str
) -> None:
    """Which names the field."""
    answer = await it.client.post(URL, json=SMALL | fields)
    told = error(answer, answer.status_code if answer.status_code in (400, 404) else 400)
    assert said in told["message"]
    assert told["param"] == param or answer.status_code == 404


async def test_a_film_of_control_that_is_none_is_named_by_its_field(it: Serving) -> None:
    """It is not the ``video`` of an edit."""
    part = {"control_video": ("a.mp4", picture((1, 1, 1)), "video/mp4")}
    told = error(await it.client.post(URL, files=as_form(SMALL) | part), 400)
    assert told["param"] == "control_video"
    assert told["message"].startswith("control_video: video is not a film of a known kind; an MP4, MOV or WebM film")


async def test_a_model_that_takes_none_says_so() -> None:
    """Before anything is read of them; and so does one that needs more."""
    async with serving(TextEngine()) as it:
        source = await finished(it, await create(it))
        film = (await it.client.get(source["data"][0]["url"])).content
        parts = {
            "control_video": ("a.mp4", film, "video/mp4"),
            "reference_images": ("a.png", b"no picture", "image/png"),
            "conditioning[0]": ("a.png", b"no picture", "image/png"),
            "audio": ("a.wav", b"RIFF", "audio/wav"),
        }
        for name, part in parts.items():
            told = error(await it.client.post(URL, files=as_form(SMALL) | {name: part}), 400)
            assert (told["code"], told["param"]) == ("unsupported", name.partition("[")[0])
            says = "makes no video that follows a sound" if name == "audio" else "takes no"
            assert f"fake {says}" in told["message"]
        (model,) = (await it.client.get("/v1/models")).json()["data"]
        assert model["control_videos"] == []
    async with serving(PoseEngine()) as it:
        first = picture((9, 9, 9))
        for fields, said in (
            ({}, "needs a first frame"),
            ({"input_reference": as_url(first)}, "needs a film of poses and a film of faces in control_video"),
        ):
            assert said in error(await it.client.post(URL, json=SMALL | fields), 400)["message"]
        parts = [("input_reference", ("a.png", first, "image/png")), ("control_video", ("a.mp4", film, "video/mp4"))]
        answer = await it.client.post(URL, files=[*as_form(SMALL).items(), *parts])
        assert "has 1 films" in error(answer, 400)["message"]
        answer = await it.client.post(URL, files=[*as_form(SMALL).items(), *parts, parts[1]])
        assert (await finished(it, answer.json()))["status"] == "completed"
        answer = await it.client.post(f"{URL}/extensions", files=as_form(SMALL) | {"video": ("a.mp4", film)})
        assert "continues no video" in error(answer, 400)["message"]


async def test_an_edit_takes_no_other_input(it: Serving) -> None:
    """Nor does an extension."""
    source = await finished(it, await create(it))
    for call in ("edits", "extensions"):
        body = {"prompt": "a", "video": {"id": source["id"]}, "reference_images": as_url(picture((1, 1, 1)))}
        assert error(await it.client.post(f"{URL}/{call}", json=body), 400)["param"] == "reference_images"


async def test_the_manifest_has_each_input(it: Serving) -> None:
    """By its digest, and the frames that pictures are for."""
    source = await finished(it, await create(it))
    video = await finished(
        it,
        await posted(
            it,
            json=SMALL
            | {
                "control_video": {"id": source["id"]},
                "reference_images": [as_url(picture((1, 1, 1))), as_url(picture((2, 2, 2)))],
                "conditioning": {"3": as_url(picture((3, 3, 3)))},
            },
        ),
    )
    manifest = (await it.client.get(f"{URL}/{video['id']}/content", params={"variant": "manifest"})).json()
    roles = ["control_video", "reference_images", "reference_images", "conditioning"]
    assert [file["role"] for file in manifest["inputs"]] == roles
    assert manifest["request"]["conditioning_frames"] == [3]
