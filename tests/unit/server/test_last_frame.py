"""A last frame on its whole way: a body in each encoding, the job, storage, the worker, the engine, the video."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from kinema.engines.fake import FakeEngine
from kinema.request.capabilities import Capabilities
from kinema.storage import Storage
from tests.serving import SMALL, Serving, serving
from tests.unit.server.test_bad_input import error_of
from tests.unit.server.test_generations import as_form, image_bytes

URL = "/v1/videos"
RED, BLUE, GREEN = (220, 40, 40), (40, 40, 220), (30, 180, 60)


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def text(colour: tuple[int, int, int]) -> str:
    return base64.b64encode(picture(colour)).decode()


def part(name: str, colour: tuple[int, int, int]) -> tuple[str, Any]:
    return name, ("a.png", picture(colour), "image/png")


def form(*parts: tuple[str, Any], **fields: object) -> dict[str, Any]:
    return {"files": [*as_form(SMALL | fields).items(), *parts]}


def body(**fields: object) -> dict[str, Any]:
    return {"json": SMALL | fields}


async def finished(it: Serving, answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    await it.service.wait(answer.json()["id"])
    video: dict[str, Any] = (await it.client.get(f"{URL}/{answer.json()['id']}")).json()
    assert video["status"] == "completed"
    return video


async def ends_of(it: Serving, video: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The mean colours of the first and of the last frame, to the nearest ten."""
    content = (await it.client.get(f"{URL}/{video['id']}/content")).content
    with av.open(io.BytesIO(content)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 5
    first, last = (np.rint(frame.mean(axis=(0, 1)) / 10).astype(int) * 10 for frame in (frames[0], frames[-1]))
    return first.tolist(), last.tolist()


def near(*colours: tuple[int, int, int]) -> tuple[list[int], ...]:
    return tuple([*map(int, colour)] for colour in colours)


@pytest.mark.parametrize(
    "sent",
    [
        body(input_reference=text(RED), last_frame=text(BLUE)),
        body(input_reference={"image_url": f"data:image/png;base64,{text(RED)}"}, last_frame={"image_url": text(BLUE)}),
        body(input_reference=[text(RED), {"image_url": f"data:image/png;base64,{text(BLUE)}"}]),
        body(input_reference=[text(RED)], last_frame=text(BLUE)),
        form(part("input_reference", RED), part("last_frame", BLUE)),
        form(part("input_reference", RED), part("input_reference", BLUE)),
        form(part("input_reference[]", RED), part("input_reference[]", BLUE)),
        form(part("input_reference", RED), last_frame=text(BLUE)),
        form(("input_reference[]", (None, text(RED))), ("input_reference[]", (None, text(BLUE)))),
    ],
    ids=["fields", "objects", "list", "list of one", "parts", "twice", "brackets", "file and text", "texts"],
)
async def test_the_last_frame_is_the_last_of_the_video(it: Serving, sent: dict[str, Any]) -> None:
    """However it is sent; a second picture of one field is the last frame."""
    video = await finished(it, await it.client.post(URL, **sent))
    assert await ends_of(it, video) == near(RED, BLUE)
    assert video["warnings"] == []


async def test_a_last_frame_is_fitted_and_told_of(it: Serving) -> None:
    """By its own name; the synchronous call takes it too, and an estimate stores nothing."""
    sent = form(("last_frame", ("a.png", picture(BLUE, (100, 80)), "image/png")), part("input_reference", RED))
    said = ["last_frame 100x80 was scaled and cropped to 64x64"]
    estimate = await it.client.post(f"{URL}/estimate", **sent)
    assert estimate.json()["warnings"] == said
    assert (await it.client.get(URL)).json()["data"] == []
    video = (await it.client.post(f"{URL}/generations", **sent)).json()
    assert (video["status"], video["warnings"]) == ("completed", said)
    assert await ends_of(it, video) == near(RED, BLUE)


async def test_the_manifest_names_both_frames(it: Serving) -> None:
    """By their pixels, in their roles."""
    sent = body(input_reference=text(RED), last_frame=text(BLUE))
    video = await finished(it, await it.client.post(URL, **sent))
    manifest = (await it.client.get(f"{URL}/{video['id']}/content?variant=manifest")).json()
    assert [file["role"] for file in manifest["inputs"]] == ["first_frame", "last_frame"]
    assert len({file["sha256"] for file in manifest["inputs"]}) == 2
    assert {file["size_bytes"] for file in manifest["inputs"]} == {64 * 64 * 3}


async def test_a_remix_keeps_the_frames_that_are_not_sent(it: Serving) -> None:
    """Both, the last one beside a new first one, and the first one beside a new last one."""
    first = await finished(it, await it.client.post(URL, **body(input_reference=text(RED), last_frame=text(BLUE))))
    for new, expected in (
        ({}, near(RED, BLUE)),
        ({"input_reference": text(GREEN)}, near(GREEN, BLUE)),
        ({"last_frame": text(GREEN)}, near(RED, GREEN)),
        ({"input_reference": [text(GREEN), text(RED)]}, near(GREEN, RED)),
    ):
        answer = await it.client.post(f"{URL}/{first['id']}/remix", json={"prompt": "another"} | new)
        assert await ends_of(it, await finished(it, answer)) == expected


async def test_a_remix_adds_a_last_frame(it: Serving) -> None:
    """To a video from a first frame alone; one from text has no frame that it could stand beside."""
    for sent, status in (({"input_reference": text(RED)}, 200), ({}, 400)):
        first = await finished(it, await it.client.post(URL, **body(**sent)))
        answer = await it.client.post(f"{URL}/{first['id']}/remix", json={"prompt": "x", "last_frame": text(BLUE)})
        assert answer.status_code == status
    assert "needs a first frame" in error_of(answer, 400)["message"]


@pytest.mark.parametrize("last", [BLUE, RED], ids=["two pictures", "the same picture twice"])
async def test_the_files_of_both_frames_go_with_their_job(tmp_path: Path, last: tuple[int, int, int]) -> None:
    """One picture in two places is one file."""
    async with serving(storage=Storage(f"file://{tmp_path}")) as it:
        video = await finished(it, await it.client.post(URL, **body(input_reference=text(RED), last_frame=text(last))))
        assert await ends_of(it, video) == near(RED, last)
        assert len([*(tmp_path / "inputs").iterdir()]) == len({RED, last})
        request = (await it.service.get(video["id"])).request
        assert len(request.input_keys) == 2
        assert (request.image_key == request.last_frame_key) == (last == RED)
        assert (await it.client.delete(f"{URL}/{video['id']}")).status_code == 200
        assert [*(tmp_path / "inputs").iterdir()] == []


@pytest.mark.parametrize(
    ("sent", "param", "says"),
    [
        (body(last_frame=text(RED)), "last_frame", "needs a first frame in input_reference"),
        (form(part("last_frame", RED)), "last_frame", "needs a first frame in input_reference"),
        (body(input_reference=[text(RED)] * 3), "input_reference", "has 3 pictures; one is the first frame"),
        (form(*[part("input_reference", RED)] * 3), "input_reference", "has 3 pictures"),
        (form(*[part("input_reference[]", RED)] * 3), "input_reference", "has 3 pictures"),
        (body(input_reference=[]), "input_reference", "has 0 pictures"),
        (body(input_reference=[text(RED), None]), "input_reference", "an image in each place"),
        (body(input_reference=[text(RED), [text(RED)]]), "input_reference", "must be an image"),
        (body(input_reference=[text(RED), "https://example.com/a.png"]), "input_reference", "is not fetched"),
        (body(input_reference=[text(RED)] * 2, last_frame=text(RED)), "last_frame", "send one of them"),
        (body(input_reference=text(RED), last_frame=[text(RED)]), "last_frame", "must be an image"),
        (body(input_reference=text(RED), last_frame="%"), "last_frame", "not valid base64"),
        (
            body(input_reference=text(RED), last_frame=""),
            "last_frame",
            "is empty; a PNG, JPEG, WebP, AVIF, GIF or",
        ),
        (body(input_reference=text(RED), last_frame="AAAA"), "last_frame", "of a known kind"),
        (form(part("input_reference", RED), ("last_frame", ("a", b"<svg/>"))), "last_frame", "of a known kind"),
        (form(part("input_reference", RED), ("input_reference", ("a", b"x"))), "last_frame", "of a known kind"),
        (form(("last_frame", ("a", image_bytes()[:40])), part("input_reference", RED)), "last_frame", "cannot be read"),
        (body(input_reference=text(RED), last_frame=text(RED), num_frames=1), "num_frames", "a single frame"),
    ],
)
async def test_frames_that_do_not_go_together_are_refused(
    it: Serving, sent: dict[str, Any], param: str, says: str
) -> None:
    """400 with the field, and nothing of it is kept."""
    error = error_of(await it.client.post(URL, **sent), 400)
    assert (error["param"], says in error["message"]) == (param, True), error
    assert (await it.client.get(URL)).json()["data"] == []
    assert await it.store.inputs.stored_bytes("") == 0


@pytest.mark.parametrize("path", ["extensions", "edits"])
async def test_a_film_takes_no_last_frame(it: Serving, path: str) -> None:
    """It says so, as for a first one."""
    video = await finished(it, await it.client.post(URL, **body()))
    sent = {"prompt": "on", "video": {"id": video["id"]}, "last_frame": text(RED)}
    error = error_of(await it.client.post(f"{URL}/{path}", json=sent), 400)
    assert error["param"] == "last_frame"
    assert error["message"].startswith("last_frame has no use here")


async def test_two_films_are_refused(it: Serving) -> None:
    """Rather than one of both being taken in silence."""
    films = [("video", ("a.mp4", b"a", "video/mp4"))] * 2
    error = error_of(await it.client.post(f"{URL}/edits", files=[*as_form({"prompt": "x"}).items(), *films]), 400)
    assert (error["param"], "must be one film" in error["message"]) == ("video", True)


async def test_a_model_that_takes_no_last_frame_refuses_it() -> None:
    """With one sentence, which `/v1/models` has told before."""

    class FirstFrames(FakeEngine):
        @property
        def capabilities(self) -> Capabilities:
            return super().capabilities.model_copy(update={"is_first_last_frame_to_video": False})

    async with serving(FirstFrames()) as it:
        answer = await it.client.post(URL, **body(input_reference=text(RED), last_frame=text(BLUE)))
        error = error_of(answer, 400)
        assert (error["param"], error["message"]) == ("last_frame", "fake takes no last frame; leave last_frame out")
        (model,) = (await it.client.get("/v1/models")).json()["data"]
    assert model["modes"] == [
        "text-to-video",
        "image-to-video",
        "video-to-video",
        "control-to-video",
        "reference-to-video",
        "frames-to-video",
    ]
