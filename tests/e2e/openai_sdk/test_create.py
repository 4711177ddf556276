"""``videos.create``: what the SDKs send makes the same video, whichever encoding they choose."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import openai
import pytest
from openai import AzureOpenAI, OpenAI

from tests.e2e.openai_sdk.conftest import Connect
from tests.e2e.openai_sdk.sdk import (
    AS_JSON,
    QUICK,
    SMALL,
    by_old_sdk,
    connect,
    create,
    download,
    effective,
    finish,
    picture,
    recording,
)
from tests.server_process import Server

PARAMETERS: dict[str, Any] = {
    "num_frames": 9,
    "num_inference_steps": 3,
    "fps": 12,
    "guidance_scale": 3e-7,
    "flow_shift": 4.5,
    "seed": 2**62 + 1,
    "negative_prompt": "123",
    "user": "somebody",
}
CRLF_AND_CJK = "一只猫 “走路”\r\n\r\n\twalks --boundary\r\n🐈 100% = a&b"
ENCODINGS = pytest.mark.parametrize("as_json", [False, True], ids=["multipart", "json"])


def test_both_sdks_make_the_same_video_of_a_text(tiny: OpenAI, tiny_server: Server) -> None:
    """The old one sends JSON, the new one multipart; the resolved parameters and the MP4 are the same."""
    arguments = SMALL | {"model": "tiny-wan", "seconds": "0.5", "extra_body": {"num_inference_steps": 2, "seed": 7}}
    sent: list[Any] = []
    with recording(sent) as http, connect(tiny_server, http_client=http) as client:
        made = finish(tiny, client.videos.create(**arguments))
    (by_old,) = by_old_sdk(tiny_server, {"method": "create", "arguments": arguments})
    assert sent[0].headers["content-type"].startswith("multipart/form-data")
    assert by_old["sent"] == "application/json"
    old = finish(tiny, tiny.videos.retrieve(by_old["result"]["id"]))
    assert made.status == old.status == "completed"
    assert effective(made) == effective(old)
    assert download(tiny, made) == download(tiny, old)


def test_every_method_of_the_old_sdk_works(client: OpenAI, fake_server: Server) -> None:
    """Also a creation with a file, which is multipart there too, and a failure, which is an answer."""
    made = finish(client, create(client))
    whole = download(client, made)
    file = {"input_reference": ["first.png", base64.b64encode(picture()).decode(), "image/png"]}
    of_it = {"arguments": {"video_id": made.id}}
    waves = {"prompt": "waves [fail]", "size": "64x64"}
    film, remix, with_file, failed, listed, deleted, gone = by_old_sdk(
        fake_server,
        {"method": "download_content"} | of_it,
        {"method": "remix", "arguments": {"video_id": made.id, "prompt": "at night"}},
        {"method": "create", "arguments": SMALL | {"extra_body": QUICK}, "files": file},
        {"method": "create_and_poll", "arguments": waves},
        {"method": "list", "arguments": {"limit": 2}},
        {"method": "delete"} | of_it,
        {"method": "retrieve"} | of_it,
        api_key=client.api_key,
    )
    assert base64.b64decode(film["result"]) == whole
    assert remix["result"]["remixed_from_video_id"] == made.id
    assert with_file["sent"] == "multipart/form-data"
    again = create(client, input_reference=picture())
    assert effective(finish(client, client.videos.retrieve(with_file["result"]["id"]))) == effective(
        finish(client, again)
    )
    assert failed["result"]["error"]["code"] == "engine_failed"
    assert len(listed["result"]) == 4
    assert (deleted["sent"], deleted["result"]["deleted"]) == ("application/json", True)
    assert (gone["status"], gone["error"]["code"]) == (404, "not_found")


@ENCODINGS
def test_every_parameter_is_taken(client: OpenAI, as_json: bool) -> None:
    """Through ``extra_body``; the answer has the values that were sent, a text that looks like a number too."""
    video = create(client, as_json=as_json, **PARAMETERS)
    assert {name: getattr(video, name) for name in PARAMETERS} == PARAMETERS
    assert (video.size, video.seconds, video.prompt, video.model) == ("64x64", "0.75", SMALL["prompt"], "fake")


def test_both_encodings_make_the_same_video(client: OpenAI) -> None:
    """Of every parameter, to the byte."""
    form, plain = (finish(client, create(client, as_json=as_json, **PARAMETERS)) for as_json in (False, True))
    assert effective(form) == effective(plain)
    assert download(client, form) == download(client, plain)


@ENCODINGS
@pytest.mark.parametrize("name", ["guidance_scale_2", "boundary_ratio"])
def test_parameters_of_other_models_are_refused(client: OpenAI, name: str, as_json: bool) -> None:
    """A model with one expert has no use for those of a second."""
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, as_json=as_json, **{name: 0.5})
    assert (caught.value.param, caught.value.code) == (name, "unsupported")


@ENCODINGS
def test_none_and_empty_numbers_are_as_if_absent(client: OpenAI, as_json: bool) -> None:
    """Multipart leaves None out, JSON sends null; forms of browsers send an empty text."""
    absent = create(client, as_json=as_json, num_frames=None, guidance_scale=None, flow_shift=None)
    empty = create(client, as_json=as_json, num_frames="", guidance_scale="", flow_shift="")
    bare = client.videos.create(**SMALL, extra_body={"seed": 7, "num_inference_steps": 2})
    assert effective(absent) == effective(empty) == effective(bare)
    assert isinstance(create(client, as_json=as_json, seed=None).seed, int)


@ENCODINGS
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_frames", "many"),
        ("num_frames", 5.5),
        ("num_frames", True),
        ("num_inference_steps", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("fps", [8, 9]),
        ("guidance_scale", "nan"),
        ("flow_shift", "1,5"),
        ("seconds", "soon"),
        ("flow_shift", -1),
        ("size", "64"),
        ("size", "64x64x64"),
        ("prompt", ""),
        ("num_frame", 5),
    ],
)
def test_a_bad_value_is_refused_by_name(client: OpenAI, name: str, value: object, as_json: bool) -> None:
    """400 with the parameter and a sentence, and no video."""
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, as_json=as_json, **{name: value})
    error = caught.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", name)
    assert name in error.message
    assert client.videos.list().data == []


@pytest.mark.parametrize("seconds", ["4", "4.0", 4, 4.0])
def test_seconds_may_be_a_text_or_a_number(client: OpenAI, seconds: Any) -> None:
    """And come back as a text: 33 frames at 8 a second."""
    for as_json in (False, True):
        video = create(client, as_json=as_json, seconds=seconds, num_frames=None)
        assert (video.num_frames, video.seconds) == (33, "4.12")


def test_extra_body_overrides_the_named_arguments(client: OpenAI) -> None:
    """As the SDK promises: one value goes out, and it is that one."""
    assert create(client, size="64x64").size == "64x64"
    assert client.videos.create(**SMALL, extra_body=QUICK | {"size": "96x64"}).size == "96x64"


@pytest.mark.parametrize("name", ["extra_body", "extra_params"])
def test_an_envelope_of_parameters_is_opened(client: OpenAI, name: str) -> None:
    """Some clients send what their library has no argument for as one JSON text."""
    video = client.videos.create(**SMALL, extra_body={name: json.dumps(QUICK | {"fps": 9})})
    assert (video.fps, video.num_frames, video.seed) == (9, 5, 7)


@ENCODINGS
def test_a_prompt_comes_through_as_it_is(client: OpenAI, as_json: bool) -> None:
    """Line ends, tabs, Chinese, emoji and what looks like a boundary."""
    assert create(client, as_json=as_json, prompt=CRLF_AND_CJK).prompt == CRLF_AND_CJK


@ENCODINGS
def test_the_longest_prompt_is_taken_and_a_longer_one_refused(client: OpenAI, as_json: bool) -> None:
    """32,000 characters, which in Chinese are 96 kB; a part of more than 1 MiB is a 400 like any other."""
    assert create(client, as_json=as_json, prompt="猫" * 32_000).prompt == "猫" * 32_000
    with pytest.raises(openai.BadRequestError, match="at most 32000") as caught:
        create(client, as_json=as_json, prompt="x" * (2**20 + 1))
    assert caught.value.param == "prompt"


def test_a_model_that_is_not_served_is_named(client: OpenAI) -> None:
    """404 as OpenAI answers, with the models that there are."""
    with pytest.raises(openai.NotFoundError, match="there is fake") as caught:
        create(client, model="sora-2")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_multipart_under_the_name_of_json_is_refused(client: OpenAI) -> None:
    """The SDK does this when a caller sets the content type of a creation with a file."""
    with pytest.raises(openai.BadRequestError, match="says JSON and the body is a form"):
        client.videos.create(**SMALL, input_reference=("f.png", picture(), "image/png"), extra_headers=AS_JSON)


def test_an_answer_comes_long_before_the_video(client: OpenAI) -> None:
    """While others are made: no read timeout, so no second try of the SDK."""
    busy = [create(client, prompt="[slow] waves", num_inference_steps=200) for _ in range(2)]
    took = []
    for _ in range(5):
        started = time.monotonic()
        create(client)
        took.append(time.monotonic() - started)
    for video in busy:
        client.videos.delete(video.id)
    assert max(took) < 2.0, took


def test_a_base_url_without_v1_works(fake_server: Server, connected: Connect) -> None:
    """A common slip."""
    client = connected(base_url=fake_server.url)
    video = finish(client, create(client))
    assert download(client, video)[4:8] == b"ftyp"
    assert [found.id for found in client.videos.list()] == [video.id]


def test_azures_client_works(fake_server: Server, api_key: str) -> None:
    """It sends its key as ``api-key`` and a version in the query."""
    with AzureOpenAI(base_url=f"{fake_server.url}/v1", api_key=api_key, api_version="2025-04-01-preview") as client:
        video = finish(client, create(client))
        assert video.status == "completed"
        assert client.videos.delete(video.id).deleted is True
    with (
        AzureOpenAI(base_url=f"{fake_server.url}/v1", api_key="no", api_version="x") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        create(stranger)
