"""``POST /v1/videos/generations`` with good requests, through the whole application."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Generator
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from PIL import Image

from kinema.engines.base import Note, Output
from kinema.engines.fake import FakeEngine
from kinema.errors import OutOfMemory, StorageUnavailable
from kinema.events import Artifact
from kinema.settings import JobSettings, ServerSettings
from tests.serving import SMALL, Gate, Serving, has_heard_of_cancel, serving, until

URL = "/v1/videos/generations"


def image_bytes(kind: str = "PNG", size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), 200, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def as_form(fields: dict[str, object]) -> dict[str, tuple[None, str]]:
    """The fields as multipart text parts."""
    return {name: (None, str(value)) for name, value in fields.items()}


async def made(it: Serving, **fields: object) -> dict[str, Any]:
    answer = await it.client.post(URL, json=SMALL | fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def sse(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    """The (id, event, data) of each event in a stream; comments are left out."""
    events = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            events.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return events


async def test_the_answer_has_a_url_that_opens(it: Serving) -> None:
    """At the address the client called, with the resolved values beside it."""
    body = await made(it, num_frames=4, seed=5)
    assert (body["status"], body["progress"], body["num_frames"], body["seed"]) == ("completed", 100, 5, 5)
    assert body["warnings"] == ["num_frames 4 -> 5: must be a multiple of 4 plus 1"]
    assert body["data"][0]["url"] == f"http://test/v1/videos/{body['id']}/content"
    video = await it.client.get(body["data"][0]["url"])
    assert (video.status_code, video.headers["content-type"]) == (200, "video/mp4")
    assert video.content[4:8] == b"ftyp"


async def test_the_answer_says_how_the_video_differs_from_the_request(it: Serving) -> None:
    """Behind what was adjusted before it was made."""
    body = await made(it, num_frames=4, prompt="waves [narrow]")
    width = int(body["size"].split("x")[0])
    narrow = f"the video is {width - 16} pixels wide, not {width}"
    assert body["warnings"] == ["num_frames 4 -> 5: must be a multiple of 4 plus 1", narrow]


async def test_the_public_url_is_what_clients_see() -> None:
    """Behind a proxy the called address is not the one that opens."""
    async with serving(server=ServerSettings(public_url="https://videos.example/kinema/")) as it:
        body = await made(it)
    assert body["data"][0]["url"] == f"https://videos.example/kinema/v1/videos/{body['id']}/content"


async def test_b64_json_carries_the_same_bytes(it: Serving) -> None:
    """And no URL."""
    body = await made(it, response_format="b64_json")
    video = await it.client.get(f"/v1/videos/{body['id']}/content")
    assert base64.b64decode(body["data"][0]["b64_json"]) == video.content
    assert "url" not in body["data"][0]


async def test_the_health_probe_payload_works(it: Serving) -> None:
    """8 frames become 9, and that is said."""
    body = await made(it, prompt="test", num_frames=8, size="256x256", num_inference_steps=1)
    assert (body["num_frames"], body["size"]) == (9, "256x256")
    assert body["warnings"] == ["num_frames 8 -> 9: must be a multiple of 4 plus 1"]


async def test_json_and_multipart_make_the_same_video(it: Serving) -> None:
    """Every parameter, with numbers as numbers and as text."""
    fields = {
        "prompt": 'a cat, 猫\r\n"x"',
        "model": "fake",
        "negative_prompt": "123",
        "size": "64x64",
        "seconds": 1.0,
        "fps": 8,
        "num_inference_steps": 1,
        "guidance_scale": 3e-7,
        "flow_shift": 5,
        "seed": 2**53 + 1,
        "user": "ann",
        "output_format": "mp4",
        "response_format": "b64_json",
        "stream": False,
    }
    answers = [
        await it.client.post(URL, json=fields),
        await it.client.post(URL, json={name: str(value) for name, value in fields.items()}),
        await it.client.post(URL, files=as_form(fields)),
    ]
    bodies = [answer.json() for answer in answers]
    for body in bodies:
        for name in ("id", "created", "created_at", "completed_at", "expires_at", "inference_time_s", "timings"):
            del body[name]
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0]["prompt"] == fields["prompt"]
    assert bodies[0]["seed"] == 2**53 + 1


async def test_absent_empty_and_null_are_the_same(it: Serving) -> None:
    """For optional numbers; the preset decides."""
    bodies = [await made(it, seed=1, **more) for more in ({}, {"fps": ""}, {"fps": None, "nvext": None, "user": None})]
    assert [body["fps"] for body in bodies] == [8, 8, 8]
    words = {"response_format": "", "output_format": "", "priority": " ", "model": ""}
    assert (await made(it, seed=1, **words))["priority"] == "normal"
    form = await it.client.post(URL, files=as_form(SMALL | {"fps": "", "guidance_scale": ""}))
    assert form.json()["guidance_scale"] == 5.0


async def test_whole_numbers_may_be_written_as_others_write_them(it: Serving) -> None:
    """9.0, "9", "9.0" and "9e0" are nine."""
    for nine in (9.0, "9", "9.0", " 9e0 ", "+9"):
        assert (await made(it, num_frames=nine))["num_frames"] == 9


async def test_nvext_is_where_dynamo_has_its_parameters(it: Serving) -> None:
    """As an object, in multipart as JSON text or in brackets; agreeing with the top level is fine."""
    nvext = {"fps": 4, "num_frames": "9", "seed": 3, "guidance_scale": 2, "annotations": ["timing"]}
    body = await made(it, num_frames=9, nvext=nvext)
    assert (body["fps"], body["num_frames"], body["seed"], body["guidance_scale"]) == (4, 9, 3, 2.0)
    assert body["warnings"] == ["nvext.annotations was ignored: there are none here"]
    as_text = await it.client.post(URL, files=as_form(SMALL | {"nvext": json.dumps({"fps": 4})}))
    in_brackets = await it.client.post(URL, files=as_form(SMALL | {"nvext[fps]": 4}))
    assert as_text.json()["fps"] == in_brackets.json()["fps"] == 4


PNG_TEXT = base64.b64encode(image_bytes()).decode()


@pytest.mark.parametrize(
    "reference",
    [
        PNG_TEXT,
        f"data:image/png;base64,{PNG_TEXT}",
        {"image_url": f"DATA:image/webp;base64,{PNG_TEXT}"},
        f"data:image/jpeg;base64,{base64.b64encode(image_bytes('JPEG')).decode()}",
        f"data:;base64,{base64.b64encode(image_bytes('WEBP')).decode()}",
        f"\n data:image/png;base64,{quote(PNG_TEXT, safe='')}",
        PNG_TEXT.rstrip("="),
        "\n".join(PNG_TEXT[i : i + 76] for i in range(0, len(PNG_TEXT), 76)),
    ],
)
async def test_an_image_may_be_sent_as_text(it: Serving, reference: object) -> None:
    """The bytes decide what it is, whatever the data: URL says."""
    body = await made(it, input_reference=reference)
    assert (body["status"], body["warnings"]) == ("completed", [])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("input_reference", ("猫 %22.png", image_bytes(), "image/png")),
        ("input_reference", ("upload", image_bytes("JPEG"), "application/octet-stream")),
        ("input_reference[]", ("upload", image_bytes("WEBP"), "image/gif")),
        ("input_reference", (None, f"data:image/png;base64,{PNG_TEXT}")),
        ("input_reference[image_url]", (None, f"data:image/png;base64,{PNG_TEXT}")),
    ],
)
async def test_an_image_may_be_a_part(it: Serving, name: str, part: tuple[Any, ...]) -> None:
    """A file of any name and declared type, or text as the SDKs fold it."""
    answer = await it.client.post(URL, files=as_form(SMALL) | {name: part})
    assert answer.status_code == 200, answer.text


async def test_an_image_that_does_not_fit_is_brought_to_size(it: Serving) -> None:
    """And that is said. Text parts over a mebibyte are fine."""
    noise = np.random.default_rng(0).integers(0, 255, (800, 900, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    assert len(text) > 2**20
    answer = await it.client.post(URL, files=as_form(SMALL | {"input_reference": text}))
    assert answer.json()["warnings"] == ["input_reference 900x800 was scaled and cropped to 64x64"]


async def test_a_stream_tells_how_it_goes(it: Serving) -> None:
    """Numbered events, progress that only grows, and the whole answer in the last."""
    answer = await it.client.post(URL, json=SMALL | {"stream": True, "seed": 5})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
    events = sse(answer.text)
    assert [number for number, _, _ in events] == list(range(1, len(events) + 1))
    assert [name for _, name, _ in events] == ["queued", "started", *["progress"] * 4, "completed"]
    progress = [data["progress"] for _, _, data in events]
    assert progress == sorted(progress)
    last = events[-1][2]
    plain = await made(it, seed=5)
    assert set(last) == set(plain)
    assert (last["status"], last["data"][0]["url"][-8:]) == ("completed", "/content")


async def test_a_stream_may_carry_the_bytes(it: Serving) -> None:
    """stream and b64_json together, in multipart."""
    answer = await it.client.post(URL, files=as_form(SMALL | {"stream": "on", "response_format": "b64_json"}))
    assert base64.b64decode(sse(answer.text)[-1][2]["data"][0]["b64_json"])[4:8] == b"ftyp"


def _fail(*_: object) -> None:
    raise OutOfMemory


async def test_a_failed_job_is_an_error_that_is_not_repeated() -> None:
    """500 with the job's id; an SDK would otherwise make the same video three times."""
    async with serving(FakeEngine(on_output=_fail)) as it:
        answer = await it.client.post(URL, json=SMALL)
        streamed = await it.client.post(URL, json=SMALL | {"stream": True})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["id"][:6]) == ("out_of_memory", "server_error", "video_")
    _, name, last = sse(streamed.text)[-1]
    assert (name, last["status"], last["data"], last["error"]["code"]) == ("failed", "failed", [], "out_of_memory")


async def test_storage_that_cannot_be_written_fails_the_job_only(it: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 with the reason; the next request is served."""

    def refuse(*_: object) -> Artifact:
        raise StorageUnavailable("cannot write the video: No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(it.storage, "put_file", refuse)
        broken.setattr(it.storage, "put_bytes", refuse)
        answer = await it.client.post(URL, json=SMALL)
        with_image = await it.client.post(URL, json=SMALL | {"input_reference": PNG_TEXT})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
    assert "No space left" in answer.json()["error"]["message"]
    assert with_image.status_code == 503
    assert (await made(it))["status"] == "completed"


async def test_a_job_cancelled_elsewhere_is_answered_as_cancelled() -> None:
    """200, since the call did not fail; of the words that clients know it is a failed one, whose code says why."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it:
        asking = asyncio.create_task(it.client.post(URL, json=SMALL))
        assert await asyncio.to_thread(gate.has_arrived.wait, 20)
        (run,) = it.dispatcher._runs.values()
        await it.service.cancel(run.job.id)
        await until(lambda: has_heard_of_cancel(it))
        gate.is_open.set()
        answer = await asking
    said = answer.json()
    assert (answer.status_code, said["status"], said["data"]) == (200, "failed", [])
    assert said["error"]["code"] == "cancelled"


async def test_a_full_queue_is_429_with_a_time_to_come_back() -> None:
    """The SDK waits that long by itself."""
    async with serving(is_dispatching=False, jobs=JobSettings(max_queued=1)) as it:
        first = asyncio.create_task(it.client.post(URL, json=SMALL))
        while not await it.service.count_waiting():
            pass
        answer = await it.client.post(URL, json=SMALL)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    assert answer.json()["error"]["code"] == "overloaded"
    assert answer.json()["error"]["type"] == "rate_limit_error"


async def test_a_chunked_body_needs_no_length(it: Serving) -> None:
    """As SDKs send streams."""

    async def chunks():
        yield json.dumps(SMALL)[:10].encode()
        yield json.dumps(SMALL)[10:].encode()

    answer = await it.client.post(URL, content=chunks(), headers={"content-type": "application/json; charset=utf-8"})
    assert answer.status_code == 200


async def test_many_at_once_each_get_their_own(it: Serving) -> None:
    """More than the worker runs at once; every answer is of its own request."""
    answers: list[httpx.Response] = await asyncio.gather(
        *(it.client.post(URL, json=SMALL | {"seed": seed}) for seed in range(8))
    )
    assert [answer.json()["seed"] for answer in answers] == list(range(8))
    assert len({answer.json()["id"] for answer in answers}) == 8


class NotingEngine(FakeEngine):
    """Says of each video how it differs."""

    def generate(self, *args: Any, **options: Any) -> Generator[Output, None, None]:
        yield Note("made of waves")
        yield from super().generate(*args, **options)


async def test_a_repeated_stream_has_each_warning_once() -> None:
    """The notes of the engine too, which the job has and its last event adds."""
    async with serving(NotingEngine()) as it:
        for _ in range(2):
            answer = await it.client.post(
                URL, json=SMALL | {"stream": True, "num_frames": 4}, headers={"idempotency-key": "k"}
            )
            _, kind, video = sse(answer.text)[-1]
            assert kind == "completed"
            assert video["warnings"] == ["num_frames 4 -> 5: must be a multiple of 4 plus 1", "made of waves"]


async def test_what_a_browser_sends_for_a_field_that_was_left_empty_is_absent(it: Serving) -> None:
    """Every field, by one rule; a file that has a name and no bytes is an empty file."""
    names = (
        "size",
        "priority",
        "response_format",
        "output_format",
        "seconds",
        "seed",
        "model",
        "stream",
        "tier",
        "fps",
    )
    fields = as_form(SMALL) | {name: (None, "") for name in names if name not in SMALL}
    unchosen = dict.fromkeys(("input_reference", "last_frame"), ("no name", b""))
    form = httpx.Request("POST", "http://it", files=fields | unchosen)
    body = form.read().replace(b'filename="no name"', b'filename=""')
    assert body.count(b'filename=""') == 2
    answer = await it.client.post(URL, content=body, headers={"content-type": form.headers["content-type"]})
    assert answer.status_code == 200, answer.text
    assert not [said for said in answer.json().get("warnings", ()) if "ignored" in said]
    answer = await it.client.post(URL, files=fields | {"input_reference": ("a.png", b"", "image/png")})
    assert answer.status_code == 400
    assert "input_reference is empty" in answer.json()["error"]["message"]


async def test_every_way_to_write_a_picture_makes_the_same_video(it: Serving) -> None:
    """A file, a data: URL as a file, the alphabet for URLs, and the object of OpenAI's chat."""
    data = image_bytes()
    text = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{text}"
    bodies = [text.translate(str.maketrans("+/", "-_")), {"image_url": {"url": url, "detail": "auto"}}]
    answers = [await it.client.post(URL, json=SMALL | {"seed": 5, "input_reference": one}) for one in bodies]
    fields = as_form(SMALL | {"seed": 5})
    answers += [
        await it.client.post(URL, files=fields | {"input_reference": ("a", content)})
        for content in (data, url.encode())
    ]
    assert [answer.status_code for answer in answers] == [200] * 4, [answer.text for answer in answers]
    assert len({answer.json()["size"] for answer in answers}) == 1
    refused = await it.client.post(URL, json=SMALL | {"input_reference": {"image_url": {"url": 5}}})
    assert refused.json()["error"]["param"] == "input_reference"
