"""WebM and GIF files, read back by other readers."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kinema.media.film import open_film, read_comment
from kinema.media.planes import to_yuv
from kinema.media.writers import encoder_facts, open_writer
from kinema.request.formats import MEDIA_TYPES, OutputFormat
from kinema.request.shapes import Size
from tests.integration.test_fragments import Audience, pictures
from tests.integration.test_mp4 import UInt8Array, moving_square

KINDS = list(MEDIA_TYPES)


def write(
    path: Path, kind: OutputFormat, frames: UInt8Array, fps: int = 8, audience: Audience | None = None, chunk: int = 4
) -> bytes:
    size = Size(width=frames.shape[2], height=frames.shape[1] if frames.ndim == 4 else frames.shape[1] * 2 // 3)
    writer = open_writer(kind, path, size, fps, {"comment": "how it was made"}, audience)
    for start in range(0, len(frames), chunk):
        writer.add(frames[start : start + chunk])
    writer.close()
    return path.read_bytes()


def test_a_webm_is_vp9_with_its_frames_and_tags(tmp_path: Path) -> None:
    """In BT.709, with its index before the pictures."""
    frames = moving_square(17)
    film = write(tmp_path / "film", "webm", frames)
    opened = open_film(film)
    assert (opened.shape.num_frames, opened.shape.fps) == (17, 8)
    assert read_comment(film) == "how it was made"
    shown = np.stack(list(opened.frames(opened.shape.size, 8)))
    assert np.abs(shown.astype(int) - frames).mean() < 3
    assert film.index(bytes.fromhex("1c53bb6b")) < film.index(bytes.fromhex("1f43b675"))


def test_a_gif_repeats_its_frames_at_their_times(tmp_path: Path) -> None:
    """In hundredths of a second; their colours are near what they were."""
    frames = moving_square(9)
    with Image.open(io.BytesIO(write(tmp_path / "film", "gif", frames, fps=12))) as gif:
        assert (gif.format, gif.n_frames, gif.size, gif.info["loop"]) == ("GIF", 9, frames.shape[2:0:-1], 0)
        ends, shown = [0], []
        for number in range(9):
            gif.seek(number)
            shown.append(np.asarray(gif.convert("RGB")))
            ends.append(ends[-1] + gif.info["duration"])
    assert ends == [10 * round(100 * number / 12) for number in range(10)]
    assert np.abs(np.stack(shown).astype(int) - frames).mean() < 8


def test_a_gif_has_at_most_fifty_frames_a_second(tmp_path: Path) -> None:
    """Browsers show what is faster as slowly as ten a second."""
    with Image.open(io.BytesIO(write(tmp_path / "film", "gif", moving_square(31), fps=60))) as gif:
        durations = []
        for number in range(gif.n_frames):
            gif.seek(number)
            durations.append(gif.info["duration"])
    assert min(durations) >= 20
    assert sum(durations) == pytest.approx(1000 * 31 / 60, abs=20)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, kind: OutputFormat) -> None:
    """However they are divided, and as planes."""
    frames = moving_square(9)
    first = write(tmp_path / "a", kind, frames)
    assert write(tmp_path / "b", kind, frames, chunk=1) == first
    assert write(tmp_path / "c", kind, np.stack([to_yuv(pixels).to_ndarray() for pixels in frames])) == first
    assert write(tmp_path / "d", kind, frames[:, :, ::-1].copy()) != first


@pytest.mark.parametrize("kind", ["webm", "gif"])
@pytest.mark.parametrize("is_any", [False, True])
def test_viewers_get_an_mp4_that_grows(tmp_path: Path, kind: OutputFormat, is_any: bool) -> None:
    """Of every kind of file, whether somebody watches from the beginning or comes later."""
    frames, viewers = moving_square(9), Audience(is_any)
    assert write(tmp_path / "a", kind, frames, audience=viewers) == write(tmp_path / "b", kind, frames)
    shown = pictures(viewers.film)
    assert [time for time, _ in shown] == [Fraction(number, 8) for number in range(9)]
    assert np.abs(np.stack([pixels for _, pixels in shown]).astype(int) - frames).mean() < 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_given_up_is_gone(tmp_path: Path, kind: OutputFormat) -> None:
    """Also one without a frame."""
    writer = open_writer(kind, tmp_path / "film", Size(width=64, height=48), 8, {})
    writer.add(moving_square(2, width=64, height=48))
    writer.abort()
    writer.abort()
    with pytest.raises(ValueError, match="at least one frame"):
        open_writer(kind, tmp_path / "film", Size(width=64, height=48), 8, {}).close()
    assert not list(tmp_path.iterdir())


def test_each_kind_says_what_decides_its_bytes() -> None:
    """For the manifest."""
    assert {"x264", "vp9 options", "gif options"} <= {name for kind in KINDS for name in encoder_facts(kind)}
    assert all(encoder_facts(kind)["av"] == av.__version__ for kind in KINDS)
