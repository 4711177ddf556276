"""``GET /v1/videos/events``: the changes of all videos of a key."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from kinema.jobs import changes as changes_module
from kinema.server import list_feeds
from kinema.settings import ServerSettings
from tests.serving import SMALL, Serving, serving

URL = "/v1/videos/events"
Told = tuple[str, str, dict[str, Any]]


def told(text: str) -> list[Told]:
    """The id, type and data of each event."""
    found = []
    for block in filter(None, text.split("\n\n")):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((lines["id"], lines["event"], json.loads(lines["data"])))
    return found


async def since(it: Serving, last_id: str | None = None, **headers: str) -> list[Told]:
    """What a stream has that ends with the changes so far."""
    seen = {} if last_id is None else {"last-event-id": last_id}
    answer = await it.client.get(URL, params={"follow": "false"}, headers=seen | headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    return told(answer.text)


async def make(it: Serving, **headers: str) -> str:
    """The id of a finished video."""
    answer = await it.client.post("/v1/videos", json=SMALL, headers=headers)
    made: str = answer.json()["id"]
    await it.service.wait(made)  # type: ignore[arg-type]
    return made


async def test_a_stream_begins_with_a_reset_and_goes_on_behind_any_of_its_ids(it: Serving) -> None:
    """Each video that has changed comes once, as its row of now, and a deleted one as deleted."""
    before = await make(it)
    [(begin, kind, data)] = await since(it)
    assert (kind, data["reason"]) == ("reset", "no_id")
    first, second = await make(it), await make(it)
    changed = await since(it, begin)
    assert [(kind, data["id"], data["status"]) for _, kind, data in changed] == [
        ("video", first, "completed"),
        ("video", second, "completed"),
    ]
    await it.client.delete(f"/v1/videos/{first}")
    await it.client.delete(f"/v1/videos/{before}")
    assert [(kind, data["id"]) for _, kind, data in await since(it, begin)] == [
        ("video", second),
        ("deleted", first),
        ("deleted", before),
    ]
    behind_second = changed[-1][0]
    later = await since(it, behind_second)
    assert [data for _, _, data in later] == [
        {"id": first, "object": "video.deleted", "deleted": True},
        {"id": before, "object": "video.deleted", "deleted": True},
    ]
    assert await since(it, later[-1][0]) == []


async def test_a_row_has_the_values_of_the_video(it: Serving) -> None:
    [(begin, _, _)] = await since(it)
    made = await make(it)
    [(_, _, row)] = await since(it, begin)
    whole = (await it.client.get(f"/v1/videos/{made}")).json()
    assert row["url"] == whole["data"][0]["url"]
    assert {name: row[name] for name in row if name != "url"} == {name: whole[name] for name in row if name != "url"}


async def test_an_id_that_says_nothing_is_a_reset(it: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another server, of a time to come, or too old: the client learns that it must read the list."""
    [(begin, _, _)] = await since(it)
    await make(it)
    tag, at, place, _ = begin.split(".")
    strange = ["x", "1", "7", "." * 200, "9" * 4000, f"00000000.{at}.{place}.", f"{tag}.{at}.{int(place) + 10**17}."]
    strange += [
        f"{tag}.{at}.{place}.video_1",
        f"{tag}.{at}.-1.",
        f"{tag}.1.{place}.",
        f"{tag}.{at}",
        f"{tag}.{at}.{place}.x.y",
    ]
    for one in strange:
        [(fresh, kind, data)] = await since(it, one)
        assert (kind, data["reason"]) == ("reset", "unknown_id"), one
        assert await since(it, fresh) == []
    assert len(await since(it, begin)) == 1
    monkeypatch.setattr(changes_module, "_HOLDS_H", -2)
    assert [kind for _, kind, _ in await since(it, begin)] == ["reset"]


async def test_a_client_that_was_away_for_long_reads_on_by_pages(it: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_feeds, "_PAGE", 2)
    [(begin, _, _)] = await since(it)
    made = [await make(it) for _ in range(5)]
    assert [data["id"] for _, _, data in await since(it, begin)] == made


async def test_a_key_sees_its_own_videos_alone() -> None:
    """Their changes and their deletions."""
    one, other = ({"authorization": f"Bearer {key}"} for key in ("one", "other"))
    async with serving(server=ServerSettings(api_keys=SecretStr("one,other"))) as it:
        [(begin, _, _)] = await since(it, **one)
        own, strange = await make(it, **one), await make(it, **other)
        await it.client.delete(f"/v1/videos/{await make(it, **other)}", headers=other)
        assert [data["id"] for _, _, data in await since(it, begin, **one)] == [own]
        assert next(data["id"] for _, _, data in await since(it, begin, **other)) == strange
        refused = await it.client.get(URL)
    assert refused.status_code == 401


@pytest.mark.parametrize(("method", "status"), [("DELETE", 405), ("POST", 405)])
async def test_events_is_not_the_id_of_a_video(it: Serving, method: str, status: int) -> None:
    answer: httpx.Response = await it.client.request(method, URL)
    assert answer.status_code == status
