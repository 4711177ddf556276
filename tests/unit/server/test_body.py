"""How bodies are read: whole or not at all, beside the event loop when they are large, and not for ever."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kinema.errors import StorageUnavailable
from kinema.request import json_text
from kinema.request.bodies import GenerationBody
from kinema.server import body
from kinema.server.errors import UploadsFull
from kinema.server.uploads import UploadedBody, Uploads
from kinema.settings import ServerSettings
from tests.serving import SMALL, Serving, serving
from tests.unit.server.test_bad_input import FORM, JSON, error_of
from tests.unit.server.test_generations import URL, as_form, image_bytes

PROMPT_PART = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
SEED_PART = b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n5'


@pytest.mark.parametrize("end", [b"", b"\r\n", b"\r\n--b", b"\r\n--b\r\n", b"\r\n--b-"])
async def test_a_form_that_is_cut_off_is_refused(it: Serving, end: bytes) -> None:
    """Rather than made without its last field."""
    answer = await it.client.post(URL, content=PROMPT_PART + SEED_PART + end, headers=FORM)
    assert "closing boundary is missing" in error_of(answer, 400)["message"]


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=b"])
async def test_a_form_that_cannot_be_read_is_told_how_one_looks(it: Serving, kind: str) -> None:
    """In a sentence, whatever the parser's own words are."""
    error = error_of(await it.client.post(URL, content=b"garbage", headers={"content-type": kind}), 400)
    assert "each field is a part with its name" in error["message"]
    assert error["code"] == "invalid_value"


async def test_a_form_under_the_name_of_json_is_told_so(it: Serving) -> None:
    """Rather than what of it is no JSON."""
    answer = await it.client.post(URL, content=PROMPT_PART + b"--b--", headers=JSON)
    assert "content-type says JSON and the body is a form" in error_of(answer, 400)["message"]


async def test_a_file_without_a_file_name_is_refused_by_name(it: Serving) -> None:
    """It is a text by the rules of multipart, and its bytes are none."""
    part = b'--b\r\nContent-Disposition: form-data; name="input_reference[]"\r\n\r\n\x89PNG\r\n--b--'
    error = error_of(await it.client.post(URL, content=PROMPT_PART + part, headers=FORM), 400)
    assert (error["param"], "needs a file name" in error["message"]) == ("input_reference", True)


@pytest.mark.parametrize(
    "named", ["filename*=UTF-8''%E7%8C%AB.png", "FileName* = utf-8''a", "filename*=UTF-8''b.png; filename=b.png"]
)
async def test_a_file_may_be_named_in_other_letters(it: Serving, named: str) -> None:
    """As urllib3 did before version 2: by the extended name alone."""
    part = f'--b\r\nContent-Disposition: form-data; name="input_reference"; {named}\r\n\r\n'.encode()
    end = PROMPT_PART + b"--b--"
    assert (await it.client.post(URL, content=part + image_bytes() + b"\r\n" + end, headers=FORM)).status_code == 200
    empty = error_of(await it.client.post(URL, content=part + b"\r\n" + end, headers=FORM), 400)
    assert "input_reference is empty" in empty["message"]


@pytest.mark.parametrize("body", ['{"prompt": "a", "\\ud800x": 1}', '{"prompt": "a", "nvext": {"\\ud800x": 1}}'])
async def test_a_field_name_that_is_not_unicode_is_shown(it: Serving, body: str) -> None:
    """Escaped, since it cannot be written otherwise."""
    error = error_of(await it.client.post(URL, content=body, headers=JSON), 400)
    assert error["message"] == "the field name '\\ud800x' is not valid Unicode: it has a lone surrogate"


@pytest.mark.parametrize(
    "content",
    [b'{"prompt": "a", "nvext": [' + b"{}," * 50_000 + b"{}]}", b"[" * 100_001, b'{"nvext": [' + b"1," * 100_000],
)
async def test_a_body_of_very_many_values_is_refused_unread(
    it: Serving, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """30 MB of [{},{},...] would become 4 GB."""
    with monkeypatch.context() as patched:
        patched.delattr(json_text.json, "loads")
        answer = await it.client.post(URL, content=content, headers=JSON)
    assert "too many values; at most 100,000" in error_of(answer, 400)["message"]


async def test_prompts_of_nothing_but_commas_are_not_too_many_values(it: Serving) -> None:
    """The longest texts pass; base64 has none of what is counted."""
    longest = {"prompt": "," * 32_000, "nvext": {"negative_prompt": "[" * 32_000}}
    assert (await it.client.post(URL, json=SMALL | longest)).status_code == 200


async def test_a_large_body_is_parsed_beside_the_event_loop(it: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody else is served meanwhile; a small body is not worth a thread."""
    threads: list[threading.Thread] = []
    parse = body._parse_json_object

    def noted(body: bytes) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return parse(body)

    monkeypatch.setattr(body, "_parse_json_object", noted)
    for extra in (0, 70_000):
        assert (await it.client.post(URL, content=json.dumps(SMALL) + " " * extra, headers=JSON)).status_code == 200
    small, large = threads
    assert small is threading.main_thread()
    assert large is not threading.main_thread()


@pytest.mark.parametrize("kind", [JSON, FORM])
@pytest.mark.parametrize("pause_s", [None, 0.02], ids=["silence", "a byte now and then"])
async def test_a_body_that_stalls_is_408(kind: dict[str, str], pause_s: float | None) -> None:
    """The connection is closed; a client that wants to may ask again. What came fast before does not count."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"--b\r\n" + b" " * 100_000
        while True:
            await (asyncio.Event().wait() if pause_s is None else asyncio.sleep(pause_s))
            yield b" "

    async with serving(server=ServerSettings(stall_s=0.1)) as it, asyncio.timeout(10):
        answer = await it.client.post(URL, content=chunks(), headers=kind)
    assert error_of(answer, 408)["code"] == "request_timeout"
    assert (answer.headers["x-should-retry"], answer.headers["connection"]) == ("false", "close")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps({f"f{i}": 0 for i in range(201)}), "an object has 201 fields ('f0', 'f1', "),
        (json.dumps({"nvext": {f"f{i}": 0 for i in range(99_000)}}), "'f9' and 98,990 more); at most 200 are read"),
        (json.dumps({"extra_body": json.dumps({f"f{i}": 0 for i in range(300)})}), "an object has 300 fields"),
        ('{"prompt": "a", "prompt": "b"}', "prompt is given more than once"),
        ('{"prompt": "a", "nvext": {"fps": 8, "fps": 8}}', "fps is given more than once"),
        (json.dumps({"a" * 201: 0}), "names have at most 200 characters"),
    ],
)
async def test_fields_are_counted_before_they_are_looked_at(it: Serving, content: str, says: str) -> None:
    """However many there are, the answer is one sentence with ten of them; a name that comes twice means two things."""
    assert says in error_of(await it.client.post(URL, content=content, headers=JSON), 400)["message"]


@pytest.mark.parametrize("kind", ["json", "form"])
async def test_the_fields_of_a_large_body_are_checked_beside_the_event_loop(
    it: Serving, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A text in it may be JSON or base64 of many megabytes."""
    threads: list[threading.Thread] = []
    parse = GenerationBody.parse

    def noted(fields: dict[str, Any]) -> GenerationBody:
        threads.append(threading.current_thread())
        return parse(fields)

    monkeypatch.setattr(GenerationBody, "parse", noted)
    for extra in ({}, {"negative_prompt": "x" * 30_000}):
        sent = {"json": SMALL | extra} if kind == "json" else {"files": as_form(SMALL | extra)}
        assert (await it.client.post(URL, **sent)).status_code == 200
    small, large = threads
    assert small is threading.main_thread()
    assert large is not threading.main_thread()


async def test_a_body_at_a_steady_pace_may_take_long() -> None:
    """Longer than a silence may be."""

    async def chunks() -> AsyncIterator[bytes]:
        yield json.dumps(SMALL).encode()
        for _ in range(20):
            await asyncio.sleep(0.02)
            yield b" " * 2000

    async with serving(server=ServerSettings(stall_s=0.2)) as it:
        assert (await it.client.post(URL, content=chunks(), headers=JSON)).status_code == 200


@pytest.mark.parametrize("kind", [JSON, FORM])
async def test_bodies_without_space_are_503(kind: dict[str, str]) -> None:
    """One client has half of it; a small body always has room."""
    async with serving(server=ServerSettings(max_uploads_mb=1)) as it:
        answer = await it.client.post(URL, content=b" " * 600_000, headers=kind)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "uploads_full")
        assert int(answer.headers["retry-after"]) > 0
        assert (await it.client.post(URL, content=json.dumps(SMALL) + " " * 400_000, headers=JSON)).status_code == 200


async def test_space_for_bodies_is_given_back(tmp_path: Path) -> None:
    """Whatever became of them; and their files leave nothing."""
    uploads = Uploads(3_000_000, tmp_path)
    for _ in range(3):
        with suppress(UploadsFull), UploadedBody(uploads, "a") as body:
            await body.append(b"x" * 1_400_000)
            assert body.read() == b"x" * 1_400_000
            assert os.listdir(tmp_path) == []
            with pytest.raises(UploadsFull), UploadedBody(uploads, "a") as other:
                await other.append(b"x" * 1_400_000)
            with UploadedBody(uploads, "b") as of_another:
                await of_another.append(b"y" * 1_400_000)
            await body.append(b"x" * 1_400_000)
    assert uploads._taken.total() == 0


async def test_a_disk_that_is_full_is_503(tmp_path: Path) -> None:
    space = Uploads(2**30, tmp_path / "missing")
    with UploadedBody(space, "a") as body, pytest.raises(StorageUnavailable, match="cannot be stored"):
        await body.append(b"x" * 2_000_000)
