"""``/v1/videos``: create, look, list, cancel, delete, remix, follow."""

from __future__ import annotations

import asyncio
import base64
import errno
import time
from typing import Any

import httpx
import pytest

from kinema.engines.fake import FakeEngine
from kinema.events import Artifact, Completed, Started, Timings
from kinema.ids import new_job_id
from kinema.jobs.store import QueueLimits
from kinema.media.film import open_film
from kinema.settings import JobSettings, ServerSettings
from tests.integration.test_film import FRAMES, film_of
from tests.serving import REQUEST, SMALL, Gate, Serving, make_job, serving, until
from tests.unit.server.test_generations import as_form, image_bytes, sse

URL = "/v1/videos"
OPENAI_FIELDS = {
    "id", "object", "created_at", "status", "model", "progress", "seconds", "size", "prompt", "completed_at",
    "expires_at", "error", "remixed_from_video_id",
}  # fmt: skip
# What differs between two videos of the same request.
OWN = ("id", "created", "created_at", "completed_at", "inference_time_s", "timings", "data", "expires_at")


async def create(it: Serving, **fields: object) -> dict[str, Any]:
    answer = await it.client.post(URL, json=SMALL | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


async def finished(it: Serving, video: dict[str, Any]) -> dict[str, Any]:
    await it.service.wait(video["id"])
    return (await it.client.get(f"{URL}/{video['id']}")).json()  # type: ignore[no-any-return]


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    return answer.json()["error"]  # type: ignore[no-any-return]


async def test_a_video_is_accepted_at_once_and_made_later(it: Serving) -> None:
    """All of OpenAI's fields are there, at the start and at the end; the link opens."""
    video = await create(it, seed=5)
    assert (video["status"], video["progress"], video["seed"]) == ("queued", 0, 5)
    assert video.keys() >= OPENAI_FIELDS
    done = await finished(it, video)
    assert (done["status"], done["progress"], done["id"]) == ("completed", 100, video["id"])
    assert done.keys() >= OPENAI_FIELDS
    film = await it.client.get(done["data"][0]["url"])
    assert (film.status_code, film.headers["content-type"]) == (200, "video/mp4")


async def test_all_encodings_make_the_same_video(it: Serving) -> None:
    """JSON, multipart, an envelope as some clients send it, and a base URL without /v1."""
    fields = SMALL | {"seed": 9, "guidance_scale": 3.0, "negative_prompt": "123"}
    answers = [
        await it.client.post(URL, json=fields),
        await it.client.post(URL, files=as_form(fields)),
        await it.client.post(URL, files=as_form({"prompt": fields["prompt"], "extra_body": "{}"} | fields)),
        await it.client.post(URL, json={"prompt": "x", "extra_params": fields}),
        await it.client.post("/videos", json=fields),
    ]
    videos = [await finished(it, answer.json()) for answer in answers]
    for video in videos:
        for name in OWN:
            del video[name]
    assert all(video == videos[0] for video in videos)


async def test_an_answer_says_how_soon_to_ask_again(it: Serving) -> None:
    """As whole milliseconds; anything else breaks the SDK's loop."""
    video = await create(it)
    answer = await it.client.get(f"{URL}/{video['id']}")
    assert 250 <= int(answer.headers["openai-poll-after-ms"]) <= 5000


async def test_lists_go_by_age_and_survive_deletions() -> None:
    """Newest first unless asked otherwise; the id of a deleted video is still a place in the list."""
    async with serving(is_dispatching=False) as it:
        empty = (await it.client.get(URL)).json()
        assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        ids = []
        for _ in range(5):
            ids.append((await create(it))["id"])
            made_at = time.time()
            await until(lambda made_at=made_at: time.time() > made_at + 0.001)  # ids are in the order of milliseconds
        page = (await it.client.get(URL, params={"limit": 2})).json()
        assert [video["id"] for video in page["data"]] == ids[:2:-1]
        assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[4], ids[3], True)
        assert (await it.client.delete(f"{URL}/{ids[3]}")).json() == {
            "id": ids[3],
            "object": "video.deleted",
            "deleted": True,
        }
        rest = (await it.client.get(URL, params={"after": ids[3]})).json()
        assert ([video["id"] for video in rest["data"]], rest["has_more"]) == (ids[2::-1], False)
        oldest = (await it.client.get(URL, params={"order": "asc", "limit": 3})).json()
        assert [video["id"] for video in oldest["data"]] == ids[:3]
        assert (await it.client.get(URL, params={"limit": 0})).json()["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"after": "nobody"}, "after"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"order": "up"}, "order"),
    ],
)
async def test_bad_pages_are_refused(it: Serving, query: dict[str, str], param: str) -> None:
    """400 with the parameter's name."""
    assert error(await it.client.get(URL, params=query), 400)["param"] == param


async def test_a_deleted_video_is_gone(it: Serving) -> None:
    """By every call; so is its file."""
    video = await finished(it, await create(it))
    content = video["data"][0]["url"]
    assert (await it.client.delete(f"{URL}/{video['id']}")).status_code == 200
    error(await it.client.get(f"{URL}/{video['id']}"), 404)
    error(await it.client.get(content), 404)
    error(await it.client.delete(f"{URL}/{video['id']}"), 404)


async def test_a_running_video_can_be_deleted() -> None:
    """Its generation stops, its slot is free, and the next one is made."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it:
        video = await create(it)
        assert await asyncio.to_thread(gate.has_arrived.wait, 20)
        assert (await it.client.delete(f"{URL}/{video['id']}")).status_code == 200
        gate.is_open.set()
        await until(lambda: not it.dispatcher._runs)
        assert it.engine.num_running == 0
        assert (await finished(it, await create(it)))["status"] == "completed"


async def test_a_cancelled_video_reads_as_failed() -> None:
    """OpenAI's clients know no other word; the code says what happened, and the events say cancelled."""
    async with serving(is_dispatching=False) as it:
        video = await create(it)
        cancelled = (await it.client.post(f"{URL}/{video['id']}/cancel")).json()
        assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
        again = (await it.client.post(f"{URL}/{video['id']}/cancel")).json()
        assert again == cancelled
        events = sse((await it.client.get(f"{URL}/{video['id']}/events")).text)
        assert [name for _, name, _ in events] == ["queued", "cancelled"]


async def test_events_can_be_read_again_from_any_place(it: Serving) -> None:
    """All of them after the end, and those after Last-Event-ID."""
    video = await finished(it, await create(it))
    whole = sse((await it.client.get(f"{URL}/{video['id']}/events")).text)
    assert [name for _, name, _ in whole][:2] == ["queued", "started"]
    assert [int(seq) for seq, _, _ in whole] == list(range(1, len(whole) + 1))
    assert whole[-1][1:] == ("completed", video)
    for seen in (1, 2, len(whole) - 1):
        rest = await it.client.get(f"{URL}/{video['id']}/events", headers={"last-event-id": str(seen)})
        assert sse(rest.text) == whole[seen:]
    foreign = await it.client.get(f"{URL}/{video['id']}/events", headers={"last-event-id": "evt_1"})
    assert sse(foreign.text) == whole


@pytest.mark.parametrize("is_form", [False, True])
async def test_previews_come_to_who_asks_for_them(it: Serving, is_form: bool) -> None:
    """In the events, in both encodings; the newest one is a file, too, and the video says what was asked for."""
    fields = SMALL | {"preview_every": 1}
    sent = {"files": as_form(fields)} if is_form else {"json": fields}
    video = (await it.client.post(URL, **sent)).json()
    assert video["preview_every"] == 1
    events = sse((await it.client.get(f"{URL}/{video['id']}/events")).text)
    shown = [data for _, name, data in events if name == "preview"]
    assert (shown[-1]["step"], shown[-1]["total"], shown[-1]["object"]) == (2, 2, "video.event")
    jpeg = base64.b64decode(shown[-1]["b64_jpeg"])
    assert jpeg.startswith(b"\xff\xd8")
    kept = await it.client.get(f"{URL}/{video['id']}/content", params={"variant": "preview"})
    assert (kept.status_code, kept.content, kept.headers["content-type"]) == (200, jpeg, "image/jpeg")


async def test_previews_that_nobody_asked_for_are_not_there(it: Serving) -> None:
    """404 and how to ask for them; a number that is none is refused."""
    video = (await it.client.post(URL, json=SMALL)).json()
    assert "preview_every" not in video
    answer = await it.client.get(f"{URL}/{video['id']}/content", params={"variant": "preview"})
    assert error(answer, 404)["message"] == "there is no preview; preview_every asks for them"
    for wrong in (0, -1, 10**9, "often"):
        answer = await it.client.post(URL, json=SMALL | {"preview_every": wrong})
        assert error(answer, 400)["param"] == "preview_every"


async def test_events_so_far_end_though_the_video_is_not_made() -> None:
    """With follow=false; of a finished video they are all of them, and another word is refused."""
    async with serving(is_dispatching=False) as it:
        path = f"{URL}/{(await create(it))['id']}/events"
        assert [name for _, name, _ in sse((await it.client.get(f"{path}?follow=false")).text)] == ["queued"]
        seen = {"last-event-id": "1"}
        assert sse((await it.client.get(f"{path}?follow=0", headers=seen)).text) == []
        await it.client.post(path.replace("events", "cancel"))
        for query in ("", "?follow=true", "?follow=false"):
            events = sse((await it.client.get(path + query)).text)
            assert [name for _, name, _ in events] == ["queued", "cancelled"]
        assert error(await it.client.get(f"{path}?follow=maybe"), 400)["param"] == "follow"


@pytest.mark.parametrize(
    ("film", "says"),
    [
        ("http://example.com/a.mp4", "not fetched"),
        ("HTTPS://example.com/a.mp4", "not fetched"),
        ({"id": "https://example.com/a.mp4"}, "not fetched"),
        ("data:video/mp4;base64,AAAA", "must be a film"),
    ],
)
async def test_a_film_that_is_elsewhere_is_refused(it: Serving, film: object, says: str) -> None:
    """It is no video that was not found: the sentence says what is accepted."""
    refused = error(await it.client.post(f"{URL}/extensions", json={"prompt": "on", "video": film}), 400)
    assert (refused["param"], says in refused["message"]) == ("video", True)
    assert "multipart/form-data" in refused["message"]


async def test_a_remix_changes_the_prompt_alone(it: Serving) -> None:
    """Seed, sizes and the given first frame are as before; what is sent goes."""
    picture = ("first.png", image_bytes(), "image/png")
    first = await finished(
        it, (await it.client.post(URL, files=as_form(SMALL | {"seed": 11}) | {"input_reference": picture})).json()
    )
    answer = await it.client.post(f"{URL}/{first['id']}/remix", json={"prompt": "a blue one", "guidance_scale": 2.0})
    remixed = await finished(it, answer.json())
    assert remixed["remixed_from_video_id"] == first["id"]
    changed = {name for name in first if first[name] != remixed[name]} - set(OWN)
    assert changed == {"prompt", "guidance_scale", "remixed_from_video_id"}
    job = await it.service.get(remixed["id"])
    assert job.request.image_key is not None
    assert job.request.image_key == (await it.service.get(first["id"])).request.image_key
    error(await it.client.post(f"{URL}/video_{0:032x}/remix", json={"prompt": "x"}), 404)
    error(await it.client.post(f"{URL}/{first['id']}/remix", json={}), 400)


async def test_the_same_idempotency_key_is_the_same_video(it: Serving) -> None:
    """In any encoding; with another body it is refused, and never with a status that SDKs repeat."""
    headers = {"idempotency-key": "k1"}
    first = await it.client.post(URL, json=SMALL, headers=headers)
    again = await it.client.post(URL, json=SMALL, headers=headers)
    assert first.json()["id"] == again.json()["id"]
    as_text = await it.client.post(URL, files=as_form(SMALL), headers=headers)
    assert as_text.json()["id"] == first.json()["id"]
    other = error(await it.client.post(URL, json=SMALL | {"seed": 1}, headers=headers), 400)
    assert "another body" in other["message"]
    at_once = await asyncio.gather(
        *(it.client.post(URL, json=SMALL, headers={"idempotency-key": "k2"}) for _ in range(5))
    )
    assert len({answer.json()["id"] for answer in at_once}) == 1
    synchronous = [
        await it.client.post(f"{URL}/generations", json=SMALL, headers={"idempotency-key": "k3"}) for _ in range(2)
    ]
    assert len({answer.json()["id"] for answer in synchronous}) == 1


async def test_an_idempotency_key_is_kept_whole_or_refused(it: Serving) -> None:
    """255 characters are a key; two longer ones that begin alike are not taken for one, and neither are two headers."""
    longest, other = "k" * 255, "k" * 254 + "l"
    ids = [
        (await it.client.post(URL, json=SMALL, headers={"idempotency-key": key})).json()["id"]
        for key in (longest, other, longest)
    ]
    assert ids[0] == ids[2] != ids[1]
    too_long = await it.client.post(URL, json=SMALL, headers={"idempotency-key": longest + "x"})
    assert "at most 255 characters" in error(too_long, 400)["message"]
    two = await it.client.post(URL, json=SMALL, headers=[("idempotency-key", "a"), ("idempotency-key", "b")])
    assert "more than once" in error(two, 400)["message"]


@pytest.mark.parametrize("count", ["\u00b2", "\u00b9", "-1", "+1", "1.0", "0", "00", "", "x", " "])
async def test_a_count_of_tries_that_is_none_is_a_first_try(it: Serving, count: str) -> None:
    """What is no whole number above zero says nothing; each such submission is a video of its own."""
    headers = {"x-stainless-retry-count": count.encode("latin-1")}
    ids = [(await it.client.post(URL, json=SMALL, headers=headers)).json()["id"] for _ in range(2)]  # type: ignore[arg-type]
    assert ids[0] != ids[1]


@pytest.mark.parametrize("count", ["1", "01", "9" * 5000])
async def test_any_count_of_tries_is_a_repeated_try(it: Serving, count: str) -> None:
    """However large it is."""
    first = (await it.client.post(URL, json=SMALL)).json()["id"]
    again = await it.client.post(URL, json=SMALL, headers={"x-stainless-retry-count": count})
    assert again.json()["id"] == first


async def test_a_repeated_try_is_the_same_video(it: Serving) -> None:
    """The SDK counts its tries; two first tries are two videos."""
    first = (await it.client.post(URL, json=SMALL)).json()["id"]
    second = (await it.client.post(URL, json=SMALL)).json()["id"]
    assert first != second
    retry = {"x-stainless-retry-count": "1"}
    assert (await it.client.post(URL, json=SMALL, headers=retry)).json()["id"] == second
    other = (await it.client.post(URL, json=SMALL | {"seed": 3}, headers=retry)).json()["id"]
    assert other not in (first, second)
    await it.client.post(f"{URL}/{other}/cancel")
    await it.service.wait(other)


async def test_a_try_after_a_cancelled_one_is_made_anew() -> None:
    """A client that timed out has cancelled its first try; the second must not be answered with that."""
    async with serving(is_dispatching=False) as it:
        first = (await create(it))["id"]
        await it.client.post(f"{URL}/{first}/cancel")
        answer = await it.client.post(URL, json=SMALL, headers={"x-stainless-retry-count": "1"})
        assert answer.json()["id"] != first


async def test_each_key_sees_its_own_videos() -> None:
    """Another key's video is not there; no key, or an unknown one, is 401; probes ask for none."""
    settings = ServerSettings(api_keys="alpha, beta")
    async with serving(server=settings) as it:
        alpha, beta = {"authorization": "Bearer alpha"}, {"api-key": "beta"}
        video = (await it.client.post(URL, json=SMALL, headers=alpha)).json()
        await it.service.wait(video["id"])
        own = f"{URL}/{video['id']}"
        assert (await it.client.get(own, headers=alpha)).status_code == 200
        for method, path in [("GET", own), ("DELETE", own), ("POST", f"{own}/cancel"), ("GET", f"{own}/content"),
                             ("GET", f"{own}/events")]:  # fmt: skip
            error(await it.client.request(method, path, headers=beta), 404)
            assert error(await it.client.request(method, path), 401)["code"] == "invalid_api_key"
        error(await it.client.post(f"{own}/remix", json={"prompt": "x"}, headers=beta), 404)
        assert (await it.client.get(URL, headers=beta)).json()["data"] == []
        error(await it.client.get("/v1/models", headers={"authorization": "Bearer gamma"}), 401)
        assert (await it.client.get("/ready")).status_code == 200


async def test_a_link_opens_without_a_key() -> None:
    """For its own video alone."""
    async with serving(server=ServerSettings(api_keys="alpha")) as it:
        headers = {"authorization": "Bearer alpha"}
        urls = []
        for _ in range(2):
            video = (await it.client.post(f"{URL}/generations", json=SMALL, headers=headers)).json()
            urls.append(video["data"][0]["url"])
        assert (await it.client.get(urls[0])).headers["content-type"] == "video/mp4"
        signature = urls[1].partition("?")[2]
        error(await it.client.get(f"{urls[0].partition('?')[0]}?{signature}"), 401)
        error(await it.client.get(f"{URL}/video_{0:032x}/content?{signature}"), 401)


async def test_limits_per_key() -> None:
    """One key's full queue does not refuse another's video."""
    keys, limits = ServerSettings(api_keys="alpha,beta"), JobSettings(max_queued_per_key=1)
    async with serving(server=keys, jobs=limits, is_dispatching=False) as it:
        alpha, beta = ({"authorization": f"Bearer {key}"} for key in ("alpha", "beta"))
        assert (await it.client.post(URL, json=SMALL, headers=alpha)).status_code == 200
        refused = await it.client.post(URL, json=SMALL, headers=alpha)
        assert error(refused, 429)["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert (await it.client.post(URL, json=SMALL, headers=beta)).status_code == 200


async def test_each_key_has_its_share_of_the_queue_by_default() -> None:
    """One of two keys fills half of it, and hears whose videos are too many; the other half is the other key's."""
    async with serving(
        server=ServerSettings(api_keys="alpha,beta"), jobs=JobSettings(max_queued=4), is_dispatching=False
    ) as it:
        for key in ("alpha", "beta"):
            headers = {"authorization": f"Bearer {key}"}
            answers = [await it.client.post(URL, json=SMALL, headers=headers) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200, 200, 429]
            whose = {"alpha": "2 videos of this key", "beta": "4 videos"}[key]
            assert error(answers[2], 429)["message"].startswith(f"{whose} wait already")


async def test_an_estimate_is_that_of_the_key() -> None:
    """A key with nothing in the queue waits less than the one that fills it."""
    async with serving(server=ServerSettings(api_keys="alpha,beta"), is_dispatching=False) as it:
        alpha, beta = ({"authorization": f"Bearer {key}"} for key in ("alpha", "beta"))
        await it.client.post(URL, json=SMALL, headers=alpha)
        job = await it.store.claim(["fake"], "one", 60)
        assert job is not None
        film = Artifact(key="k", media_type="video/mp4", size_bytes=3, etag="e")
        await it.store.record(
            job.id, Started(worker_id="w", attempt=1), Completed(artifact=film, timings=Timings(device_s=10.0))
        )
        for _ in range(8):
            await it.client.post(URL, json=SMALL, headers=alpha)
        told = [(await it.client.post(f"{URL}/estimate", json=SMALL, headers=key)).json() for key in (alpha, beta)]
        assert told[0]["predicted_s"] > 5 * 10 > told[1]["predicted_s"] > 0


async def test_the_queue_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waiting video's place, and after a first one was timed, when it will be done."""
    monkeypatch.setattr("kinema.service.queue._FRESH_S", 0.0)
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it:
        gate.is_open.set()
        await finished(it, await create(it))
        gate.is_open.clear()
        gate.has_arrived.clear()
        running = [await create(it) for _ in range(2)]
        await until(lambda: len(it.dispatcher._runs) == 2)
        waiting = [await create(it) for _ in range(3)]
        seen = [(await it.client.get(f"{URL}/{video['id']}")).json() for video in running + waiting]
        assert [video["queue_position"] for video in seen] == [None, None, 1, 2, 3]
        etas = [video["eta_s"] for video in seen]
        assert all(eta is not None for eta in etas)
        assert etas[2:] == sorted(etas[2:])
        gate.is_open.set()
        for video in running + waiting:
            await finished(it, video)


async def test_a_new_video_is_told_its_place_at_once() -> None:
    """Also when the queue was looked at a moment ago."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it:
        gate.is_open.set()
        await finished(it, await create(it))
        gate.is_open.clear()
        running = [await create(it) for _ in range(2)]
        await until(lambda: len(it.dispatcher._runs) == 2)
        waiting = [await create(it) for _ in range(2)]
        assert [video["queue_position"] for video in waiting] == [1, 2]
        assert all(video["eta_s"] is not None for video in waiting)
        assert (await create(it, priority="high"))["queue_position"] == 1
        gate.is_open.set()
        for video in running + waiting:
            await finished(it, video)


async def made_in(it: Serving, device_s: float, num_frames: int = REQUEST.num_frames) -> None:
    """A small video that took so long of a device."""
    request = REQUEST.model_copy(update={"num_frames": num_frames})
    await it.store.create(make_job(request=request), limits=QueueLimits())
    job = await it.store.claim(["fake"], "another", 10)
    assert job is not None
    made = Artifact(key="k", media_type="video/mp4", size_bytes=3, etag="e")
    done = Completed(artifact=made, timings=Timings(device_s=device_s))
    await it.store.record(job.id, Started(worker_id="w", attempt=1), done)


async def test_a_video_that_finds_nobody_is_told_of_those_who_will_overtake_it() -> None:
    """Of a quarter of an hour 18 shorter ones took a fifth: so long as there is a place for others, four are left."""
    long = {"num_inference_steps": 100}
    async with serving(is_dispatching=False) as it:
        for _ in range(18):
            await made_in(it, 10.0)
        foretold = (await it.client.post(f"{URL}/estimate", json={**SMALL, **long})).json()
        created = await create(it, **long)
    assert foretold["gpu_s"] > 10
    assert foretold["predicted_s"] == pytest.approx(foretold["gpu_s"] / 0.8, rel=0.02)
    assert created["eta_s"] == pytest.approx(foretold["predicted_s"], rel=0.01)


async def test_an_estimate_says_what_waiting_costs() -> None:
    """Alone a video waits for nobody; behind others it waits for them, and with a high priority it does not."""
    times = {}
    async with serving(is_dispatching=False) as it:
        await made_in(it, 10.0, num_frames=9)
        body = {**SMALL, "num_frames": 7}
        alone = (await it.client.post(f"{URL}/estimate", json=body)).json()
        for _ in range(3):
            await create(it, num_frames=9)
        it.service._queue._read_at = float("-inf")
        for priority in ("low", "normal", "high"):
            answer = await it.client.post(f"{URL}/estimate", json={**body, "priority": priority})
            times[priority] = answer.json()["queue_wait_s"]
    assert alone["warnings"] == ["num_frames 7 -> 9: must be a multiple of 4 plus 1"]
    assert (alone["object"], alone["num_frames"], alone["queue_wait_s"]) == ("video.estimate", 9, 0.0)
    assert alone["gpu_s"] == alone["predicted_s"] == 10.0
    assert "id" not in alone
    assert (times["high"], times["normal"]) == (0.0, 30.0)
    # Of a low priority it is overtaken by as many as came lately, too.
    assert 30.0 < times["low"] < 31.0


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"priority": "urgent"}, "priority"), ({"deadline_s": "-1"}, "deadline_s"), ({"promt": "a"}, "promt")],
)
async def test_an_estimate_refuses_what_would_be_refused(it: Serving, fields: dict[str, str], param: str) -> None:
    """As the video itself, in both encodings."""
    for sent in ({"json": SMALL | fields}, {"files": as_form(SMALL | fields)}):
        assert error(await it.client.post(f"{URL}/estimate", **sent), 400)["param"] == param
        assert error(await it.client.post(URL, **sent), 400)["param"] == param


async def test_a_remix_is_not_as_urgent_as_its_first() -> None:
    """How soon a video is wanted is said anew."""
    async with serving() as it:
        first = await finished(it, await create(it, priority="high", deadline_s=60))
        assert (first["priority"], first["deadline_s"]) == ("high", 60.0)
        answer = await it.client.post(f"{URL}/{first['id']}/remix", json={"prompt": "a blue square"})
        assert answer.json()["priority"] == "normal"
        assert "deadline_s" not in answer.json()


@pytest.mark.parametrize(("method", "path"), [("POST", f"{URL}/characters"), ("GET", f"{URL}/characters/char_1")])
async def test_characters_are_unsupported(it: Serving, method: str, path: str) -> None:
    """A 400, which the SDK does not repeat as it would a 501."""
    assert error(await it.client.request(method, path), 400)["code"] == "unsupported"


async def test_an_extension_is_the_whole_film(it: Serving) -> None:
    """In the size and rate of the first, whether that is named or sent; the frame between them is there once."""
    first = await finished(it, await create(it, fps=10))
    film = (await it.client.get(first["data"][0]["url"])).content
    new = {"prompt": "it goes on", "num_frames": 9}
    named = new | {"video": {"id": first["id"]}}
    sent = as_form(new) | {"video": ("film.mp4", film, "video/mp4")}
    answers = [
        await it.client.post(f"{URL}/extensions", json=named),
        await it.client.post(f"{URL}/extensions", files=as_form({**named, "video": f'{{"id": "{first["id"]}"}}'})),
        await it.client.post(f"{URL}/extensions", files=as_form(new | {"video[id]": first["id"]})),
        await it.client.post(f"{URL}/extensions", files=sent),
    ]
    for answer in answers:
        video = await finished(it, answer.json())
        assert (video["status"], video["size"], video["fps"], video["num_frames"]) == ("completed", "64x64", 10, 9)
        assert video["seconds"] == "1.3"  # 5 + 9 - 1 frames at 10 a second
        stored = (await it.client.get(video["data"][0]["url"])).content
        assert open_film(stored).shape.num_frames == 13


async def test_what_a_film_says_and_what_is_left_out_comes_as_warnings(it: Serving) -> None:
    """A frame that is held; and an extension by the frame that is there already is refused."""
    film = film_of(FRAMES[:5], kind="mp4", times_ms=[0, 1000, 1100, 1200, 1300])
    fields = as_form({"prompt": "on", "num_frames": 5})
    answer = await it.client.post(f"{URL}/extensions", files=fields | {"video": ("a.mp4", film, "video/mp4")})
    assert answer.status_code == 200, answer.text
    assert "the video has 5 frames in 1.4 s; at 10 fps they become 14: some are repeated" in answer.json()["warnings"]
    fields = as_form({"prompt": "on", "num_frames": 1})
    answer = await it.client.post(f"{URL}/extensions", files=fields | {"video": ("a.mp4", film, "video/mp4")})
    assert error(answer, 400)["param"] == "num_frames"


async def test_an_extension_can_be_remixed_after_its_source_is_gone(it: Serving) -> None:
    """Each job has its own copy of what it was given."""
    first = await finished(it, await create(it))
    longer = await finished(
        it,
        (
            await it.client.post(
                f"{URL}/extensions", json={"prompt": "on", "num_frames": 5, "video": {"id": first["id"]}}
            )
        ).json(),
    )
    assert (await it.client.delete(f"{URL}/{first['id']}")).status_code == 200
    again = await it.client.post(f"{URL}/{longer['id']}/remix", json={"prompt": "on, but blue"})
    remixed = await finished(it, again.json())
    assert (remixed["status"], remixed["seconds"]) == ("completed", longer["seconds"])


@pytest.mark.parametrize(
    ("video", "status"),
    [(None, 400), (5, 400), ({"id": 5}, 400), ({"url": "http://x"}, 400), ({"id": "nobody"}, 404), ("", 404)],
)
async def test_bad_films_are_refused(it: Serving, video: object, status: int) -> None:
    """With a sentence that says what would be accepted."""
    body = {"prompt": "it goes on"} | ({} if video is None else {"video": video})
    error(await it.client.post(f"{URL}/extensions", json=body), status)


async def test_a_file_that_is_no_film_is_refused(it: Serving) -> None:
    """And nothing is left of it."""
    fields = as_form({"prompt": "it goes on"})
    for junk in (b"", b"not a film", image_bytes()):
        answer = await it.client.post(f"{URL}/extensions", files=fields | {"video": ("a.mp4", junk, "video/mp4")})
        assert error(answer, 400)["param"] == "video"


async def test_without_a_process_to_decode_it_a_picture_may_be_sent_again(
    it: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system has no process or descriptor left: that is no fault of the picture."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    picture = {"input_reference": base64.b64encode(image_bytes()).decode()}
    with monkeypatch.context() as full:
        full.setattr("socket.socketpair", refuse)
        answer = await it.client.post(URL, json=SMALL | picture)
    assert error(answer, 503)["code"] == "decoder_unavailable"
    assert (await it.client.post(URL, json=SMALL | picture)).status_code == 200


async def test_an_unfinished_video_cannot_be_extended() -> None:
    """A 404 that says so, as its content is."""
    async with serving(is_dispatching=False) as it:
        video = await create(it)
        answer = await it.client.post(f"{URL}/extensions", json={"prompt": "on", "video": {"id": video["id"]}})
        assert error(answer, 404)["code"] == "not_finished"


async def test_an_edit_makes_a_film_anew(it: Serving) -> None:
    """In its size, rate and length, whether it is named or sent; a remix of it edits the same film."""
    first = await finished(it, await create(it, fps=10))
    film = (await it.client.get(first["data"][0]["url"])).content
    asked = {"prompt": "a blue one", "strength": 0.5, "num_inference_steps": 4}
    asked_plain = {"prompt": "and on", "num_frames": 2}
    answers = [
        await it.client.post(f"{URL}/edits", json=asked | {"video": {"id": first["id"]}}),
        await it.client.post(f"{URL}/edits", files=as_form(asked) | {"video": ("film.mp4", film, "video/mp4")}),
    ]
    edited = [await finished(it, answer.json()) for answer in answers]
    remix = await it.client.post(f"{URL}/{edited[0]['id']}/remix", json={"prompt": "a green one"})
    for video in (*edited, await finished(it, remix.json())):
        assert (video["status"], video["size"], video["fps"], video["num_frames"]) == ("completed", "64x64", 10, 5)
        assert video["strength"] == 0.5
    cut = await it.client.post(f"{URL}/edits", json=asked | {"num_frames": 1, "video": {"id": first["id"]}})
    assert cut.json()["warnings"] == ["the video has 5 frames at 10 fps, of which the first 1 are edited"]
    alone = await it.client.post(f"{URL}/extensions", json=asked_plain | {"video": {"id": first["id"]}})
    assert "adds nothing" in error(alone, 400)["message"]
    refused = await it.client.post(f"{URL}/edits", json=asked | {"strength": 2, "video": {"id": first["id"]}})
    assert error(refused, 400)["param"] == "strength"


async def test_a_key_has_a_number_of_event_streams() -> None:
    """One more is refused in a sentence, and no video is begun for it; a stream that ends makes room."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate), server=ServerSettings(max_streams_per_key=1)) as it:
        video = await create(it)
        open_stream = asyncio.create_task(it.client.get(f"{URL}/{video['id']}/events"))
        await until(lambda: it.app.state.api.feeds._num_streams[""] == 1)
        for refused in (
            await it.client.get(f"{URL}/{video['id']}/events"),
            await it.client.post(f"{URL}/generations", json=SMALL | {"stream": True}),
        ):
            told = error(refused, 429)
            assert (told["code"], refused.headers["retry-after"]) == ("overloaded", "5")
            assert "1 streams of this key are open; close one" in told["message"]
        assert len((await it.client.get(URL)).json()["data"]) == 1
        gate.is_open.set()
        assert sse((await open_stream).text)[-1][1] == "completed"
        for answer in (
            await it.client.post(f"{URL}/generations", json={"stream": True}),
            await it.client.get(f"{URL}/{video['id']}/events"),
            await it.client.post(f"{URL}/generations", json=SMALL | {"stream": True}),
        ):
            assert answer.status_code in (200, 400)
        assert answer.status_code == 200


async def test_a_star_keeps_a_video(it: Serving) -> None:
    """It is set and taken with one call each, as often as one likes, and the video has no end while it has one."""
    video = (await it.client.post(URL, json=SMALL)).json()
    await it.service.wait(video["id"])
    path = f"{URL}/{video['id']}"
    for _ in range(2):
        starred = (await it.client.post(f"{path}/star")).json()
        assert (starred["starred"], starred["expires_at"]) == (True, None)
    assert (await it.client.get(path)).json() == starred
    for _ in range(2):
        again = (await it.client.delete(f"{path}/star")).json()
        assert again["starred"] is False
        assert again["expires_at"] > again["completed_at"]
    unknown = await it.client.post(f"{URL}/{new_job_id()}/star")
    assert unknown.status_code == 404


async def test_a_list_has_what_is_looked_for_in_short_rows(it: Serving) -> None:
    """A row is a part of the whole answer; each parameter may stand alone, and all go with pages."""
    made = [(await it.client.post(URL, json=SMALL | {"prompt": text})).json()["id"] for text in ("A cat", "a dog")]
    for one in made:
        await it.service.wait(one)
    await it.client.post(f"{URL}/{made[0]}/star")

    async def found(**params: str) -> list[str]:
        answer = await it.client.get(URL, params=params)
        assert answer.status_code == 200, answer.text
        return [video["id"] for video in answer.json()["data"]]

    assert await found(status="completed,queued", order="asc") == made
    assert await found(status="failed") == await found(status="cancelled") == await found(model="other") == []
    assert await found(model="fake", limit="1") == [made[1]]
    assert await found(prompt="CAT") == await found(starred="true") == [made[0]]
    assert await found(starred="false", prompt="a ") == [made[1]]
    whole = (await it.client.get(URL)).json()
    slim = (await it.client.get(URL, params={"fields": "slim"})).json()
    assert {name: slim[name] for name in slim if name != "data"} == {n: whole[n] for n in whole if n != "data"}
    for row, video in zip(slim["data"], whole["data"], strict=True):
        assert row == {name: video[name] for name in row if name != "url"} | {"url": video["data"][0]["url"]}
    by_id = (await it.client.get(URL, params={"fields": "slim", "ids": made[0]})).json()
    assert by_id["data"] == slim["data"][1:]


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"status": "done"}, "accepted: queued, in_progress, completed, failed, cancelled"),
        ({"starred": "maybe"}, "starred must be true or false"),
        ({"fields": "id"}, "fields must be slim"),
        ({"prompt": "x" * 201}, "at most 200 characters"),
        ({"ids": f"video_{'0' * 32}", "status": "queued"}, "ids stands alone"),
    ],
)
async def test_what_cannot_be_looked_for_is_refused(it: Serving, params: dict[str, str], told: str) -> None:
    refused = await it.client.get(URL, params=params)
    assert refused.status_code == 400
    assert told in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == next(iter(params))
