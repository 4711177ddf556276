"""Keys with names: whose the videos are, and the limits of each."""

from __future__ import annotations

import httpx
import pytest
from pydantic import ValidationError

from kinema.server.app import create_app
from kinema.server.keys import Keys, key_id, named_digests
from kinema.settings import JobSettings, KeySettings, ServerSettings, StorageSettings
from tests.described import DescribedTransport
from tests.serving import SMALL, serving


def headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def named(**keys: dict[str, object]) -> ServerSettings:
    return ServerSettings.model_validate({"api_keys": "plain", "keys": keys})


async def test_a_key_that_is_replaced_keeps_its_videos() -> None:
    """They belong to the name. While both keys are in the list, both open them."""
    before, both, after = ("old", "old,new", "new")
    async with serving(server=named(alice={"key": before}), is_dispatching=False) as it:
        video = (await it.client.post("/v1/videos", json=SMALL, headers=headers("old"))).json()
        path = f"/v1/videos/{video['id']}"
        for keys, key, status in ((both, "old", 200), (both, "new", 200), (after, "new", 200), (after, "old", 401)):
            restarted = create_app(it.service, named(alice={"key": keys}), it.app.state.webhooks, b"secret")
            transport = DescribedTransport(restarted)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                assert (await client.get(path, headers=headers(key))).status_code == status
        assert (await it.client.get(path, headers=headers("plain"))).status_code == 404


async def test_a_key_has_limits_of_its_own() -> None:
    """Of its waiting videos; another key has the share of each."""
    keys = named(few={"key": "few", "max_queued": 1}, many={"key": "many", "max_queued": 4})
    async with serving(server=keys, jobs=JobSettings(max_queued=9), is_dispatching=False) as it:
        for key, most in (("few", 1), ("plain", 3), ("many", 4)):
            answers = [await it.client.post("/v1/videos", json=SMALL, headers=headers(key)) for _ in range(most + 1)]
            assert [answer.status_code for answer in answers] == [200] * most + [429]


async def test_a_key_has_its_own_bound_of_bytes() -> None:
    """A smaller one, a larger one or none, in place of the one for all keys."""
    keys = named(little={"key": "little", "max_gb": 1e-9}, all={"key": "all", "max_gb": float("inf")})
    async with serving(server=keys, space=StorageSettings(max_gb_per_key=1e-9)) as it:
        for key, status in (("little", 429), ("plain", 429), ("all", 200)):
            first = (await it.client.post("/v1/videos", json=SMALL, headers=headers(key))).json()
            await it.service.wait(first["id"])
            assert (await it.client.post("/v1/videos", json=SMALL, headers=headers(key))).status_code == status


async def test_usage_names_the_keys_and_one_may_see_all() -> None:
    """Others see their own days alone."""
    keys = named(alice={"key": "a"}, boss={"key": "b", "sees_all_usage": True})
    async with serving(server=keys) as it:
        for key in ("a", "plain"):
            video = (await it.client.post("/v1/videos", json=SMALL, headers=headers(key))).json()
            await it.service.wait(video["id"])
        seen = {}
        for key in ("a", "b", "plain"):
            days = (await it.client.get("/v1/usage", headers=headers(key))).json()["data"]
            seen[key] = sorted(day["key"] for day in days)
        plain = key_id("plain")[:8]
        assert seen == {"a": ["alice"], "b": sorted(["alice", plain]), "plain": [plain]}


def test_each_key_has_one_owner() -> None:
    """A name for those with one, else a digest."""
    keys = named(alice={"key": ["one", "two"]}, bob={"key": " three "})
    known = Keys("plain", keys.keys_by_id)
    owners = [known.identify({"api-key": key}) for key in ("one", "two", "three", "plain")]
    assert owners == ["name:alice", "name:alice", "name:bob", key_id("plain")]
    assert all(known.accepts(owner) for owner in owners)
    assert not known.accepts(key_id("one"))
    assert named_digests(keys.keys_by_id)[key_id("two")] == "name:alice"
    assert keys.num_keys == 3


@pytest.mark.parametrize(
    "keys",
    [
        {"alice": {}},
        {"alice": {"key": " , "}},
        {"alice": {"key": ["a,b"]}},
        {"a b": {"key": "x"}},
        {"": {"key": "x"}},
        {"a" * 49: {"key": "x"}},
        {"alice": {"key": "x", "max_queued": 0}},
        {"alice": {"key": "x", "limit": 3}},
        {"alice": {"key": "x"}, "bob": {"key": "y,x"}},
        {"alice": {"key": "plain"}},
        "alice=x",
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: object) -> None:
    """No secret is told."""
    with pytest.raises(ValidationError) as refused:
        ServerSettings.model_validate({"api_keys": "plain", "keys": keys})
    assert all("plain" not in error["msg"] for error in refused.value.errors())


def test_a_key_is_masked() -> None:
    """Where settings are printed."""
    assert "hunter2" not in repr(KeySettings.model_validate({"key": "hunter2"}))
