"""Each kind of picture through HTTP: what it becomes is what Pillow's colour management shows, and the rest is said."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

import httpx
import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
import pytest_asyncio

from kinema.media.film import open_film
from tests.inputs.pictures import PICTURES, shown_by_pillow
from tests.inputs.small_engine import SmallEngine
from tests.serving import Serving, serving
from tests.unit.server.test_generations import as_form
from tests.unit.server.test_videos import URL, error, finished

pytestmark = pytest.mark.asyncio(loop_scope="module")
UInt8Array = npt.NDArray[np.uint8]
# What H.264 changes of plain colours in the answer, in the mean.
ENCODED = 1.5
ACCEPTED = [name for name, picture in PICTURES.items() if not picture.is_refused]
REFUSED = [name for name, picture in PICTURES.items() if picture.is_refused]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it() -> AsyncIterator[Serving]:
    pillow_heif.register_heif_opener()  # for what Pillow shows
    async with serving(SmallEngine()) as running:
        yield running


def asked(name: str) -> dict[str, object]:
    size = "{}x{}".format(*PICTURES[name].size)
    return {"prompt": "it moves", "num_inference_steps": 1, "num_frames": 1, "size": size}


def is_plain(pixels: UInt8Array) -> npt.NDArray[np.bool_]:
    """Where a colour does not change for four pixels in each direction."""
    shifts = [(4, 0), (-4, 0), (0, 4), (0, -4)]
    return np.all([(np.roll(pixels, shift, axis=(0, 1)) == pixels).all(axis=-1) for shift in shifts], axis=0)


async def send(it: Serving, name: str) -> httpx.Response:
    return await it.client.post(URL, files=as_form(asked(name)) | {"input_reference": ("a", PICTURES[name].data)})


@pytest.mark.parametrize("name", ACCEPTED)
async def test_a_picture_is_what_pillow_shows_and_what_is_left_out_is_said(it: Serving, name: str) -> None:
    """As the first frame of a video. That it would have to be scaled is not said."""
    answer = await send(it, name)
    assert answer.status_code == 200, answer.text
    video = await finished(it, answer.json())
    assert tuple(video["warnings"]) == PICTURES[name].says
    film = open_film((await it.client.get(video["data"][0]["url"])).content)
    if PICTURES[name].is_shown:
        shown = shown_by_pillow(PICTURES[name])
        differences = np.abs(film.last_frame().astype(int) - shown)[is_plain(shown)]
        assert len(differences) > 500
        assert differences.mean() < ENCODED


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_no_picture_is_refused(it: Serving, name: str) -> None:
    """In a sentence with what would be accepted, as a file and as text."""
    text = base64.b64encode(PICTURES[name].data).decode()
    for answer in (await send(it, name), await it.client.post(URL, json=asked(name) | {"input_reference": text})):
        refusal = error(answer, 400)
        assert refusal["param"] == "input_reference"
        assert PICTURES[name].says[0] in refusal["message"]
        assert "25 million pixels is accepted" in refusal["message"]
