"""The first frame in every form in which the SDK sends a file, or that its documentation shows."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

from tests.e2e.openai_sdk.sdk import (
    AS_JSON,
    QUICK,
    SMALL,
    Unsized,
    create,
    data_url,
    download,
    effective,
    finish,
    frames_of,
    picture,
)

PNG = picture()


def _path(folder: Path, name: str = "ref.png") -> Path:
    (folder / name).write_bytes(PNG)
    return folder / name


FILES: dict[str, Callable[[Path], Any]] = {
    "tuple": lambda _: ("first frame.png", PNG, "image/png"),
    "name_alone": lambda _: ("f.png", PNG),
    "wrong_type": lambda _: ("f.jpg", PNG),
    "octet_stream": lambda _: ("f.bin", PNG, "application/octet-stream"),
    "bytes": lambda _: PNG,
    "bytes_io": lambda _: io.BytesIO(PNG),
    "path": _path,
    "unknown_extension": lambda folder: _path(folder, "ref.zzz"),
    "open_file": lambda folder: (_path(folder).name, io.BytesIO(PNG)),
    "escaped_name": lambda _: ('猫 "x"\r\n../../é.png', PNG, "image/png"),
    "own_headers": lambda _: ("f.png", PNG, "image/png", {"X-Own": "1"}),
    "chunked": lambda _: ("f.png", Unsized(PNG), "image/png"),
    "list_of_one": lambda _: [PNG],
}
TEXTS: dict[str, Any] = {
    "text_data_url": data_url(PNG),
    "object": {"image_url": data_url(PNG)},
    "base64": data_url(PNG).partition(",")[2],
}


@pytest.fixture
def reference(client: OpenAI) -> tuple[dict[str, Any], bytes]:
    """The video of the picture, asked for in plain JSON."""
    body = {"input_reference": {"image_url": data_url(PNG)}}
    video = finish(client, client.videos.create(**SMALL, extra_body=QUICK | body, extra_headers=AS_JSON))
    without = finish(client, create(client))
    film = download(client, video)
    assert film != download(client, without)
    return effective(video), film


def test_every_form_of_a_file_makes_the_same_video(
    client: OpenAI, reference: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    """The bytes decide: neither the name, nor the declared type, nor how they are sent."""
    for form, make in FILES.items():
        made = finish(client, create(client, input_reference=make(tmp_path)))
        assert (effective(made), download(client, made)) == reference, form


@pytest.mark.parametrize("as_json", [False, True], ids=["multipart", "json"])
def test_every_form_of_a_text_makes_the_same_video(
    client: OpenAI, reference: tuple[dict[str, Any], bytes], as_json: bool
) -> None:
    """A data URL, by itself or in an object (``input_reference[image_url]`` in multipart), and base64."""
    headers = AS_JSON if as_json else None
    for form, text in TEXTS.items():
        body = QUICK | {"input_reference": text}
        made = finish(client, client.videos.create(**SMALL, extra_body=body, extra_headers=headers))
        assert (effective(made), download(client, made)) == reference, form


@pytest.mark.parametrize("form", ["files", "texts", "texts in json", "last_frame"])
def test_a_second_picture_is_the_last_frame(client: OpenAI, form: str) -> None:
    """As a list of files or of texts in ``input_reference``, or in a field of its own."""
    last = Image.new("RGB", (64, 64), (30, 180, 60))
    buffer = io.BytesIO()
    last.save(buffer, "PNG")
    pictures = [data_url(PNG), data_url(buffer.getvalue())]
    match form:
        case "files":
            video = create(client, input_reference=[PNG, buffer.getvalue()])
        case "last_frame":
            video = create(client, input_reference=PNG, last_frame=pictures[1])
        case _:
            headers = AS_JSON if form == "texts in json" else None
            body = QUICK | {"input_reference": pictures}
            video = client.videos.create(**SMALL, extra_body=body, extra_headers=headers)
    made = frames_of(download(client, finish(client, video)))
    assert np.abs(made[-1] - np.asarray(last, dtype=float)).mean() < 4
    assert np.abs(made[0] - np.asarray(last, dtype=float)).mean() > 20


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_jpeg_and_webp_are_images_too(client: OpenAI, kind: str) -> None:
    """Under any name."""
    assert finish(client, create(client, input_reference=picture(kind))).status == "completed"


def test_a_file_becomes_the_first_frame_of_the_real_model(tiny: OpenAI) -> None:
    """By the SDK, to the video's first frame."""
    made = finish(tiny, create(tiny, prompt="it moves up", input_reference=("f.png", PNG, "image/png")))
    wanted = np.asarray(Image.open(io.BytesIO(PNG)).convert("RGB"), dtype=float)
    assert np.abs(frames_of(download(tiny, made))[0] - wanted).mean() < 12


@pytest.mark.parametrize("as_json", [False, True], ids=["multipart", "json"])
@pytest.mark.parametrize(
    "value",
    [
        {"file_id": "file-123"},
        {"image_url": "https://example.com/f.png"},
        {"image_url": data_url(PNG), "file_id": "file-123"},
        {"image_url": {"href": data_url(PNG)}},
        "https://example.com/f.png",
        "not base64!",
        "data:image/png,plain",
        data_url(b"no image"),
        [data_url(PNG)] * 3,
    ],
    ids=["file_id", "http_object", "both", "nested", "http", "text", "not_base64", "no_image", "three"],
)
def test_what_is_no_image_is_refused(client: OpenAI, value: object, as_json: bool) -> None:
    """400 that names input_reference; no server is asked for a picture."""
    headers = AS_JSON if as_json else None
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(**SMALL, extra_body=QUICK | {"input_reference": value}, extra_headers=headers)
    assert str(caught.value.param).startswith("input_reference")
    assert client.videos.list().data == []


@pytest.mark.parametrize(
    "file",
    [(None, PNG, "image/png"), ("", PNG, "image/png"), b"", b"GIF89a", PNG[:60], [PNG] * 3],
    ids=["no_name", "empty_name", "empty", "gif", "cut_short", "three"],
)
def test_files_that_cannot_be_used_are_refused(client: OpenAI, file: Any) -> None:
    """400; without a file name, a part is a text by the rules of multipart, and those bytes are no text."""
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, input_reference=file)
    assert caught.value.param == "input_reference"


def test_a_large_data_url_is_taken_as_a_part(client: OpenAI) -> None:
    """More than the 1 MiB that frameworks allow a text part."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    url = data_url(file.getvalue())
    assert len(url) > 1.5 * 2**20
    video = client.videos.create(**SMALL, extra_body=QUICK | {"input_reference": {"image_url": url}})
    assert finish(client, video).status == "completed"


@pytest.mark.parametrize("value", [{"image_url": "data:,"}, "https://example.com/x.png", {"file_id": "f"}])
def test_the_sdk_itself_refuses_objects_as_a_named_argument(client: OpenAI, value: Any) -> None:
    """Although its types allow them; they go through ``extra_body``. Should this change, the forms above cover it."""
    with pytest.raises(RuntimeError, match="input_reference"):
        client.videos.create(**SMALL, input_reference=value)
