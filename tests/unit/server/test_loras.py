"""LoRAs over HTTP: listed as they are now, asked for in each kind of body, and named in answers and manifests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from kinema.engines.fake import FakeEngine
from kinema.errors import InvalidRequest
from kinema.request.capabilities import LoraInfo
from tests.serving import SMALL, Gate, Serving, serving
from tests.unit.server.test_generations import as_form
from tests.unit.server.test_videos import URL, create, error, finished

PAPER = LoraInfo(name="paper", digest="a" * 64, scale=0.7, trigger_words=("folded",), rank=16, size_bytes=1000)
CLAY = LoraInfo(name="clay", digest="b" * 64)
FORM = {"content-type": "multipart/form-data; boundary=b"}


@pytest.fixture
async def it() -> AsyncIterator[Serving]:
    async with serving(FakeEngine(loras=[PAPER, CLAY])) as running:
        yield running


def form_of(*fields: tuple[str, str]) -> bytes:
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    return ("".join(parts) + "--b--").encode()


def used(video: dict[str, Any]) -> list[tuple[str, float]]:
    return [(use["name"], use["scale"]) for use in video.get("loras", [])]


async def test_models_show_their_loras_of_now(it: Serving) -> None:
    """In the list and alone; a file that came or went is seen without a restart."""
    one = (await it.client.get("/v1/models/fake")).json()
    assert one["loras"][0] == {
        "name": "paper",
        "digest": "a" * 64,
        "scale": 0.7,
        "trigger_words": ["folded"],
        "rank": 16,
        "is_for": None,
        "size_bytes": 1000,
    }
    error(await it.client.post(URL, json=SMALL | {"loras": "wood"}), 400)
    it.engine.loras = (LoraInfo(name="wood", digest="c" * 64),)
    (listed,) = (await it.client.get("/v1/models")).json()["data"]
    assert [info["name"] for info in listed["loras"]] == ["wood"]
    assert used(await create(it, loras="wood")) == [("wood", 1.0)]
    refusal = error(await it.client.post(URL, json=SMALL | {"loras": "paper"}), 400)
    assert (refusal["param"], refusal["message"]) == ("loras", "fake has no LoRA 'paper'; there are wood")


async def test_a_lora_that_cannot_be_used_after_all_is_a_refusal() -> None:
    """The worker alone reads its tensors: the synchronous call answers 400 with its sentence, as for any refusal."""

    def damaged(_request: object) -> None:
        raise InvalidRequest("the LoRA paper has values that are not finite", param="loras")

    async with serving(FakeEngine(loras=[PAPER], on_read=damaged)) as it:
        refusal = error(await it.client.post("/v1/videos/generations", json=SMALL | {"loras": "paper"}), 400)
    assert (refusal["code"], refusal["type"]) == ("invalid_value", "invalid_request_error")
    assert refusal["message"] == "the LoRA paper has values that are not finite"


async def test_a_video_names_its_loras(it: Serving) -> None:
    """With digest and strength, at once, at its end and in its manifest; one without has none of it."""
    video = await create(it, loras=[{"name": "paper", "scale": 0.5}])
    expected = [{"name": "paper", "digest": "a" * 64, "scale": 0.5, "scale_2": None}]
    assert video["loras"] == expected
    assert (await finished(it, video))["loras"] == expected
    manifest = (await it.client.get(f"{URL}/{video['id']}/content", params={"variant": "manifest"})).json()
    assert manifest["request"]["loras"] == [{"name": "paper", "digest": "a" * 64, "scale": 0.5}]
    plain = await create(it)
    assert "loras" not in await finished(it, plain)
    manifest = (await it.client.get(f"{URL}/{plain['id']}/content", params={"variant": "manifest"})).json()
    assert "loras" not in manifest["request"]


async def test_what_an_answer_names_can_be_asked_for_again(it: Serving) -> None:
    """As it stands there."""
    video = await create(it, loras=["clay", {"name": "paper", "scale": 0.5}])
    assert (await create(it, loras=video["loras"]))["loras"] == video["loras"]


@pytest.mark.parametrize(
    "fields",
    [
        [("loras", '[{"name": "paper", "scale": 0.5}, "clay"]')],
        [("loras", '{"name": "paper", "scale": 0.5}'), ("loras", "clay")],
        [("loras[]", '{"name": "paper", "scale": 0.5}'), ("loras[]", "clay")],
        [("loras[][name]", "paper"), ("loras[][scale]", "0.5"), ("loras[]", "clay")],
        [("loras[][name]", "paper"), ("loras[][name]", "clay"), ("loras[][scale]", "0.5"), ("loras[][scale]", "1")],
        [("loras[0][name]", "paper"), ("loras[0][scale]", "0.5"), ("loras[1][name]", "clay")],
        [("loras[7]", "clay"), ("loras[2][name]", "paper"), ("loras[2][scale]", "0.5")],
        [
            ("extra_body[loras][0][name]", "paper"),
            ("extra_body[loras][0][scale]", "0.5"),
            ("extra_body[loras][1]", "clay"),
        ],
        [("extra_body", '{"loras": [{"name": "paper", "scale": 0.5}, "clay"]}')],
    ],
)
async def test_a_form_has_loras_as_text_or_repeated(it: Serving, fields: Sequence[tuple[str, str]]) -> None:
    """As JSON text, as one field several times, and as the OpenAI SDKs spell lists of names and of objects."""
    content = form_of(("prompt", "a"), ("size", "64x64"), ("num_frames", "1"), *fields)
    answer = await it.client.post(URL, content=content, headers=FORM)
    assert (answer.status_code, used(answer.json())) == (200, [("paper", 0.5), ("clay", 1.0)]), answer.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("loras[][name]", "a"), ("loras[][name]", "b"), ("loras[][scale]", "1")], "entries of loras have different"),
        ([("loras", "paper"), ("loras[name]", "clay")], "is given more than once"),
        ([("loras[name]", "clay"), ("loras[][name]", "paper")], "is given more than once"),
        ([("loras", "paper"), ("loras", "paper")], "the LoRA 'paper' is given more than once"),
        ([("loras[0]", "clay"), ("loras[0][name]", "paper")], "is given more than once"),
        ([("loras[0][name]", "clay"), ("loras[0][name]", "paper")], "loras[0][name] is given more than once"),
        ([("loras[0][name]", "clay"), ("loras[]", "paper")], "is given more than once"),
        ([("loras[0][name][x]", "clay")], "loras.0.name must be text"),
        ([("loras[0][name", "clay")], "unknown field 'loras[0][name'"),
        ([("loras[0]" + "[a]" * 9, "clay")], "unknown field 'loras[0][a]"),
        ([("", "clay")], "unknown field ''"),
        ([("[]", "clay")], "unknown field '[]'"),
        ([("[][]", "clay")], "unknown field '[][]'"),
        ([("seed", "1"), ("seed", "1")], "seed is given more than once"),
        ([("loras", '["paper"]'), ("loras", "clay")], "has no LoRA"),
    ],
)
async def test_a_form_that_is_unclear_is_refused(it: Serving, fields: Sequence[tuple[str, str]], message: str) -> None:
    """Rather than guessed at."""
    answer = await it.client.post(URL, content=form_of(("prompt", "a"), *fields), headers=FORM)
    assert message in error(answer, 400)["message"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "fake:paper"}, [("paper", 0.7)]),
        ({"model": "fake:paper,clay"}, [("paper", 0.7), ("clay", 1.0)]),
        ({"model": "fake:paper", "loras": ["clay"]}, [("paper", 0.7), ("clay", 1.0)]),
        ({"model": "fake:paper", "loras": [{"name": "paper", "scale": 0.1}]}, [("paper", 0.1)]),
    ],
)
async def test_the_name_of_a_model_may_have_loras(it: Serving, fields: dict[str, Any], expected: object) -> None:
    """For clients that can set nothing else. The model of the video is the model's own name, also in an estimate."""
    video = await create(it, **fields)
    assert (video["model"], used(video)) == ("fake", expected)
    answer = await it.client.post(f"{URL}/estimate", json=SMALL | fields)
    assert (answer.status_code, used(answer.json())) == (200, expected)


async def test_a_name_that_is_no_model_is_told_so(it: Serving) -> None:
    """And a LoRA that is none behind a model is told as one."""
    assert error(await it.client.post(URL, json=SMALL | {"model": "fake:wood"}), 400)["param"] == "loras"
    assert error(await it.client.post(URL, json=SMALL | {"model": "other:paper"}), 404)["param"] == "model"
    assert error(await it.client.post(URL, json=SMALL | {"model": "fake:"}), 400)["param"] == "loras"


async def test_an_alias_may_have_loras_too() -> None:
    """The video has the model's own name."""
    async with serving(FakeEngine(aliases=["pretty"], loras=[PAPER])) as it:
        video = await create(it, model="pretty:paper")
        assert (video["model"], used(video)) == ("fake", [("paper", 0.7)])


async def test_the_own_name_of_a_model_wins() -> None:
    """One with a colon is not taken apart."""
    async with serving(FakeEngine("own:paper", loras=[PAPER])) as it:
        video = await create(it, model="own:paper")
        assert (video["model"], used(video)) == ("own:paper", [])
        assert used(await create(it, model="own:paper:paper")) == [("paper", 0.7)]


async def test_loras_change_the_video(it: Serving) -> None:
    """Each, and each strength of it; the same make the same bytes, in a remix too."""
    bodies: list[dict[str, Any]] = [
        {},
        {"loras": "paper"},
        {"loras": "clay"},
        {"loras": [{"name": "clay", "scale": 2}]},
    ]
    videos = [await finished(it, await create(it, seed=3, **body)) for body in bodies]
    remix = await it.client.post(f"{URL}/{videos[3]['id']}/remix", json={"prompt": SMALL["prompt"]})
    videos.append(await finished(it, remix.json()))
    films = [(await it.client.get(video["data"][0]["url"])).content for video in videos]
    assert len(set(films)) == 4
    assert films[3] == films[4]
    assert videos[4]["loras"] == videos[3]["loras"]


async def test_a_submission_with_other_loras_is_another_one(it: Serving) -> None:
    """Under one key it is refused; without a key it is no second try of the first."""
    key = {"idempotency-key": "k"}
    first = await it.client.post(URL, json=SMALL | {"loras": "paper"}, headers=key)
    assert (await it.client.post(URL, json=SMALL | {"loras": "paper"}, headers=key)).json()["id"] == first.json()["id"]
    error(await it.client.post(URL, json=SMALL | {"loras": "clay"}, headers=key), 400)
    retry = {"x-stainless-retry-count": "1"}
    ids = {
        (await it.client.post(URL, json=SMALL | {"loras": name}, headers=retry)).json()["id"]
        for name in ("paper", "clay")
    }
    assert len(ids) == 2


async def test_a_video_whose_lora_went_fails_with_a_sentence() -> None:
    """It was there when the video was asked for."""
    gate = Gate()
    engine = FakeEngine(loras=[PAPER], on_output=gate)
    async with serving(engine) as it:
        others = [await create(it) for _ in range(2)]  # they have both places
        video = await create(it, loras="paper")
        engine.loras = (PAPER.model_copy(update={"digest": "c" * 64}),)
        gate.is_open.set()
        done = await finished(it, video)
        assert (done["status"], done["error"]["code"]) == ("failed", "invalid_value")
        assert "the LoRA paper is gone, or another one than when the video was asked for" in done["error"]["message"]
        assert [(await finished(it, other))["status"] for other in others] == ["completed"] * 2
        remix = await it.client.post(f"{URL}/{video['id']}/remix", json={"prompt": "b"})
        assert "is not the file that is asked for" in error(remix, 400)["message"]


async def test_all_calls_take_loras(it: Serving) -> None:
    """The synchronous call, edits and extensions, in JSON and as a form."""
    first = await finished(it, await create(it))
    sent = {"prompt": "b", "loras": json.dumps(["clay"]), "num_frames": "5", "num_inference_steps": "2"}
    video = {"video": json.dumps({"id": first["id"]}), "strength": "0.5"}
    answers = [
        await it.client.post(f"{URL}/generations", files=as_form(sent)),
        await it.client.post(f"{URL}/edits", files=as_form(sent | video)),
        await it.client.post(f"{URL}/extensions", json=sent | {"video": {"id": first["id"]}, "loras": ["clay"]}),
    ]
    assert [used(answer.json()) for answer in answers] == [[("clay", 1.0)]] * 3
