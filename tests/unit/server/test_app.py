"""What every answer has in common, and the small endpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from kinema.engines.fake import FakeEngine
from kinema.errors import KinemaError, StorageFull, StoreUnavailable
from kinema.request.memory import Memory, Need
from kinema.server.errors import response_for
from kinema.service.sweeper import Sweeping, SweepState
from kinema.settings import ServerSettings
from kinema.storage import Storage
from tests.serving import SMALL, Serving, serving
from tests.unit.server.test_bad_input import error_of
from tests.unit.server.test_generations import URL, as_form


async def test_a_model_may_be_called_by_an_alias() -> None:
    """The list shows it, its page opens by it, and a video by it names the model."""
    async with serving(FakeEngine("org/model", aliases=["old"])) as it:
        (listed,) = (await it.client.get("/v1/models")).json()["data"]
        alone = (await it.client.get("/v1/models/old")).json()
        video = (await it.client.post("/v1/videos", json={**SMALL, "model": "old"})).json()
    assert listed == alone
    assert (listed["id"], listed["aliases"], video["model"]) == ("org/model", ["old"], "org/model")


async def test_models_are_listed_with_what_they_make() -> None:
    """A name with a slash has its own page, as hub names have."""
    async with serving(FakeEngine("Wan-AI/Wan2.1")) as it:
        (listed,) = (await it.client.get("/v1/models")).json()["data"]
        alone = (await it.client.get("/v1/models/Wan-AI/Wan2.1")).json()
        encoded = (await it.client.get("/v1/models/Wan-AI%2FWan2.1")).json()
        missing = await it.client.get("/v1/models/other")
        in_lines = await it.client.get("/v1/models/a%0Ab%0A")
    assert listed == alone == encoded
    assert alone["aliases"] == []
    assert (alone["id"], alone["object"], alone["preset"]["size"]) == ("Wan-AI/Wan2.1", "model", "128x128")
    assert alone["modes"] == [
        "text-to-video",
        "image-to-video",
        "first-last-frame-to-video",
        "video-to-video",
        "control-to-video",
        "reference-to-video",
        "frames-to-video",
    ]
    assert error_of(missing, 404)["code"] == error_of(in_lines, 404)["code"] == "model_not_found"


async def test_health_says_what_works(it: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service without a ready worker lives, is not ready, and says so."""
    assert (await it.client.get("/live")).json() == {"status": "live"}
    assert (await it.client.get("/ready")).json() == {"status": "ready"}
    worker = {"model": "fake", "device": "cpu", "ready": True, "memory": None, "parked": 0, "resumed": 0}
    health = {"status": "ready", "models": ["fake"], "workers": [worker], "jobs_waiting": 0}
    swept = {"sweeping": "working", "files_held": 0, "bytes_held": 0}
    assert (await it.client.get("/health")).json() == health | swept
    monkeypatch.setattr(it.service, "is_ready", lambda: False)
    unready = await it.client.get("/ready")
    assert (unready.status_code, unready.json()["error"]["code"]) == (503, "no_worker")
    assert (await it.client.get("/live")).status_code == 200
    assert (await it.client.get("/health")).json()["status"] == "starting"


async def test_ready_knows_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that becomes one that cannot be written is seen before a video was computed. A full one is not meant:
    new videos get a 507, and somebody has to delete old ones."""
    monkeypatch.setattr("kinema.service.readiness._KEPT_S", 0.0)
    monkeypatch.setattr("kinema.service.readiness._KEPT_BAD_S", 0.0)
    folder = tmp_path / "files"
    async with serving(storage=Storage(f"file://{folder}")) as it:
        assert (await it.client.get("/ready")).status_code == 200
        shutil.rmtree(folder)
        folder.write_bytes(b"a file where the folder should be")
        unready = await it.client.get("/ready")
        assert (unready.status_code, unready.json()["error"]["code"]) == (503, "storage_unavailable")
        folder.unlink()
        assert (await it.client.get("/ready")).json() == {"status": "ready"}

        def full(*_arguments: object) -> None:
            raise StorageFull("cannot write: No space left on device")

        monkeypatch.setattr(Storage, "put_bytes", full)
        assert (await it.client.get("/ready")).status_code == 200


async def test_metrics_are_the_numbers_of_health(it: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Prometheus' own parser reads them; a sweep that keeps files is seen."""
    monkeypatch.setattr(it.service, "sweep_state", lambda: SweepState(Sweeping.HELD, num_files=7, size_bytes=9000))
    worker = it.service.workers()[0]
    memory = Memory(limit_bytes=100, residents={"vae": 30, "graphs": 5}, room_bytes=70)
    two = [replace(worker, memory=memory, num_parked=4, num_resumed=3), replace(worker, memory=memory)]
    monkeypatch.setattr(it.service, "workers", lambda: two)
    health = (await it.client.get("/health")).json()
    said = {"limit_bytes": 100, "room_bytes": 70, "residents": {"vae": 30, "graphs": 5}}
    assert health["workers"][0] == health["workers"][1] | {"parked": 4, "resumed": 3}
    assert health["workers"][0]["memory"] == said
    answer = await it.client.get("/metrics")
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, "text/plain")
    families = text_string_to_metric_families(answer.text)
    samples = {(sample.name, *sample.labels.values()): sample.value for one in families for sample in one.samples}
    assert samples == {
        ("kinema_ready",): 1,
        ("kinema_jobs_waiting",): 0,
        ("kinema_storage_sweep_state", "working"): 0,
        ("kinema_storage_sweep_state", "held"): 1,
        ("kinema_storage_sweep_state", "stopped"): 0,
        ("kinema_storage_held_files",): 7,
        ("kinema_storage_held_bytes",): 9000,
        ("kinema_memory_limit_bytes", "fake"): 200,
        ("kinema_resident_bytes", "fake", "vae"): 60,
        ("kinema_resident_bytes", "fake", "graphs"): 10,
        ("kinema_videos_parked", "fake"): 4,
        ("kinema_videos_resumed", "fake"): 3,
    }


async def test_what_does_not_fit_into_the_device_is_refused_at_once() -> None:
    """With what would fit, also by an estimate; the model says it beforehand, and nothing is refused unmeasured."""
    engine = FakeEngine()
    room = Memory(limit_bytes=10**9, residents={}, room_bytes=10**9)
    engine.memory = room
    async with serving(engine, is_dispatching=False) as it:
        asked = SMALL | {"num_frames": 81, "size": "128x128"}
        assert (await it.client.get("/v1/models/fake")).json()["max_frames_in_memory"] is None
        assert (await it.client.post("/v1/videos/estimate", json=asked)).status_code == 200
        need = Need(base_bytes=0, bytes_per_unit=10**6)
        engine.memory = room.model_copy(update={"step": need, "decode": Need(base_bytes=0, bytes_per_unit=100)})
        assert (await it.client.get("/v1/models/fake")).json()["max_frames_in_memory"] == 57
        for path in ("/v1/videos", "/v1/videos/estimate"):
            refused = error_of(await it.client.post(path, json=asked), 400)
            assert refused["param"] == "num_frames"
            assert refused["message"].endswith("at this size at most 57 frames")
        assert (await it.client.post("/v1/videos", json=asked | {"num_frames": 57})).status_code == 200


async def test_every_answer_has_a_request_id(it: Serving) -> None:
    """The client's own if it is a plain word; never one that could break a header or a log."""
    assert (await it.client.get("/live", headers={"x-request-id": "abc-1.2:3"})).headers["x-request-id"] == "abc-1.2:3"
    for odd in ("", "a b", "x" * 200, "ä", "a\tb", '"', "<script>"):
        answer = await it.client.get("/live", headers=[(b"x-request-id", odd.encode("latin-1"))])
        assert answer.headers["x-request-id"].startswith("req_")
    first, second = [await it.client.get("/nowhere") for _ in range(2)]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_unknown_routes_are_404_in_the_one_shape(it: Serving) -> None:
    """They say where to look."""
    assert "/docs" in error_of(await it.client.get("/v2/nothing"), 404)["message"]
    error_of(await it.client.post("/v1/videos/generations/more"), 404)


async def test_an_unexpected_exception_is_a_500_that_leaks_nothing(
    it: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traceback goes to the log with the request's id; the application itself does not raise."""

    def broken() -> None:
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr(it.service, "models", broken)
    transport = httpx.ASGITransport(it.app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with capture_logs() as logs:
            answer = await client.get("/v1/models", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine"
    assert (answer.json()["error"]["code"], answer.json()["error"]["type"]) == ("internal_error", "server_error")
    assert "hunter2" not in answer.text
    assert any(entry.get("exc_info") for entry in logs)


async def test_a_database_that_is_away_is_503(it: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the client may try again."""

    async def away() -> int:
        raise StoreUnavailable

    monkeypatch.setattr(it.store, "count_waiting", away)
    answer = await it.client.get("/health")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")


def _all_errors(kind: type[KinemaError]) -> list[type[KinemaError]]:
    """Those that the server may raise; the client's are about its answers."""
    subclasses = [sub for sub in kind.__subclasses__() if not sub.__module__.startswith("kinema.client")]
    return [kind, *(found for sub in subclasses for found in _all_errors(sub))]


@pytest.mark.parametrize("kind", _all_errors(KinemaError))
def test_every_error_has_a_status(kind: type[KinemaError]) -> None:
    """None falls through the table."""
    error = kind(size_bytes=5) if kind.__name__ == "RangeNotSatisfiable" else kind()  # type: ignore[call-arg]
    response = response_for(error)
    assert 400 <= response.status_code <= 599
    assert json.loads(bytes(response.body))["error"]["code"] == kind.code


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "", "http://test.evil.example", "http://test:81"])
async def test_a_page_of_another_site_makes_nothing(it: Serving, origin: str) -> None:
    """A form posted across origins needs no leave of ours, so the browser's Origin is looked at; reading is free."""
    for sent in ({"json": SMALL}, {"files": as_form(SMALL)}):
        answer = await it.client.post(URL, headers={"origin": origin}, **sent)
        assert error_of(answer, 403)["code"] == "cross_origin"
    assert (await it.client.get("/v1/models", headers={"origin": origin})).status_code == 200
    assert it.engine.num_running == 0


async def test_our_own_pages_may_ask() -> None:
    """By the address they were loaded from, with or without TLS before it, or by the public one."""
    async with serving(server=ServerSettings(public_url="https://Videos.example/kinema/")) as it:
        for origin in ("http://test", "https://test", "https://videos.example"):
            assert (await it.client.post(URL, json=SMALL, headers={"origin": origin})).status_code == 200


async def test_openapi_describes_the_body_in_both_encodings(it: Serving) -> None:
    """Every reference resolves, and /docs is there."""
    described = (await it.client.get("/openapi.json")).json()
    body = described["paths"]["/v1/videos/generations"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    fields = described["components"]["schemas"]["GenerationBody"]
    assert fields["required"] == ["prompt"]
    assert {"input_reference", "nvext", "seed", "stream"} <= set(fields["properties"])
    names = set(described["components"]["schemas"])
    text = json.dumps(described)
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= names
    assert (await it.client.get("/docs")).status_code == 200
