"""Each kind of film through HTTP: what it becomes is what ffmpeg shows, and what is left out is said."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio

from kinema.media.film import InputFilm, open_film
from tests.inputs.films import FILMS
from tests.inputs.shown import FFMPEG, shown_by_ffmpeg
from tests.inputs.small_engine import SmallEngine
from tests.serving import Serving, serving
from tests.unit.server.test_generations import as_form
from tests.unit.server.test_videos import URL, error, finished

pytestmark = pytest.mark.asyncio(loop_scope="module")
UInt8Array = npt.NDArray[np.uint8]
NEW_FRAMES = 5
# What H.264 changes of the frames in the answer, in the mean.
ENCODED = 1.5
ACCEPTED = [name for name, film in FILMS.items() if not film.is_refused]
SHOWN = [name for name in ACCEPTED if FILMS[name].is_shown]
REFUSED = [name for name, film in FILMS.items() if film.is_refused]


@dataclass
class Extensions:
    """The answer and the stored film of each film's extension, which is made once."""

    it: Serving
    made: dict[str, tuple[dict[str, Any], InputFilm]] = field(default_factory=dict)

    async def of(self, name: str) -> tuple[dict[str, Any], InputFilm]:
        if name not in self.made:
            answer = await send(self.it, "extensions", name, num_frames=NEW_FRAMES)
            assert answer.status_code == 200, answer.text
            video = await finished(self.it, answer.json())
            assert video["status"] == "completed", video["error"]
            self.made[name] = video, open_film((await self.it.client.get(video["data"][0]["url"])).content)
        return self.made[name]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it() -> AsyncIterator[Serving]:
    async with serving(SmallEngine()) as running:
        yield running


@pytest.fixture(scope="module")
def extensions(it: Serving) -> Extensions:
    return Extensions(it)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, UInt8Array]:
    if FFMPEG is None:
        pytest.skip("ffmpeg is not installed")
    return shown_by_ffmpeg({name: FILMS[name] for name in SHOWN}, tmp_path_factory.mktemp("shown"))


async def send(it: Serving, path: str, name: str, **asked: object) -> httpx.Response:
    fields = {"prompt": "it goes on", "num_inference_steps": 1, "size": "{}x{}".format(*FILMS[name].size)}
    return await it.client.post(f"{URL}/{path}", files=as_form(fields | asked) | {"video": ("a", FILMS[name].data)})


@pytest.mark.parametrize("name", ACCEPTED)
async def test_a_film_has_its_size_length_and_rate_and_what_is_left_out_is_said(
    extensions: Extensions, name: str
) -> None:
    """In the answer and in the stored file. That it would have to be scaled is not said."""
    film, (video, stored) = FILMS[name], await extensions.of(name)
    assert tuple(video["warnings"]) == film.says
    assert video["fps"] == film.fps
    assert stored.shape.num_frames == round(film.seconds * film.fps) + NEW_FRAMES - 1
    assert stored.has_sound == film.has_sound


@pytest.mark.parametrize("name", SHOWN)
async def test_a_film_is_what_ffmpeg_shows(extensions: Extensions, shown: dict[str, UInt8Array], name: str) -> None:
    """Frame by frame before the new ones."""
    film, (_, stored) = FILMS[name], await extensions.of(name)
    num_old = stored.shape.num_frames - NEW_FRAMES + 1
    old = np.stack(list(islice(stored.frames(stored.shape.size, film.fps), num_old)))
    assert abs(len(shown[name]) - num_old) <= 1  # ffmpeg's filter counts the last one by another rule
    count = min(len(shown[name]), num_old)
    assert np.abs(old[:count].astype(int) - shown[name][:count]).mean() < film.tolerance + ENCODED


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_no_film_is_refused(it: Serving, name: str) -> None:
    """In a sentence with what would be accepted, by each call that takes a film."""
    for path in ("extensions", "edits"):
        refusal = error(await send(it, path, name), 400)
        assert refusal["param"] == "video"
        assert FILMS[name].says[0] in refusal["message"]
        assert refusal["message"].endswith("Motion JPEG")


async def test_an_edit_leaves_out_the_sound_and_says_so(it: Serving) -> None:
    """Of each codec; what an extension says of a film is said of an edit, too."""
    for name in ("sound, AAC", "sound, Opus", "sound, PCM"):
        warnings = (await send(it, "edits", name)).json()["warnings"]
        assert "the sound of the video was left out: the new video has none" in warnings
    for name in ("stereo", "PQ", "cut in a fragment", "subtitles"):
        assert FILMS[name].says[0] in (await send(it, "edits", name)).json()["warnings"]


async def test_an_extension_by_no_frame_is_refused(it: Serving) -> None:
    """The frame that it begins with is there already."""
    refusal = error(await send(it, "extensions", "mirrored", num_frames=1), 400)
    assert refusal["param"] == "num_frames"
    assert "adds nothing" in refusal["message"]
