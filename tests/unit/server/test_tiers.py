"""Tiers over HTTP: listed where they can be made, chosen by a field or by the model's name, and named in answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from kinema.engines.fake import FakeEngine
from tests.serving import SMALL, Serving, serving
from tests.unit.request.test_tiers import CLAY, DRAFT, FAST, GONE, QUICK
from tests.unit.server.test_generations import as_form
from tests.unit.server.test_videos import URL, create, error, finished

BODY = {name: value for name, value in SMALL.items() if name != "num_inference_steps"}


@pytest.fixture
async def it() -> AsyncIterator[Serving]:
    engine = FakeEngine(aliases=["pretty"], loras=[FAST, CLAY], tiers=[DRAFT, QUICK, GONE])
    async with serving(engine) as running:
        yield running


async def made(it: Serving, **fields: Any) -> dict[str, Any]:
    answer = await it.client.post(URL, json=BODY | fields)
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


async def test_a_model_shows_the_tiers_that_can_be_made(it: Serving) -> None:
    """One whose LoRA comes is offered from then on."""
    model = (await it.client.get("/v1/models/fake")).json()
    assert [tier["name"] for tier in model["tiers"]] == ["draft", "quick"]
    assert model["tiers"][0]["timesteps"] == [1000, 750.5, 250]
    assert model["tiers"][0]["loras"] == [{"name": "fast", "scale": 0.9, "scale_2": None}]
    assert error(await it.client.post(URL, json=BODY | {"tier": "gone"}), 400)["param"] == "tier"
    it.engine.loras = (*it.engine.loras, FAST.model_copy(update={"name": "wood"}))
    assert (await made(it, tier="gone"))["tier"] == "gone"


async def test_a_video_names_its_tier_and_what_made_it(it: Serving) -> None:
    """At once, at its end, in its estimate and in its manifest; one without has none of it."""
    video = await made(it, tier="draft")
    estimate = (await it.client.post(f"{URL}/estimate", json=BODY | {"tier": "draft"})).json()
    for answer in (video, estimate, await finished(it, video)):
        assert (answer["tier"], answer["solver"], answer["timesteps"]) == ("draft", "lcm", [1000, 750.5, 250])
        assert (answer["num_inference_steps"], answer["loras"][0]["digest"]) == (3, FAST.digest)
    manifest = (await it.client.get(f"{URL}/{video['id']}/content", params={"variant": "manifest"})).json()
    assert (manifest["request"]["tier"], manifest["request"]["timesteps"]) == ("draft", [1000, 750.5, 250])
    assert not {"tier", "solver", "timesteps"} & (await create(it)).keys()


@pytest.mark.parametrize(
    ("fields", "loras"),
    [
        ({"model": "fake@draft"}, ["fast"]),
        ({"model": "pretty@draft"}, ["fast"]),
        ({"model": "fake@draft:clay"}, ["fast", "clay"]),
        ({"model": "pretty:clay", "tier": "draft"}, ["fast", "clay"]),
    ],
)
async def test_the_name_of_a_model_may_have_a_tier(it: Serving, fields: dict[str, Any], loras: list[str]) -> None:
    video = await made(it, **fields)
    assert (video["model"], video["tier"]) == ("fake", "draft")
    assert [use["name"] for use in video["loras"]] == loras


async def test_a_form_may_have_a_tier(it: Serving) -> None:
    answer = await it.client.post(URL, files=as_form({"prompt": "a", "size": "64x64", "tier": "quick"}))
    assert (answer.json()["tier"], answer.json()["num_inference_steps"]) == ("quick", 2)


async def test_what_is_no_tier_is_told(it: Serving) -> None:
    """And a model's own name wins."""
    assert error(await it.client.post(URL, json=BODY | {"model": "fake@best"}), 400)["param"] == "tier"
    assert error(await it.client.post(URL, json=BODY | {"model": "other@draft"}), 404)["param"] == "model"
    await made(it, model="fake")
    assert error(await it.client.post(URL, json=BODY | {"model": "fake@"}), 404)["param"] == "model"
    for name in ("solver", "timesteps", "kept_tier"):  # a client cannot set them
        assert error(await it.client.post(URL, json=BODY | {name: "lcm"}), 400)["param"] == name
    async with serving(FakeEngine("own@draft", tiers=[QUICK])) as other:
        assert "tier" not in await made(other, model="own@draft")
        assert (await made(other, model="own@draft@quick"))["tier"] == "quick"


async def test_a_remix_may_name_another_tier(it: Serving) -> None:
    """By the model's name too."""
    first = await finished(it, await made(it, tier="draft", loras=["clay"]))
    remix = f"{URL}/{first['id']}/remix"
    kept = (await it.client.post(remix, json={"prompt": "b"})).json()
    assert (kept["tier"], kept["timesteps"], kept["loras"]) == ("draft", first["timesteps"], first["loras"])
    same = (await it.client.post(remix, json={"prompt": "b", "model": "fake@draft"})).json()
    assert (same["tier"], same["loras"]) == ("draft", first["loras"])
    other = (await it.client.post(remix, json={"prompt": "b", "model": "fake@quick"})).json()
    assert (other["tier"], other["num_inference_steps"]) == ("quick", 2)
    assert [use["name"] for use in other["loras"]] == ["clay"]
