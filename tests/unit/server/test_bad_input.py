"""Bad requests through the whole application: a 4xx in the one shape, with a sentence about what would be accepted."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from kinema.settings import ServerSettings
from tests.serving import SMALL, Serving, serving
from tests.unit.server.test_generations import PNG_TEXT, URL, as_form, image_bytes

JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=b"}
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def it(shared: Serving) -> Serving:
    """One service for all tests here: they change nothing."""
    return shared


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error, after checking that it has the one shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"]
    assert isinstance(body["error"]["code"], str)
    return body["error"]


def png_that_claims(width: int, height: int) -> bytes:
    """A small PNG file with a large size in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": " \n"}, "prompt", "must not be empty"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": 5}, "prompt", "must be text"),
        ({"prompt": ["a"]}, "prompt", "must be text"),
        ({"prompt": "x" * 32_001}, "prompt", "at most 32000"),
        ({"prompt": "a\0b"}, "prompt", "NUL"),
        ({"negative_prompt": "x" * 32_001}, "negative_prompt", "at most 32000"),
        ({"size": "832"}, "size", "WIDTHxHEIGHT"),
        ({"size": ""}, "size", "WIDTHxHEIGHT"),
        ({"size": 832}, "size", "must be text"),
        ({"size": "0x0"}, "size", "from 1 to 4096"),
        ({"size": "-64x64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "99999x99999"}, "size", "from 1 to 4096"),
        ({"size": "65x67"}, "size", "nearest is 64x64"),
        ({"size": "16x16"}, "size", "at least 64"),
        ({"size": "4096x4096"}, "size", "at most"),
        ({"num_frames": 0}, "num_frames", "from 1 to 257"),
        ({"num_frames": -1}, "num_frames", "from 1 to 257"),
        ({"num_frames": 1e9}, "num_frames", "from 1 to 257"),
        ({"num_frames": "1e9"}, "num_frames", "from 1 to 257"),
        ({"num_frames": "NaN"}, "num_frames", "from 1 to 257"),
        ({"num_frames": "9" * 5000}, "num_frames", "number"),
        ({"num_frames": int("9" * 39)}, "num_frames", "from 1 to 257"),
        ({"num_frames": "abc"}, "num_frames", "must be a number, not 'abc'"),
        ({"num_frames": "٣"}, "num_frames", "must be a number"),
        ({"num_frames": "1_0"}, "num_frames", "must be a number"),
        ({"num_frames": 8.5}, "num_frames", "whole number"),
        ({"num_frames": True}, "num_frames", "must be a number"),
        ({"num_frames": [9]}, "num_frames", "must be a number"),
        ({"num_inference_steps": 0}, "num_inference_steps", "from 1 to 200"),
        ({"guidance_scale": "nan"}, "guidance_scale", "from 0 to 30"),
        ({"guidance_scale": "-Infinity"}, "guidance_scale", "from 0 to 30"),
        ({"guidance_scale": "1e999"}, "guidance_scale", "from 0 to 30"),
        ({"guidance_scale": -1}, "guidance_scale", "from 0 to 30"),
        ({"guidance_scale_2": 3.0}, "guidance_scale_2", "two experts"),
        ({"boundary_ratio": 0.9}, "boundary_ratio", "two experts"),
        ({"flow_shift": 0}, "flow_shift", "from 0.01 to 100"),
        ({"seconds": "abc", "num_frames": None}, "seconds", "must be a number"),
        ({"seconds": 1e9, "num_frames": None}, "seconds", "a number from"),
        ({"seconds": "abc"}, "seconds", "must be a number"),
        ({"seconds": "nan"}, "seconds", "a number above 0"),
        ({"seconds": 0}, "seconds", "a number above 0"),
        ({"fps": 0}, "fps", "from 1 to 60"),
        ({"seed": -1}, "seed", "from 0 to"),
        ({"seed": 2**63}, "seed", "from 0 to"),
        ({"stream": "maybe"}, "stream", "true or false"),
        ({"stream": 1}, "stream", "true or false"),
        ({"user": "x" * 1001}, "user", "at most 1000"),
        ({"response_format": "gif"}, "response_format", "accepted: url, b64_json"),
        ({"output_format": "avi"}, "output_format", "accepted: mp4, webm, gif"),
        ({"nvext": 5}, "nvext", "must be an object"),
        ({"nvext": []}, "nvext", 'must be an object, for instance {"fps": 16}'),
        ({"nvext": "[]"}, "nvext", "must be an object"),
        ({"nvext": "{"}, "nvext", "not valid JSON"),
        ({"nvext": {"fps": "x"}}, "nvext.fps", "must be a number"),
        ({"nvext": {"framerate": 1}}, "nvext.framerate", "known are"),
        ({"nvext": {"num_frames": 9}}, "nvext.num_frames", "differ"),
        ({"promt": "a"}, "promt", "did you mean prompt?"),
        ({"n": 2}, "n", "unknown field 'n'"),
        ({"solver": "euler"}, "solver", "unknown field 'solver'; only the tiers of a model set it"),
        ({f"f{i}": 0 for i in range(15)}, "f0", "15 unknown fields: 'f0', 'f1', "),
        ({f"f{i}": 0 for i in range(15)}, "f0", "'f9' and 5 more; known are prompt,"),
        ({"nvext": {"a": 1, "b": 2}}, "nvext.a", "2 unknown fields: 'nvext.a', 'nvext.b'; known are fps,"),
        ({"nvext": {"annotations": ["a"] * 101}}, "nvext.annotations", "has 101 entries; at most 100"),
        ({"nvext": {"annotations": [0] * 100}}, "nvext.annotations.0", "valid string"),
        ({"seed": "1" * 401}, "seed", "must be a number, not '1111"),
        ({"seed": " " * 401}, "seed", "must be a number"),
        ({"input_reference": "QUI=" + PNG_TEXT}, "input_reference", "not valid base64"),
        ({"input_reference": ""}, "input_reference", "is empty"),
        ({"size": "large"}, "size", "for instance '128x128'"),
        ({"size": "32x32"}, "size", "at least 64, for instance 128x128"),
        ({"seconds": 900, "num_frames": None}, "seconds", " at 8 fps, which are at most "),
        ({"input_reference": 5}, "input_reference", "must be an image"),
        ({"input_reference": "https://example.com/a.png"}, "input_reference", "not fetched"),
        ({"input_reference": {"image_url": "http://10.0.0.1/a.png"}}, "input_reference", "not fetched"),
        ({"input_reference": "file:///etc/passwd"}, "input_reference", "base64"),
        ({"input_reference": "/etc/passwd"}, "input_reference", "input_reference"),
        ({"input_reference": "data:image/svg+xml,<svg/>"}, "input_reference", "without base64"),
        ({"input_reference": {"file_id": "f"}}, "input_reference", "image_url"),
        ({"input_reference": {"image_url": {"url": 5}}}, "input_reference", "image_url"),
        ({"input_reference": [[PNG_TEXT]]}, "input_reference", "must be an image"),
    ],
)
async def test_bad_fields_are_named(it: Serving, fields: dict[str, Any], param: str, says: str) -> None:
    """400 with the parameter, and what it would take; no job comes of it."""
    answer = await it.client.post(URL, json=SMALL | fields)
    error = error_of(answer, 400)
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    ("name", "value", "param", "says"),
    [
        ("fps[]", "8", "fps", "must be a number"),
        ("prompt[]", "a circle", "prompt", "must be text"),
        ("last_frame[]", PNG_TEXT, "last_frame", "must be an image"),
    ],
)
async def test_a_list_is_refused_in_either_encoding(it: Serving, name: str, value: str, param: str, says: str) -> None:
    """In multipart as in JSON, in the same words, though it has one item."""
    others = {key: given for key, given in SMALL.items() if key != param}
    form = await it.client.post(URL, files=as_form(others | {name: value}))
    body = await it.client.post(URL, json=others | {param: [value]})
    assert says in error_of(form, 400)["message"]
    assert error_of(form, 400) == error_of(body, 400)


@pytest.mark.parametrize(
    "data",
    [
        image_bytes()[: len(image_bytes()) // 2],
        png_that_claims(30_000, 30_000),
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"just text",
        b"",
    ],
)
async def test_bad_images_are_refused_in_both_encodings(it: Serving, data: bytes) -> None:
    """Truncated, huge, SVG, text, empty."""
    text = base64.b64encode(data).decode()
    form = as_form(SMALL) | {"input_reference": ("f.png", data, "image/png")}
    for answer in (
        await it.client.post(URL, json=SMALL | {"input_reference": text}),
        await it.client.post(URL, files=form),
    ):
        error = error_of(answer, 400)
        assert error["param"] == "input_reference"
        assert "PNG, JPEG, WebP, AVIF, GIF or HEIC" in error["message"]


async def test_unknown_models_are_404(it: Serving) -> None:
    """With the names that are served."""
    error = error_of(await it.client.post(URL, json=SMALL | {"model": "sora-2"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "there is fake" in error["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", JSON, 400),
        (b"{", JSON, 400),
        (b"prompt=a", JSON, 400),
        (b"[1]", JSON, 400),
        (b"null", JSON, 400),
        (b'"text"', JSON, 400),
        (b'{"prompt": "\xff"}', JSON, 400),
        (b'{"prompt": "\\ud800"}', JSON, 400),
        (b'{"prompt": "a", "\\ud800": 1}', JSON, 400),
        (b'{"prompt": "a", "model": "\\ud800"}', JSON, 400),
        (b'{"prompt": "a", "size": "\\ud800"}', JSON, 400),
        (b'{"prompt": "a", "guidance_scale": NaN}', JSON, 400),
        (b'{"prompt": "a", "guidance_scale": -Infinity}', JSON, 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", JSON, 400),
        (b'{"prompt": ' + b"[" * 100_000, JSON, 400),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, JSON, 400),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--b--\r\n', JSON, 400),
        (b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b'{"prompt": "a"}', {}, 415),
        (b"<a/>", {"content-type": "text/xml"}, 415),
        (b"a", {"content-type": "\xff\xfe"}, 415),
        (b"", FORM, 400),
        (b"garbage", FORM, 400),
        (b"--b\r\n\r\na\r\n--b--\r\n", FORM, 400),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na', FORM, 400),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--b--\r\n', FORM, 400),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\0\r\n--b--\r\n', FORM, 400),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"; filename="f"\r\n\r\na\r\n--b--\r\n', FORM, 400),
        (b'{"prompt": "a"}', {"content-type": "multipart/form-data"}, 400),
        (b'{"prompt": "a"}', {"content-type": 'multipart/form-data; boundary="\xff"'}, 400),
    ],
)
async def test_bodies_that_cannot_be_read(it: Serving, content: bytes, headers: dict[str, str], status: int) -> None:
    """Whatever is sent, the answer is in the one shape."""
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    error_of(await it.client.post(URL, content=content, headers=raw), status)


@pytest.mark.parametrize("name", ["prompt", "nvext[fps]", "nvext"])
async def test_a_part_that_comes_twice_is_refused(it: Serving, name: str) -> None:
    """Rather than one of both being taken in silence."""
    parts = [*as_form(SMALL).items(), (name, (None, "1")), (name, (None, "2"))]
    assert "more than once" in error_of(await it.client.post(URL, files=parts), 400)["message"]


async def test_too_many_parts_are_refused(it: Serving) -> None:
    """Before they fill the memory."""
    error_of(await it.client.post(URL, files=[("x", (None, "1"))] * 300), 400)


@pytest.mark.parametrize("kind", [JSON, FORM])
async def test_a_body_over_the_limit_is_413_while_it_comes_in(kind: dict[str, str]) -> None:
    """Without a declared length it is read up to the limit and no further; with one it is not read at all."""
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
        for _ in range(100):
            sent += 2**20
            yield b" " * 2**20

    async with serving(server=ServerSettings(max_body_mb=2)) as it:
        error = error_of(await it.client.post(URL, content=chunks(), headers=kind), 413)
        assert "at most 2 MiB" in error["message"]
        assert sent <= 4 * 2**20
        sent = 0
        error_of(await it.client.post(URL, content=chunks(), headers=kind | {"content-length": "104857600"}), 413)
        assert sent == 0


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_a_wrong_method_is_405(it: Serving, method: str) -> None:
    """With the methods that are allowed."""
    answer = await it.client.request(method, URL)
    error = error_of(answer, 405)
    assert error["code"] == "method_not_allowed"
    assert error["message"] == f"{method} is not accepted here; POST is"
    assert answer.headers["allow"] == "POST"
