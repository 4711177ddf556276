"""Videos that are watched while they are decoded, over real sockets and the protocol of the service."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import av
import httpx
import pytest
import uvicorn
from pydantic import SecretStr
from structlog.testing import capture_logs

from kinema.engines.fake import FakeEngine
from kinema.server.connections import Connections
from kinema.server.limits import LimitedProtocol
from kinema.settings import ServerSettings
from tests.described import check_answer
from tests.serving import SMALL, Serving, has_heard_of_cancel, serving, until
from tests.unit.worker.test_live import Doors

PATIENCE_S = 20
# Three chunks: of one frame, and twice of four.
BODY = SMALL | {"num_frames": 9}


@asynccontextmanager
async def listening(it: Serving) -> AsyncIterator[httpx.AsyncClient]:
    """The service on a free port; a client of it."""
    protocol = partial(LimitedProtocol, Connections(ServerSettings(), lambda: 100), is_welcome=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            it.app, http=cast("Any", protocol), log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE_S) as client:
            yield client
        server.should_exit = True
        await running


@asynccontextmanager
async def watched(**options: Any) -> AsyncIterator[tuple[Serving, httpx.AsyncClient, Doors]]:
    """The service, a client, and the doors before each chunk, which are open at the end."""
    doors = Doors()
    async with serving(FakeEngine(on_output=doors), **options) as it, listening(it) as client:
        try:
            yield it, client, doors
        finally:
            doors.let_through(100)


async def create(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **changes: object) -> str:
    """The path of the content of a new video."""
    answer = await client.post("/v1/videos", json=BODY | changes, headers=headers)
    return f"/v1/videos/{answer.json()['id']}/content"


async def viewers(it: Serving, count: int) -> None:
    """Wait until so many watch at the worker."""
    await until(lambda: [one.live._num_viewers for one in it.worker._generations.values()] == [count])


async def download(client: httpx.AsyncClient, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    return await client.get(path, params={"variant": "live"}, headers=headers)


def first_picture(url: str) -> tuple[int, int]:
    """The size of the first picture that a player shows; it reads no more than it needs."""
    # Without the format ffmpeg would look at the first 2 kB for it, and so small a picture has less.
    options = {"probesize": "32", "analyzeduration": "0"}
    with av.open(url, format="mp4", options=options, timeout=PATIENCE_S) as container:
        frame = next(container.decode(video=0))
        return frame.width, frame.height


def num_pictures(film: bytes) -> int:
    with av.open(io.BytesIO(film)) as container:
        return len(list(container.decode(video=0)))


async def test_a_player_shows_the_first_picture_before_the_second_is_decoded() -> None:
    """ffmpeg reads the answer from the server and decodes it, while the engine is held before its second chunk."""
    async with watched() as (it, client, doors):
        path = await create(client)
        playing = asyncio.create_task(asyncio.to_thread(first_picture, f"{client.base_url}{path[1:]}?variant=live"))
        await viewers(it, 1)
        doors.let_through(1)
        assert await playing == (64, 64)
        assert it.engine.num_running == 1


async def test_two_viewers_and_a_late_one_get_the_same_bytes() -> None:
    """As their answer says: a fragmented MP4 with its codec, which nobody keeps, and of which there are no parts."""
    async with watched() as (it, client, doors):
        path = await create(client)
        early = [asyncio.create_task(download(client, path)) for _ in range(2)]
        await viewers(it, 2)
        doors.let_through(2)
        late = asyncio.create_task(download(client, path, {"range": "bytes=0-9"}))
        await viewers(it, 3)
        doors.let_through(1)
        answers = [await answer for answer in (*early, late)]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert num_pictures(answers[0].content) == 9
        headers = answers[0].headers
        assert headers["content-type"].startswith('video/mp4; codecs="avc1.')
        assert (headers["cache-control"], headers["transfer-encoding"]) == ("no-store", "chunked")
        assert "accept-ranges" not in headers
        sent = {name: headers[name] for name in headers if name not in {"date", "server", "transfer-encoding"}}
        check_answer("GET", path, 200, sent, answers[0].content)


async def test_a_finished_video_is_its_file() -> None:
    """With its parts and its ETag, as without the variant."""
    async with watched() as (it, client, doors):
        doors.let_through(3)
        path = await create(client)
        await until(lambda: not it.worker.tasks)
        plain = await client.get(path)
        while plain.status_code != 200:
            plain = await client.get(path)
        live = await download(client, path)
        assert (live.content, live.headers["etag"]) == (plain.content, plain.headers["etag"])
        assert (await download(client, path, {"range": "bytes=0-9"})).status_code == 206


async def test_a_cancelled_video_ends_the_connection() -> None:
    """The client sees an answer that is not whole, and the log has no failure of the server."""
    async with watched() as (it, client, doors):
        path = await create(client)
        with capture_logs() as logs:
            watching = asyncio.create_task(download(client, path))
            await viewers(it, 1)
            doors.let_through(1)
            cancelling = asyncio.create_task(client.post(path.replace("content", "cancel")))
            await until(lambda: has_heard_of_cancel(it))
            doors.let_through(1)
            with pytest.raises(httpx.RemoteProtocolError):
                await watching
            assert (await cancelling).json()["status"] == "failed"
        assert not [entry for entry in logs if entry["log_level"] in {"error", "critical"}]


async def test_a_video_that_fails_before_its_first_frame_is_refused() -> None:
    """With the reason that the file itself would be refused with."""
    async with watched() as (_, client, _):
        path = await create(client, prompt="[fail]")
        answer = await download(client, path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "no_video"
        assert "the prompt asks for a failure" in answer.json()["error"]["message"]


async def test_a_viewer_who_goes_away_leaves_nothing() -> None:
    """Neither at the worker nor in the number of streams of the key; before the first frame, and after it."""
    async with watched() as (it, client, doors):
        path = await create(client)
        waiting = asyncio.create_task(download(client, path))
        await viewers(it, 1)
        waiting.cancel()
        await viewers(it, 0)
        asked = client.build_request("GET", path, params={"variant": "live"})
        opening = asyncio.create_task(client.send(asked, stream=True))
        await viewers(it, 1)
        doors.let_through(1)
        answer = await opening
        assert answer.headers["content-type"].startswith("video/mp4")
        await answer.aclose()
        await viewers(it, 0)
        await until(lambda: not it.app.state.api.feeds._num_streams)
        assert it.worker.tasks  # the video goes on


async def test_only_its_key_sees_it() -> None:
    """And a key has a number of streams."""
    keys = ServerSettings(api_keys=SecretStr("one,two"), max_streams_per_key=1)
    async with watched(server=keys) as (it, client, doors):
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        path = await create(client, one)
        assert (await download(client, path)).status_code == 401
        assert (await download(client, path, two)).status_code == 404
        watching = asyncio.create_task(download(client, path, one))
        await viewers(it, 1)
        assert (await download(client, path, one)).status_code == 429
        doors.let_through(3)
        assert (await watching).status_code == 200


async def test_the_headers_alone_do_not_wait() -> None:
    async with watched() as (_, client, _):
        path = await create(client)
        answer = await client.head(path, params={"variant": "live"})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")


@pytest.mark.parametrize("keys", [None, "one,two"])
async def test_an_answer_has_the_address_while_the_video_is_made(keys: str | None) -> None:
    """It opens without a key, and is there as long as the video is in progress."""
    settings = ServerSettings() if keys is None else ServerSettings(api_keys=SecretStr(keys))
    headers = {} if keys is None else {"authorization": "Bearer one"}
    async with watched(server=settings) as (it, client, doors):
        created = (await client.post("/v1/videos", json=BODY, headers=headers)).json()
        path = f"/v1/videos/{created['id']}"
        await until(lambda: it.worker.tasks)

        async def state() -> dict[str, Any]:
            found: dict[str, Any] = (await client.get(path, headers=headers)).json()
            return found

        async with asyncio.timeout(PATIENCE_S):
            while (running := await state())["status"] == "queued":
                assert running["live_url"] is None
        url = running["live_url"]
        assert url.startswith(f"{str(client.base_url).rstrip('/')}{path}/content?variant=live")
        assert ("&signature=" in url) == (keys is not None)
        watching = asyncio.create_task(client.get(url))
        await viewers(it, 1)
        doors.let_through(3)
        assert num_pictures((await watching).content) == 9
        async with asyncio.timeout(PATIENCE_S):
            while (ended := await state())["status"] == "in_progress":
                pass
        assert (ended["status"], ended["live_url"]) == ("completed", None)
