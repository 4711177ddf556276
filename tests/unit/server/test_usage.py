"""``GET /v1/usage``, and videos in bulk."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kinema.ids import new_job_id
from kinema.settings import ServerSettings
from tests.serving import SMALL, Serving, serving

ALICE, BOB = ({"Authorization": f"Bearer {key}"} for key in ("alice", "bob"))
TWO_KEYS = ServerSettings(api_keys="alice,bob")


async def make(it: Serving, headers: dict[str, str], count: int = 1) -> list[dict[str, Any]]:
    """Videos that were made for this key."""
    made = [(await it.client.post("/v1/videos", json=SMALL, headers=headers)).json() for _ in range(count)]
    for video in made:
        await it.service.wait(video["id"])
    return made


async def usage(it: Serving, headers: dict[str, str], **days: str) -> list[dict[str, Any]]:
    answer = await it.client.get("/v1/usage", params=days, headers=headers)
    assert answer.status_code == 200
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


async def test_a_key_sees_what_it_has_made_also_when_it_is_gone() -> None:
    """The videos, the seconds of the device and the bytes of the files of each day; nothing of another key."""
    async with serving(server=TWO_KEYS) as it:
        first, second = await make(it, ALICE, 2)
        [today] = await usage(it, ALICE)
        jobs = [await it.service.get(video["id"]) for video in (first, second)]
        assert today == {
            "object": "usage",
            "day": datetime.now(UTC).date().isoformat(),
            "key": hashlib.sha256(b"alice").hexdigest()[:8],
            "videos": 2,
            "device_s": pytest.approx(sum(job.timings.device_s for job in jobs if job.timings), abs=0.01),
            "bytes": sum(artifact.size_bytes for job in jobs for artifact in job.artifacts),
        }
        assert today["device_s"] >= 0
        assert await usage(it, BOB) == []
        await it.client.delete(f"/v1/videos/{first['id']}", headers=ALICE)
        await make(it, ALICE)
        assert [day["videos"] for day in await usage(it, ALICE)] == [3]


async def test_days_are_asked_for() -> None:
    """Both ends count; by default they are the last thirty days."""
    async with serving() as it:
        await make(it, {})
        today = datetime.now(UTC).date()
        days = {name: (today + timedelta(days=number)).isoformat() for name, number in (("old", -29), ("new", 0))}
        for asked in ({}, {"from": days["new"]}, {"to": days["new"]}, {"from": days["old"], "to": days["new"]}):
            assert len(await usage(it, {}, **asked)) == 1
        assert await usage(it, {}, to=(today - timedelta(days=1)).isoformat()) == []
        assert await usage(it, {}, to="0001-01-01") == []


@pytest.mark.parametrize(
    ("days", "param"),
    [
        ({"from": "yesterday"}, "from"),
        ({"to": "2026-13-01"}, "to"),
        ({"from": "2026-01-02", "to": "2026-01-01"}, "from"),
        ({"from": "2020-01-01", "to": "2026-01-01"}, "from"),
    ],
)
async def test_days_that_make_no_sense_are_refused(days: dict[str, str], param: str) -> None:
    """With what is accepted."""
    async with serving() as it:
        refused = await it.client.get("/v1/usage", params=days)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_a_video_that_failed_or_was_cancelled_is_not_counted() -> None:
    """It has no file."""
    async with serving(is_dispatching=False) as it:
        video = (await it.client.post("/v1/videos", json=SMALL)).json()
        await it.client.post(f"/v1/videos/{video['id']}/cancel")
        assert await usage(it, {}) == []


async def test_videos_are_listed_by_their_ids() -> None:
    """In the order that was asked for. Those of another key are left out, and those that do not exist."""
    async with serving(server=TWO_KEYS, is_dispatching=False) as it:
        mine = [(await it.client.post("/v1/videos", json=SMALL, headers=ALICE)).json()["id"] for _ in range(3)]
        other = (await it.client.post("/v1/videos", json=SMALL, headers=BOB)).json()["id"]
        asked = [mine[2], other, new_job_id(), mine[0], mine[2]]
        listed = (await it.client.get("/v1/videos", params={"ids": ",".join(asked)}, headers=ALICE)).json()
        assert [video["id"] for video in listed["data"]] == [mine[2], mine[0]]
        assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (mine[2], mine[0], False)


async def test_each_id_may_be_a_parameter_of_its_own() -> None:
    """As many clients send a list. None of them is left out."""
    async with serving(is_dispatching=False) as it:
        made = [(await it.client.post("/v1/videos", json=SMALL)).json()["id"] for _ in range(3)]
        listed = (await it.client.get("/v1/videos", params={"ids": made[:2]})).json()["data"]
        assert [video["id"] for video in listed] == made[:2]
        gone = (await it.client.delete("/v1/videos", params={"ids": [made[0], f"{made[1]},{made[2]}"]})).json()["data"]
        assert [(one["id"], one["deleted"]) for one in gone] == [(one, True) for one in made]


async def test_videos_are_deleted_by_their_ids() -> None:
    """And no others, whatever is asked for."""
    async with serving(server=TWO_KEYS) as it:
        mine = [video["id"] for video in await make(it, ALICE, 3)]
        [other] = [video["id"] for video in await make(it, BOB)]
        asked = f"{mine[0]}, {other},{mine[1]}"
        answer = (await it.client.delete("/v1/videos", params={"ids": asked}, headers=ALICE)).json()
        assert [(one["id"], one["deleted"]) for one in answer["data"]] == [
            (mine[0], True),
            (other, False),
            (mine[1], True),
        ]
        left = (await it.client.get("/v1/videos", headers=ALICE)).json()["data"]
        assert [video["id"] for video in left] == [mine[2]]
        assert set(it.storage.list_jobs()) == {mine[2], other}
        again = (await it.client.delete("/v1/videos", params={"ids": asked}, headers=ALICE)).json()
        assert not any(one["deleted"] for one in again["data"])


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    "ids", [" ", ",", "video_1", f"video_{'0' * 32},*", ",".join(f"video_{number:032x}" for number in range(101))]
)
async def test_ids_that_are_none_are_refused(method: str, ids: str) -> None:
    """Nothing is deleted."""
    async with serving(is_dispatching=False) as it:
        await it.client.post("/v1/videos", json=SMALL)
        refused = await it.client.request(method, "/v1/videos", params={"ids": ids})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "ids")
        assert len((await it.client.get("/v1/videos")).json()["data"]) == 1


async def test_a_deletion_of_nothing_is_refused() -> None:
    """It never means all."""
    async with serving(is_dispatching=False) as it:
        assert (await it.client.delete("/v1/videos")).status_code == 400
        mixed = await it.client.get("/v1/videos", params={"ids": new_job_id(), "limit": "1"})
        assert mixed.status_code == 400
