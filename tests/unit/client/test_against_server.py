"""The client and the server agree: every method against the real routes, without a network."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from kinema.client import AsyncClient, CompletedEvent, InvalidApiKey, NotFound, Video, VideoOptions
from kinema.engines.fake import FakeEngine
from kinema.ids import new_job_id
from kinema.request.bodies import VideoBody
from kinema.request.capabilities import LoraInfo
from kinema.server import schemas
from kinema.settings import ServerSettings
from tests.serving import Gate, Serving, serving
from tests.unit.server.test_generations import image_bytes

SMALL: VideoOptions = {"size": "64x64", "num_frames": 5, "num_inference_steps": 2}


def client_of(it: Serving, api_key: str | None = None) -> AsyncClient:
    return AsyncClient("http://test", api_key=api_key, transport=httpx.ASGITransport(it.app), backoff_s=0)


async def test_the_life_of_a_video(tmp_path: Path) -> None:
    """Created, waited for, followed, downloaded, remixed, listed and deleted."""
    async with serving() as it, client_of(it) as client:
        made = await client.create("a red circle", seed=7, **SMALL)
        ended = await client.wait(made)
        assert (ended.status, ended.seed, ended.num_frames) == ("completed", 7, 5)
        events = [event async for event in client.events(made)]
        assert [event.type for event in events[:2]] == ["queued", "started"]
        assert isinstance(events[-1], CompletedEvent)
        assert events[-1].video.id == made.id
        content = await client.download(made)
        assert (await client.download(made, tmp_path / "x.mp4")).read_bytes() == content
        assert b"".join([data async for data in client.live(made)]) == content
        manifest = await client.manifest(made)
        assert (manifest.request["seed"], manifest.video["size_bytes"]) == (7, len(content))
        remixed = await client.wait(await client.remix(made, "a blue square"))
        assert (remixed.remixed_from_video_id, remixed.seed) == (made.id, 7)
        assert [video.id async for video in client.list(page_size=1)] == [remixed.id, made.id]
        assert [(await client.wait(video)).status for video in await made_from(client, made)] == ["completed"] * 3
        assert (await client.star(made)).starred
        assert (await client.get(made)).expires_at is None
        assert not (await client.unstar(made)).starred
        await client.delete(made)
        with pytest.raises(NotFound):
            await client.get(made)


async def test_many_videos_are_looked_at_and_deleted_with_one_call() -> None:
    """In their order, each once; of one that is not there the answer says so. What was made counts on."""
    async with serving() as it, client_of(it) as client:
        first, second = [await client.wait(await client.create("a", **SMALL)) for _ in range(2)]
        gone = new_job_id()
        assert [video.id for video in await client.get_many([second, gone, first.id, second])] == [second.id, first.id]
        assert await client.delete_many([first, gone]) == {first.id: True, gone: False}
        assert [video.id async for video in client.list()] == [second.id]
        [day] = await client.usage()
        assert (day.key, day.videos, day.day) == (None, 2, datetime.fromtimestamp(second.completed_at, UTC).date())
        assert await client.usage(last=day.day - timedelta(days=1)) == []
        assert await client.get_many([]) == []


async def test_ids_go_a_hundred_at_a_time() -> None:
    """The server takes no more with one call."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params["ids"].split(","))
        return httpx.Response(200, json={"data": [{"id": one, "deleted": True} for one in asked[-1]]})

    ids = [new_job_id() for _ in range(250)]
    async with AsyncClient("http://test", transport=httpx.MockTransport(answer)) as client:
        assert await client.delete_many(ids) == dict.fromkeys(ids, True)
    assert asked == [ids[:100], ids[100:200], ids[200:]]


async def test_films_and_pictures_are_sent_in_each_form(tmp_path: Path) -> None:
    """A film of control by its id, as bytes or as a path, alone and in a list; pictures of single frames by number."""
    async with serving() as it, client_of(it) as client:
        source = await client.wait(await client.create("a", **SMALL))
        film, path = await client.download(source), tmp_path / "film.mp4"
        path.write_bytes(film)
        films: list[object] = [source, source.id, [source], film, path, [path]]
        controlled = [await client.create("a", control_video=one, seed=7, **SMALL) for one in films]  # type: ignore[arg-type]
        made = {await client.download(await client.wait(video)) for video in controlled}
        assert len({len(content) for content in made}) == 1
        pictured = await client.create(
            "a",
            reference_images=[image_bytes(), image_bytes()],
            conditioning={0: image_bytes(), 4: image_bytes()},
            **SMALL,
        )
        inputs = (await client.manifest(await client.wait(pictured))).inputs
        assert [file.role for file in inputs] == ["reference_images"] * 2 + ["conditioning"] * 2


async def test_loras_are_asked_for_by_name() -> None:
    """In JSON, and in the form that a picture makes of it; the answer and the manifest say which they were."""
    info = LoraInfo(name="paper", digest="a" * 64)
    async with serving(FakeEngine(loras=[info])) as it, client_of(it) as client:
        loras = [{"name": "paper", "scale": 0.5}]
        plain = await client.create("a", loras=loras, **SMALL)
        framed = await client.create("a", loras=loras, input_reference=image_bytes(), **SMALL)
        for video in (plain, framed):
            (use,) = (await client.wait(video)).loras
            assert (use.name, use.digest, use.scale, str(use)) == ("paper", "a" * 64, 0.5, "paper x 0.5")
            assert (await client.manifest(video)).request["loras"] == [{**loras[0], "digest": "a" * 64}]
        assert (await client.estimate("a", loras=["paper"], **SMALL)).loras[0].scale == 1.0
        assert (await client.wait(await client.remix(plain, "b"))).loras == plain.loras


async def made_from(client: AsyncClient, made: Video) -> tuple[Video, ...]:
    """A video of the server's and the same as a file, gone on with; and the file, edited."""
    film = await client.download(made)
    return (
        await client.extend(made, "it goes on", num_frames=5, num_inference_steps=2),
        await client.extend(film, "it goes on", num_frames=5, num_inference_steps=2),
        await client.edit(film, "a blue circle", strength=0.5, num_inference_steps=2),
    )


async def test_an_estimate_makes_nothing() -> None:
    """It says what would be made; once a video was timed, in how many seconds."""
    async with serving() as it, client_of(it) as client:
        told = await client.estimate("a red circle", **SMALL)
        assert (told.size, told.num_frames, told.predicted_s) == ("64x64", 5, None)
        await client.wait(await client.create("a red circle", **SMALL))
        assert (await client.estimate("a red circle", **SMALL)).predicted_s is not None
        assert len([video async for video in client.list()]) == 1


async def test_a_running_video_is_cancelled() -> None:
    """It reads as failed and says so."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it, client_of(it) as client:
        made = await client.create("a red circle", **SMALL)
        gate.is_open.set()
        cancelled = await client.cancel(made)
        assert cancelled.is_over


async def test_events_so_far_do_not_wait_for_the_video() -> None:
    """Of one that nobody makes yet."""
    async with serving(is_dispatching=False) as it, client_of(it) as client:
        made = await client.create("a red circle", **SMALL)
        async with asyncio.timeout(10):
            events = [event async for event in client.events(made, is_following=False)]
        assert [event.type for event in events] == ["queued"]


async def test_repeated_submissions_are_one_video() -> None:
    """By the key that the client sends."""
    async with serving() as it, client_of(it) as client:
        first = await client.create("a red circle", idempotency_key="once", **SMALL)
        again = await client.create("a red circle", idempotency_key="once", **SMALL)
        assert first.id == again.id


async def test_the_key_is_asked_for() -> None:
    """A server with keys refuses a client without."""
    async with serving(server=ServerSettings(api_keys=SecretStr("right"))) as it:
        async with client_of(it, "wrong") as client:
            with pytest.raises(InvalidApiKey):
                await client.create("a red circle")
        async with client_of(it, "right") as client:
            assert (await client.create("a red circle", **SMALL)).id


def test_the_client_knows_every_field() -> None:
    """Of what is sent and of what is answered."""
    sent = set(VideoOptions.__annotations__) - {"extra", "strength"}
    assert sent == set(VideoBody.model_fields) - {"prompt", "strength"}
    optional = {"created", "timings", "guidance_scale_2", "boundary_ratio", "strength"}
    assert set(schemas.Video.model_fields) - optional == set(Video.model_fields)
