"""Inputs are stored once and go with their last job; a full disk and a full quota refuse work before it is done."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kinema.errors import FileGone, QuotaExceeded, StorageFull, StorageUnavailable
from kinema.job import JobStatus
from kinema.request.options import Given
from kinema.service import intake, service
from kinema.settings import ServerSettings, StorageSettings
from kinema.storage import Storage
from tests.serving import SMALL, Gate, Serving, serving, until
from tests.unit.server.test_generations import as_form, image_bytes
from tests.unit.service.test_service import OPTIONS, FakeEngine, noted_keys, png

URL = "/v1/videos"


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def made_video(it: Serving, **more: object) -> str:
    answer = await it.client.post(URL, json=SMALL | more)
    assert answer.status_code == 200, answer.text
    video_id: str = answer.json()["id"]
    await it.service.wait(video_id)  # type: ignore[arg-type]
    return video_id


def hold_reads(it: Serving, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], threading.Event]:
    """The keys of the files whose reading begins from now on, and what lets it go on."""
    reading: list[str] = []
    is_open = threading.Event()
    read = it.storage.read

    def held(key: str, *part: Any) -> Iterator[bytes]:
        reading.append(key)
        assert is_open.wait(20), "nobody opened the gate"
        return read(key, *part)

    monkeypatch.setattr(it.storage, "read", held)
    return reading, is_open


async def test_a_stored_video_is_read_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a key at a time. A few more wait unread, the next is refused, and another key need not wait."""
    monkeypatch.setattr(intake, "_MAX_WAITING", 2)
    async with serving(server=ServerSettings(api_keys="alpha,beta")) as it, asyncio.timeout(20):
        bodies = {}
        for key in ("alpha", "beta"):
            it.client.headers["api-key"] = key
            bodies[key] = {"prompt": "a blue one", "video": {"id": await made_video(it)}, "strength": 0.5}
        await it.dispatcher.stop()
        reading, is_open = hold_reads(it, monkeypatch)

        def edit(key: str) -> asyncio.Task[Any]:
            return asyncio.create_task(it.client.post(f"{URL}/edits", json=bodies[key], headers={"api-key": key}))

        edits = [edit("alpha") for _ in range(4)]
        ended, _ = await asyncio.wait(edits, return_when=asyncio.FIRST_COMPLETED)
        assert [(one.result().status_code, "wait to be read" in one.result().text) for one in ended] == [(429, True)]
        assert len(reading) == 1
        edits.append(edit("beta"))
        await until(lambda: len(reading) == 2)
        for waiting in edits[1:-1]:
            waiting.cancel()
        is_open.set()
        assert [(await one).status_code for one in (edits[0], edits[-1])] == [200, 200]
        assert len(reading) == 2


async def test_stored_pictures_have_the_turns_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are read at once for one client, and they do not wait for its films."""
    async with serving() as it, asyncio.timeout(20):
        film = await made_video(it)
        picture = {"input_reference": ("a.png", image_bytes(), "image/png")}
        first = (await it.client.post(URL, files=as_form(SMALL) | picture)).json()["id"]
        await it.service.wait(first)
        await it.dispatcher.stop()
        reading, is_open = hold_reads(it, monkeypatch)
        asked = [
            asyncio.create_task(it.client.post(URL + path, json={"prompt": "x"} | more))
            for path, more in [*[(f"/{first}/remix", {})] * 3, ("/edits", {"video": {"id": film}})]
        ]
        await until(lambda: any(key.startswith("videos/") for key in reading))
        await until(lambda: len(reading) >= 3)
        assert sum(key.startswith("inputs/") for key in reading) == 2
        is_open.set()
        assert {(await one).status_code for one in asked} == {200}


async def test_edits_of_one_video_share_its_copy_and_leave_nothing(tmp_path: Path) -> None:
    """Each is cancelled at once, and the last one takes the copy with it."""
    async with serving(storage=Storage(f"file://{tmp_path}")) as it:
        source = await made_video(it)
        await it.dispatcher.stop()
        before = files_in(tmp_path)
        body = {"prompt": "a blue one", "video": {"id": source}, "strength": 0.5}
        ids = [(await it.client.post(f"{URL}/edits", json=body)).json()["id"] for _ in range(5)]
        assert len(files_in(tmp_path)) == len(before) + 1
        for video_id in ids:
            assert (await it.client.post(f"{URL}/{video_id}/cancel")).json()["status"] == "failed"
        assert files_in(tmp_path) == before


async def test_a_cancelled_job_cannot_be_remixed_without_its_picture(tmp_path: Path) -> None:
    """The answer says so; with the picture sent again it can."""
    async with serving(storage=Storage(f"file://{tmp_path}"), is_dispatching=False) as it:
        picture = {"input_reference": ("a.png", image_bytes(), "image/png")}
        first = (await it.client.post(URL, files=as_form(SMALL) | picture)).json()
        await it.client.post(f"{URL}/{first['id']}/cancel")
        assert files_in(tmp_path) == []
        gone = await it.client.post(f"{URL}/{first['id']}/remix", json={"prompt": "x"})
        assert gone.status_code == 404
        assert "is not kept; send it again" in gone.json()["error"]["message"]
        again = await it.client.post(f"{URL}/{first['id']}/remix", files=as_form({"prompt": "x"}) | picture)
        assert again.status_code == 200


async def test_a_job_that_is_cancelled_while_it_runs_leaves_no_input(tmp_path: Path) -> None:
    """The worker ends it, and whoever records that deletes the file, whether the client waits or not."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate), storage=Storage(f"file://{tmp_path}")) as it:
        job = await it.service.submit(OPTIONS, given=Given(image=png(64, 64)))
        await until(gate.has_arrived.is_set)
        await it.service.cancel(job.id)
        assert len(files_in(tmp_path / "inputs")) == 1
        gate.is_open.set()
        assert (await it.service.wait(job.id)).status is JobStatus.CANCELLED
        await until(lambda: files_in(tmp_path / "inputs") == [])


async def test_an_input_whose_file_is_gone_is_stored_again(tmp_path: Path) -> None:
    """A storage that was restored may lack what the database knows."""
    async with serving(storage=Storage(f"file://{tmp_path}"), is_dispatching=False) as it:
        first, second = [await it.service.submit(OPTIONS, given=Given(image=png(64, 64))) for _ in range(2)]
        (path,) = files_in(tmp_path / "inputs")
        path.unlink()
        third = await it.service.submit(OPTIONS, given=Given(image=png(64, 64)))
        assert {job.request.image_key for job in (first, second, third)} == {f"inputs/{path.name}"}
        assert files_in(tmp_path / "inputs") == [path]


async def test_an_input_that_cannot_be_stored_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client hears why, and its quota is as it was."""
    async with serving(is_dispatching=False) as it:

        def put_bytes(*_args: object) -> None:
            raise StorageUnavailable("cannot write")

        with monkeypatch.context() as patched:
            patched.setattr(it.storage, "put_bytes", put_bytes)
            with pytest.raises(StorageUnavailable, match="cannot write"):
                await it.service.submit(OPTIONS, given=Given(image=png(64, 64)))
        assert await it.store.inputs.stored_bytes("") == 0
        await it.service.submit(OPTIONS, given=Given(image=png(64, 64)))


async def test_a_file_that_cannot_be_deleted_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job is cancelled all the same."""
    async with serving(is_dispatching=False) as it:
        keys = noted_keys(it.storage, monkeypatch)
        job = await it.service.submit(OPTIONS, given=Given(image=png(64, 64)))

        def delete(_key: str) -> None:
            raise StorageUnavailable("cannot delete")

        with monkeypatch.context() as patched:
            patched.setattr(it.storage, "delete", delete)
            assert (await it.service.stop(job.id)).status is JobStatus.CANCELLED
        assert b"".join(it.storage.read(keys[0]))
        it.store.inputs.has_dropped.set()
        while await it.store.inputs.dropped(1):  # noqa: ASYNC110 - another task brings it about
            await asyncio.sleep(0.002)
        with pytest.raises(FileGone):
            next(it.storage.read(keys[0]))


async def test_a_full_quota_is_429_that_says_what_to_do() -> None:
    """It is known before a film is read. Deleting a video makes room."""
    async with serving(space=StorageSettings(max_gb_per_key=1e-9)) as it:
        first = await made_video(it)
        for path, more in ((URL, {}), (f"{URL}/edits", {"video": {"id": first}}), (f"{URL}/generations", {})):
            refused = await it.client.post(path, json=SMALL | more)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
            assert "delete videos" in refused.json()["error"]["message"]
            assert refused.headers["x-should-retry"] == "false"
        await it.client.delete(f"{URL}/{first}")
        await made_video(it)


async def test_an_input_beyond_the_quota_is_refused() -> None:
    """With nothing kept of it."""
    async with serving(space=StorageSettings(max_gb_per_key=1e-7), is_dispatching=False) as it:
        with pytest.raises(QuotaExceeded):
            await it.service.submit(OPTIONS, given=Given(image=png(64, 64)))
        await it.service.submit(OPTIONS)
        assert await it.store.inputs.stored_bytes("") == 0


@pytest.mark.parametrize("path", ["", "/generations", "/edits", "/extensions", "/ID/remix"])
async def test_a_full_disk_is_507_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """No file is read, no picture is decoded, nothing is written; a submission that was accepted is still known."""
    async with serving(storage=Storage(f"file://{tmp_path}")) as it:
        headers = {"idempotency-key": "first"}
        first = (await it.client.post(URL, json=SMALL, headers=headers)).json()["id"]
        await it.service.wait(first)
        free = 0.9e9
        usage = type(shutil.disk_usage(tmp_path))

        def disk_usage(_path: object) -> Any:
            return usage(10**12, 10**12 - int(free), int(free))

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)
        monkeypatch.setattr(service, "_MEASURED_S", 0.0)
        before = files_in(tmp_path)
        body = {"prompt": "x"} | ({"video": {"id": first}} if path in ("/edits", "/extensions") else {})
        with monkeypatch.context() as patched:
            patched.setattr(it.storage, "read", lambda *_: pytest.fail("a file was read"))
            refused = await it.client.post(URL + path.replace("ID", first), json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        assert "0.9 GB of the disk are free" in refused.json()["error"]["message"]
        assert refused.headers["x-should-retry"] == "false"
        assert files_in(tmp_path) == before
        assert (await it.client.post(URL, json=SMALL, headers=headers)).json()["id"] == first
        free = 1.1e9
        assert (await it.client.post(URL, json=SMALL)).status_code == 200


async def test_only_a_local_folder_has_a_disk_to_measure(tmp_path: Path) -> None:
    """Also one that does not exist yet. Elsewhere nothing is refused for want of space."""
    space = StorageSettings(min_free_gb=1e9)
    async with serving(space=space) as it:
        await made_video(it)
    async with serving(storage=Storage(f"file://{tmp_path / 'none' / 'yet'}"), space=space) as it:
        assert (await it.client.post(URL, json=SMALL)).status_code == 507


async def test_a_disk_that_is_full_when_it_is_written_to_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the measure and the write others may have filled it."""
    storage = Storage(f"file://{tmp_path}")

    def write_bytes(_path: Path, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(StorageFull, match="No space left on device"):
        storage.put_bytes("inputs/a", b"x", "image/png")
