"""Dynamo's own requests and answers, without Dynamo: what its frontend hands to a worker and what it gets."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from kinema.cluster import stock
from kinema.cluster.stock import StockVideos, read_request
from kinema.cluster.transport import Payload
from kinema.engines.base import Output
from kinema.engines.fake import FakeEngine
from kinema.errors import (
    EngineFailed,
    InvalidRequest,
    KinemaError,
    ModelNotFound,
    NoWorker,
    Overloaded,
    StorageUnavailable,
    UnsupportedRequest,
    WorkerLost,
)
from kinema.media.images import encode_png
from kinema.request.memory import Memory, Need
from kinema.request.options import GenerationOptions, LoraAsk
from kinema.request.request import GenerationRequest
from kinema.settings import WorkerSettings
from kinema.storage import TEMPORARY_NAME, Storage
from kinema.worker.worker import Worker
from tests.serving import Gate, decoders, until
from tests.unit.worker.tasks import PATIENCE_S, film_of, make_request

# What the frontend sends for the smallest video; `make_request` of the same values is what it becomes.
SMALL = {
    "model": "fake",
    "prompt": "a red circle",
    "size": "64x64",
    "nvext": {"num_frames": 9, "num_inference_steps": 3, "seed": 7},
}
RED = np.full((64, 64, 3), (200, 30, 30), np.uint8)
RED_URL = "data:image/png;base64," + base64.b64encode(encode_png(RED)).decode()
PUBLIC_URL = "http://files.example/videos"


@asynccontextmanager
async def running(
    storage: Storage, engine: FakeEngine | None = None, *, max_active: int = 1, max_waiting: int = 1
) -> AsyncIterator[tuple[StockVideos, Worker]]:
    worker = Worker(
        engine or FakeEngine(), storage, WorkerSettings(max_active=max_active, storage_patience_s=0), worker_id="w1"
    )
    await worker.start()
    try:
        yield StockVideos(worker, storage, max_waiting, decoders()), worker
    finally:
        await worker.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def storage(folder: Path) -> Storage:
    return Storage(f"file://{folder}")


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def collect(answers: AsyncGenerator[Payload, None]) -> list[Payload]:
    async with aclosing(answers):
        return [answer async for answer in answers]


async def ask(videos: StockVideos, **changes: object) -> Payload:
    """The one answer of a request that does not stream."""
    async with asyncio.timeout(PATIENCE_S):
        (answer,) = await collect(videos.videos(SMALL | changes))
    return answer


def film(answer: Payload) -> bytes:
    return base64.b64decode(answer["data"][0]["b64_json"], validate=True)


def test_every_field_is_read_wherever_the_frontend_puts_it() -> None:
    """Its own at the top, its extension's in nvext, and all that it does not know in extra_args."""
    payload = {
        "prompt": "a cat",
        "model": "fake",
        "input_reference": RED_URL,
        "seconds": 4,
        "size": "832x480",
        "user": "u",
        "response_format": "b64_json",
        "output_format": "mp4",
        "stream": False,
        "nvext": {"annotations": ["progress"], "fps": 16, "num_inference_steps": 20, "guidance_scale": 4.5, "seed": 5},
        "extra_args": {"media_passthrough": {"negative_prompt": "blur", "flow_shift": 3, "num_frames": "81"}},
    }
    body = read_request(payload, FakeEngine().capabilities)
    assert body.options() == GenerationOptions(
        prompt="a cat",
        negative_prompt="blur",
        size="832x480",
        seconds=4,
        num_frames=81,
        fps=16,
        num_inference_steps=20,
        guidance_scale=4.5,
        flow_shift=3,
        seed=5,
        output_format="mp4",
    )
    assert body.given().image == encode_png(RED)
    assert (body.is_base64, body.stream, body.user) == (True, False, "u")
    assert body.notes() == ("nvext.annotations was ignored: there are none here",)


def test_a_tier_and_loras_stand_beside_the_model() -> None:
    """The frontend passes them on; a model's name has none, since the frontend would not find it."""
    passed = {"tier": "draft", "loras": ["paper", {"name": "clay", "scale": 0.5}]}
    payload = {"prompt": "a cat", "model": "fake", "extra_args": {"media_passthrough": passed}}
    options = read_request(payload, FakeEngine().capabilities).options()
    assert options.tier == "draft"
    assert options.loras == (LoraAsk(name="paper"), LoraAsk(name="clay", scale=0.5))
    with pytest.raises(ModelNotFound):
        read_request(payload | {"model": "fake@draft"}, FakeEngine().capabilities)


def test_an_alias_is_read_as_its_model() -> None:
    """Whatever name the frontend passes on."""
    assert read_request({**SMALL, "model": "old"}, FakeEngine(aliases=["old"]).capabilities).model == "old"
    with pytest.raises(ModelNotFound):
        read_request({**SMALL, "model": "other"}, FakeEngine(aliases=["old"]).capabilities)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"extra_args": {"media_passthrough": {"num_frame": 81}}}, InvalidRequest, "did you mean num_frames?"),
        ({"extra_args": {"media_passthrough": {"extra_args": {"a": 1}}}}, InvalidRequest, "unknown field 'extra_args'"),
        ({"extra_args": {"media_passthrough": {"seed": 8}}}, InvalidRequest, "seed and nvext.seed differ"),
        ({"nvext": {"num_frames": -1}}, InvalidRequest, "num_frames must be a whole number from 1 to 257"),
        ({"size": "big"}, InvalidRequest, "size 'big' is not WIDTHxHEIGHT"),
        ({"prompt": " "}, InvalidRequest, "prompt must not be empty"),
        ({"output_format": "avi"}, UnsupportedRequest, "output_format 'avi' is not made; accepted: mp4, webm, gif"),
        ({"model": "other"}, ModelNotFound, "model 'other' is not served here; 'fake' is"),
        ({"response_format": "url"}, UnsupportedRequest, "send 'b64_json'"),
        (
            {"input_reference": "data:image/png;base64,AAAA"},
            InvalidRequest,
            "a PNG, JPEG, WebP, AVIF, GIF or HEIC image",
        ),
        *(
            ({"input_reference": text}, InvalidRequest, "nothing is fetched from other servers")
            for text in ("http://127.0.0.1/a.png", "https://host/a.png", "file:///etc/passwd", "s3://bucket/a.png", "?")
        ),
    ],
)
async def test_what_cannot_be_made_is_refused(
    storage: Storage, folder: Path, changes: dict[str, object], error: type[KinemaError], message: str
) -> None:
    """With the field and what would be accepted, and before anything is stored."""
    async with running(storage) as (videos, worker):
        with pytest.raises(error) as raised:
            await ask(videos, **changes)
        assert message in raised.value.message
        assert worker.free_slots == 1
    assert files(folder) == []


async def test_what_does_not_fit_into_the_device_is_refused(storage: Storage) -> None:
    """As by a frontend of ours, before a file is stored."""
    engine = FakeEngine()
    need = Need(base_bytes=0, bytes_per_unit=10**6)
    engine.memory = Memory(limit_bytes=10**8, residents={}, room_bytes=10**8, step=need, decode=need)
    async with running(storage, engine) as (videos, _):
        with pytest.raises(UnsupportedRequest, match="a size has at most 100 pixels here"):
            await ask(videos)


async def test_a_video_comes_as_base64_in_one_answer(storage: Storage, folder: Path) -> None:
    """The same bytes that anybody else gets of this request, in Dynamo's shape, and nothing stays behind."""
    async with running(storage) as (videos, _):
        answer = await ask(videos, response_format="b64_json")
    assert film(answer) == film_of(make_request())
    assert answer | {"id": "", "created": 0, "data": [], "inference_time_s": 0} == {
        "id": "",
        "object": "video",
        "model": "fake",
        "status": "completed",
        "progress": 100,
        "created": 0,
        "data": [],
        "inference_time_s": 0,
    }
    assert {**answer["data"][0], "b64_json": ""} == {"output_format": "mp4", "fps": 8, "b64_json": ""}
    assert files(folder) == []


async def test_a_video_comes_by_url_where_files_have_one(folder: Path) -> None:
    """The film stays at that URL, with a mark that it may be removed; its previews, which nobody asked for, do not."""
    storage = Storage(f"file://{folder}", PUBLIC_URL)
    async with running(storage) as (videos, _):
        answer = await ask(videos, response_format="url", input_reference=RED_URL)
    (data,) = answer["data"]
    assert set(data) == {"output_format", "fps", "url"}
    left, mark = sorted(files(folder))
    assert mark.name == TEMPORARY_NAME
    assert data["url"] == f"{PUBLIC_URL}/{left.relative_to(folder)}"
    with av.open(str(left)) as opened:
        assert sum(1 for _ in opened.decode(video=0)) == 9


@pytest.mark.parametrize(("public_url", "expected"), [(None, "b64_json"), (PUBLIC_URL, "url")])
async def test_unsaid_it_is_a_url_if_there_is_one(folder: Path, public_url: str | None, expected: str) -> None:
    """A plain request gets a video wherever the files are."""
    async with running(Storage(f"file://{folder}", public_url)) as (videos, _):
        (data,) = (await ask(videos))["data"]
    assert expected in data


async def test_an_image_is_the_first_frame(storage: Storage, folder: Path) -> None:
    """And is taken away with the rest."""
    async with running(storage) as (videos, _):
        answer = await ask(videos, input_reference=RED_URL)
    with av.open(io.BytesIO(film(answer))) as opened:
        first = next(opened.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(first.astype(int) - RED).mean() < 4
    assert files(folder) == []


async def test_a_last_frame_comes_among_what_the_frontend_does_not_know(storage: Storage, folder: Path) -> None:
    """It ends the video, and is taken away with the rest; what is no picture is refused by its own name."""
    blue = base64.b64encode(encode_png(255 - RED)).decode()
    async with running(storage) as (videos, _):
        passed = {"media_passthrough": {"last_frame": blue}}
        answer = await ask(videos, input_reference=RED_URL, extra_args=passed)
        with pytest.raises(InvalidRequest, match=r"^last_frame must be an image \(PNG, JPEG, WebP, AVIF, GIF, or HEIC"):
            await ask(videos, input_reference=RED_URL, extra_args={"media_passthrough": {"last_frame": "/a.png"}})
    with av.open(io.BytesIO(film(answer))) as opened:
        last = [*opened.decode(video=0)][-1].to_ndarray(format="rgb24")
    assert np.abs(last.astype(int) - (255 - RED)).mean() < 4
    assert files(folder) == []


async def test_a_stream_tells_of_its_progress(storage: Storage) -> None:
    """Each answer says something new, and the last one has the video."""
    async with running(storage) as (videos, _):
        answers = await collect(videos.videos(SMALL | {"stream": True}))
    states = [(answer["status"], answer["progress"]) for answer in answers]
    assert states == [
        ("queued", 0),
        *(("in_progress", percent) for percent in (0, 18, 36, 54, 69, 84, 99)),
        ("completed", 100),
    ]
    assert film(answers[-1]) == film_of(make_request())
    assert not any(answer["data"] for answer in answers[:-1])
    assert len({answer["id"] for answer in answers}) == 1


async def test_a_stream_says_nothing_twice(storage: Storage) -> None:
    """Of many steps, those that change the percentage are told."""
    async with running(storage) as (videos, _):
        answers = await collect(videos.videos(SMALL | {"stream": True, "nvext": {"num_inference_steps": 180}}))
    states = [(answer["status"], answer["progress"]) for answer in answers]
    assert len(states) == len(set(states)) > 90


async def test_a_failure_is_raised_or_ends_the_stream(storage: Storage, folder: Path) -> None:
    """A status is all that an error becomes; in a stream, which has its status already, the words get through."""
    async with running(storage) as (videos, worker):
        with pytest.raises(EngineFailed, match="the prompt asks for a failure"):
            await ask(videos, prompt="[fail]", input_reference=RED_URL)
        answers = await collect(videos.videos(SMALL | {"stream": True, "prompt": "[fail]"}))
        assert worker.free_slots == 1
    assert (answers[-1]["status"], answers[-1]["data"]) == ("failed", [])
    assert "the prompt asks for a failure" in answers[-1]["error"]
    assert files(folder) == []


async def test_storage_that_fails_is_said(tmp_path: Path) -> None:
    """As what it is, so that it becomes a 503."""
    (tmp_path / "videos").write_bytes(b"a file where a folder must be")
    async with running(Storage(f"file://{tmp_path}")) as (videos, _):
        with pytest.raises(StorageUnavailable):
            await ask(videos)


async def test_a_film_that_is_too_large_for_an_answer_is_refused(
    storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to ask for instead."""
    monkeypatch.setattr(stock, "MAX_INLINE_BYTES", 100)
    async with running(storage) as (videos, _):
        with pytest.raises(UnsupportedRequest, match="bytes and b64_json takes 100; ask for response_format 'url'"):
            await ask(videos)
    assert files(folder) == []


async def test_a_few_wait_for_their_turn_and_no_more(storage: Storage) -> None:
    """In the order that they came; who is left over is told to come later."""
    order: list[str] = []
    gate = Gate()

    def on_output(request: GenerationRequest, output: Output) -> None:
        if request.prompt not in order:
            order.append(request.prompt)
        gate(request, output)

    async with running(storage, FakeEngine(on_output=on_output), max_waiting=2) as (videos, worker):
        made = []
        for number, prompt in enumerate(["first", "second", "third"]):
            made.append(asyncio.create_task(ask(videos, prompt=prompt)))
            await until(lambda: worker.free_slots == 0 and videos._num_waiting == number)  # noqa: B023
        with pytest.raises(Overloaded, match="2 videos wait"):
            await ask(videos)
        gate.is_open.set()
        await asyncio.gather(*made)
    assert order == ["first", "second", "third"]


async def test_who_leaves_makes_room(storage: Storage, folder: Path) -> None:
    """A running generation is cancelled, and a place in the line is free again."""
    gate = Gate()
    engine = FakeEngine(on_output=gate)
    async with running(storage, engine) as (videos, worker):
        running_one = asyncio.create_task(ask(videos, input_reference=RED_URL))
        await until(gate.has_arrived.is_set)
        waiting = asyncio.create_task(ask(videos))
        await until(lambda: videos._num_waiting == 1)
        waiting.cancel()
        await until(lambda: videos._num_waiting == 0)
        running_one.cancel()
        gate.is_open.set()
        ended = await asyncio.gather(running_one, waiting, return_exceptions=True)
        assert [type(error) for error in ended] == [asyncio.CancelledError, asyncio.CancelledError]
        assert (worker.free_slots, engine.num_running) == (1, 0)
        assert (await ask(videos))["status"] == "completed"
    assert files(folder) == []


async def test_closing_a_stream_cancels_its_generation(storage: Storage, folder: Path) -> None:
    """As the transport does when the client has gone."""
    engine = FakeEngine(step_s=0.01)
    async with running(storage, engine) as (videos, worker):
        async with aclosing(videos.videos(SMALL | {"stream": True, "nvext": {"num_inference_steps": 200}})) as answers:
            async for answer in answers:
                if answer["progress"]:
                    break
        assert (worker.free_slots, engine.num_running) == (1, 0)
    assert files(folder) == []


async def test_a_worker_that_stops_gives_up_both_who_runs_and_who_waits(storage: Storage) -> None:
    """Each with an error that says that another worker may do it."""
    gate = Gate()
    async with running(storage, FakeEngine(on_output=gate)) as (videos, worker):
        asked: list[asyncio.Task[Any]] = [asyncio.create_task(ask(videos))]
        await until(gate.has_arrived.is_set)
        asked.append(asyncio.create_task(ask(videos)))
        await until(lambda: videos._num_waiting == 1)
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: not worker.is_ready)
        gate.is_open.set()
        ended = await asyncio.gather(*asked, return_exceptions=True)
        await stopping
    assert [type(error) for error in ended] == [WorkerLost, NoWorker]
