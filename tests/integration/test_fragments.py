"""Films that are watched while they are written, read back by a decoder."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from kinema.media.boxes import only_pictures
from kinema.media.fragments import codecs_of
from kinema.media.mp4 import Mp4Writer
from tests.integration.test_mp4 import boxes, moving_square

UInt8Array = npt.NDArray[np.uint8]
# The fewest for which x264 has all of its frames that refer to later ones.
NUM_FRAMES = 29


@dataclass
class Audience:
    """Viewers who keep what they are shown."""

    is_any: bool
    shown: list[bytes] = field(default_factory=list)

    def show(self, data: bytes) -> None:
        self.shown.append(data)

    @property
    def film(self) -> bytes:
        return b"".join(self.shown)


def write(path: Path, frames: UInt8Array, audience: Audience | None, fps: int | Fraction = 8) -> bytes:
    """The file, written as an engine decodes: a frame, then four at a time."""
    height, width = frames.shape[1:3]
    writer = Mp4Writer(path, width=width, height=height, fps=fps, viewers=audience)
    for start, stop in [(0, 1), *((at, at + 4) for at in range(1, len(frames), 4))]:
        writer.add(frames[start:stop])
    writer.close()
    return path.read_bytes()


def pictures(film: bytes) -> list[tuple[Fraction, UInt8Array]]:
    """Each frame's time in seconds and its pixels."""
    with av.open(io.BytesIO(film)) as container:
        frames = list(container.decode(video=0))
    assert all(frame.pts is not None for frame in frames)
    return [(frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in frames]  # type: ignore[misc]


@pytest.mark.parametrize("fps", [8, 30, Fraction(24000, 1001)])
@pytest.mark.parametrize("num_frames", [1, 2, 5, NUM_FRAMES])
def test_the_fragments_of_the_files_packets_are_the_same_pictures(
    tmp_path: Path, num_frames: int, fps: int | Fraction
) -> None:
    """At the same times, also where frames are decoded before those that come earlier."""
    late = Audience(is_any=False)
    film = write(tmp_path / "film.mp4", moving_square(num_frames), late, fps)
    shown, stored = pictures(late.film), pictures(film)
    assert (
        [time for time, _ in shown]
        == [time for time, _ in stored]
        == [number / Fraction(fps) for number in range(num_frames)]
    )
    assert all((one == other).all() for (_, one), (_, other) in zip(shown, stored, strict=True))


def test_the_files_encoder_holds_few_frames_back(tmp_path: Path) -> None:
    """Eight are encoded at once, and a frame waits for the one after it, to which it may refer; so little is left to
    do after the last one."""
    viewers = Audience(is_any=False)
    writer = Mp4Writer(tmp_path / "film.mp4", width=64, height=48, fps=8, viewers=viewers)
    num_added = 0
    while not viewers.shown:
        writer.add(moving_square(1))
        num_added += 1
    writer.abort()
    assert num_added == 8 + 1


@pytest.mark.parametrize("is_any", [False, True])
def test_viewers_do_not_change_the_file(tmp_path: Path, is_any: bool) -> None:
    """Byte for byte."""
    frames = moving_square(NUM_FRAMES)
    watched = write(tmp_path / "watched.mp4", frames, Audience(is_any))
    assert watched == write(tmp_path / "alone.mp4", frames, None)


def test_whoever_waits_gets_each_frame_at_once(tmp_path: Path) -> None:
    """The head and a fragment of one frame with the first frame, then a fragment for each four, which play already."""
    frames, viewers = moving_square(9), Audience(is_any=True)
    writer = Mp4Writer(tmp_path / "film.mp4", width=64, height=48, fps=8, viewers=viewers)
    for num_shown, (start, stop) in enumerate([(0, 1), (1, 5), (5, 9)], 2):
        writer.add(frames[start:stop])
        assert len(viewers.shown) == num_shown
        seen = pictures(viewers.film)
        assert [time for time, _ in seen] == [Fraction(number, 8) for number in range(stop)]
        for (_, pixels), frame in zip(seen, frames, strict=False):
            assert np.abs(pixels.astype(int) - frame).mean() < 3
    writer.close()
    assert len(viewers.shown) == 4  # the head and three fragments; the close adds nothing
    assert list(boxes(viewers.film)) == ["ftyp", "moov", *["moof", "mdat"] * 3]


@pytest.mark.parametrize("is_any", [False, True])
def test_the_same_frames_give_the_same_fragments(tmp_path: Path, is_any: bool) -> None:
    """And they are boxes that our own check of strangers' films takes."""
    films = []
    for name in ("one", "two"):
        viewers = Audience(is_any)
        write(tmp_path / f"{name}.mp4", moving_square(NUM_FRAMES), viewers)
        films.append(viewers.film)
    assert films[0] == films[1]
    assert only_pictures(films[0]) == films[0]


@pytest.mark.parametrize("is_any", [False, True])
def test_the_head_tells_what_it_is(tmp_path: Path, is_any: bool) -> None:
    """Size, colours, rate, and the codec as a browser asks for it."""
    viewers = Audience(is_any)
    write(tmp_path / "film.mp4", moving_square(5), viewers)
    with av.open(io.BytesIO(viewers.film)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.width, context.height, context.pix_fmt) == ("h264", 64, 48, "yuv420p")
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        assert tags == (1, 1, 1, 1)
        assert stream.average_rate == 8
        extradata = context.extradata
    assert extradata is not None
    assert codecs_of(viewers.shown[0]) == f"avc1.{extradata[1:4].hex()}"


def test_a_film_that_is_given_up_shows_nothing_more(tmp_path: Path) -> None:
    """And leaves no file."""
    viewers = Audience(is_any=True)
    writer = Mp4Writer(tmp_path / "film.mp4", width=64, height=48, fps=8, viewers=viewers)
    writer.add(moving_square(1))
    writer.abort()
    assert len(viewers.shown) == 2
    assert list(tmp_path.iterdir()) == []
