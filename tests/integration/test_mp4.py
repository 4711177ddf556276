"""Films, read back by a decoder and by their boxes."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.video.reformatter import ColorRange, Colorspace

from kinema.engines.base import Frames
from kinema.engines.fake import FakeEngine
from kinema.media.mp4 import Mp4Writer, encoder_facts
from kinema.media.planes import to_yuv
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve

UInt8Array = npt.NDArray[np.uint8]


def write(path: Path, frames: UInt8Array, fps: int = 8, chunk: int = 4) -> bytes:
    writer = Mp4Writer(path, width=frames.shape[2], height=frames.shape[1], fps=fps, metadata={"title": "a cat"})
    for start in range(0, len(frames), chunk):
        writer.add(frames[start : start + chunk])
    writer.close()
    return path.read_bytes()


def moving_square(num_frames: int, width: int = 64, height: int = 48) -> UInt8Array:
    """Two pixels a frame, so that its edges stay on the grid of the halved chroma."""
    frames = np.full((num_frames, height, width, 3), (30, 60, 120), dtype=np.uint8)
    for number in range(num_frames):
        frames[number, 10:30, 2 * number : 2 * number + 20] = (220, 200, 40)
    return frames


def boxes(data: bytes) -> Iterator[str]:
    """The names of the top-level MP4 boxes in order."""
    at = 0
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        yield name.decode()
        at += length


@pytest.mark.parametrize("fps", [8, 16, 24, 30, 7])
@pytest.mark.parametrize("num_frames", [1, 2, 5, 33])
def test_rate_and_count_are_exact(tmp_path: Path, fps: int, num_frames: int) -> None:
    """Every frame is there once, at its own time, and the film is as long as it should be."""
    path = tmp_path / "film.mp4"
    write(path, moving_square(num_frames), fps)
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        times = [frame.pts * frame.time_base for frame in film.decode(stream)]
        assert stream.average_rate == fps
        assert stream.frames == num_frames
        assert stream.duration * stream.time_base == Fraction(num_frames, fps)
    assert times == [Fraction(number, fps) for number in range(num_frames)]


def test_the_stream_is_what_every_player_takes(tmp_path: Path) -> None:
    """H.264, yuv420p, BT.709 in all three tags, limited range, in the container's colr box too."""
    path = tmp_path / "film.mp4"
    data = write(path, moving_square(3))
    with av.open(str(path)) as film:
        context = film.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        # 1 is BT.709 in ITU-T H.273, and MPEG (limited) in FFmpeg's AVColorRange.
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        assert tags == (1, 1, 1, 1)
        assert film.metadata["title"] == "a cat"
    assert b"colrnclx" + struct.pack(">HHHB", 1, 1, 1, 0) in data


def test_x264_does_what_a_manifest_says_of_it(tmp_path: Path) -> None:
    """It writes into a film what it was built as and which options it followed."""
    data = write(tmp_path / "film.mp4", moving_square(2, width=256, height=256))
    facts, options = encoder_facts(), data[data.index(b" - options: ") :][:1000]
    assert f"x264 - {facts['x264']} - ".encode() in data
    params = "mbtree=0:sync-lookahead=0:force-cfr=1:bframes=1:b-adapt=0"
    assert facts["x264 options"] == f"veryfast, crf 18, {params}, 8 frames at once"
    for option in (b" subme=2 ", b" crf=18.0 ", b" mbtree=0 ", b" bframes=1 ", b" threads=8 ", b" sliced_threads=0 "):
        assert option in options


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 30, 90)]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_come_back(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    """The conversion is BT.709's own: Y, Cb and Cr as the standard's formula gives them, and RGB as it went in."""
    path = tmp_path / "film.mp4"
    write(path, np.broadcast_to(np.array(colour, np.uint8), (5, 64, 64, 3)).copy())
    with av.open(str(path)) as film:
        frame = list(film.decode(video=0))[-1]
    planes = frame.to_ndarray()
    stored = planes[0, 0], planes[64, 0], planes[80, 0]
    # ITU-R BT.709-6, sections 3.2 to 3.5, 8 bits.
    red, green, blue = (value / 255 for value in colour)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = 16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748
    assert np.allclose(stored, expected, atol=1.5)
    rgb = frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.JPEG).to_ndarray()
    assert np.abs(rgb.astype(int) - colour).max() <= 3


def test_the_index_is_in_front(tmp_path: Path) -> None:
    """A browser starts to play before the last byte came."""
    names = list(boxes(write(tmp_path / "film.mp4", moving_square(9))))
    assert names.index("moov") < names.index("mdat")


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """However they are cut into chunks; and other frames give others."""
    frames = moving_square(33)
    first = write(tmp_path / "a.mp4", frames)
    assert write(tmp_path / "b.mp4", frames, chunk=1) == first
    assert write(tmp_path / "c.mp4", frames[:, :, ::-1].copy()) != first


def test_the_bytes_do_not_depend_on_what_memory_held(tmp_path: Path) -> None:
    """x264 has features that read memory before writing it; they show on smooth frames in a churned heap."""
    can = FakeEngine().capabilities
    request = resolve(GenerationOptions(prompt="a red circle", seed=7, size="64x64", num_frames=33), can).request
    smooth = np.concatenate([part.data for part in FakeEngine().generate(request) if isinstance(part, Frames)])
    shuffle = random.Random(0)
    films = set()
    for _ in range(40):
        writer = Mp4Writer(tmp_path / "film.mp4", width=64, height=64, fps=8)
        rubbish = []
        for frame in smooth:
            rubbish.append(np.full(shuffle.randrange(100, 400_000), shuffle.randrange(256), np.uint8))
            if shuffle.random() < 0.7:
                rubbish.pop(shuffle.randrange(len(rubbish)))
            writer.add(frame[None])
        writer.close()
        films.add((tmp_path / "film.mp4").read_bytes())
    assert len(films) == 1


def test_planes_give_the_film_that_their_rgb_gives(tmp_path: Path) -> None:
    """Byte for byte, as views of larger memory too: an engine may do the conversion itself."""
    rgb = moving_square(9)
    wide = np.zeros((9, 72, 2, 64), np.uint8)
    wide[:, :, 1] = [to_yuv(pixels).to_ndarray() for pixels in rgb]
    films = []
    for name, frames in (("rgb", rgb), ("planes", wide[:, :, 1].copy()), ("views", wide[:, :, 1])):
        writer = Mp4Writer(tmp_path / f"{name}.mp4", width=64, height=48, fps=8)
        writer.add(frames[:1])
        writer.add(frames[1:])
        writer.close()
        films.append((tmp_path / f"{name}.mp4").read_bytes())
    assert films[0] == films[1] == films[2]


def test_a_film_looks_like_its_frames(tmp_path: Path) -> None:
    """At least 38 dB on a simple picture, edges and colours together."""
    path, frames = tmp_path / "film.mp4", moving_square(17)
    write(path, frames)
    with av.open(str(path)) as film:
        options = {"format": "rgb24", "src_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.JPEG}
        shown = np.stack([frame.reformat(**options).to_ndarray() for frame in film.decode(video=0)])
    error = np.mean((shown.astype(np.float64) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 38


def test_a_film_without_a_frame_is_an_error(tmp_path: Path) -> None:
    """And no file is left."""
    writer = Mp4Writer(tmp_path / "film.mp4", width=64, height=64, fps=8)
    with pytest.raises(ValueError, match="at least one frame"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_frames", [0, 3])
def test_abort_leaves_no_file(tmp_path: Path, num_frames: int) -> None:
    """Before the first frame and after some, and twice."""
    writer = Mp4Writer(tmp_path / "film.mp4", width=64, height=48, fps=8)
    writer.add(moving_square(num_frames))
    writer.abort()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, 48, 63, 3), np.uint8),
        np.zeros((48, 64, 3), np.uint8),
        np.zeros((1, 48, 64, 4), np.uint8),
        np.zeros((1, 48, 64, 3), np.float32),
        np.zeros((1, 71, 64), np.uint8),
    ],
)
def test_wrong_frames_are_refused(tmp_path: Path, frames: npt.NDArray[np.generic]) -> None:
    """With the shape that was expected."""
    writer = Mp4Writer(tmp_path / "film.mp4", width=64, height=48, fps=8)
    with pytest.raises(ValueError, match=r"expected \('f', 48, 64, 3\) uint8"):
        writer.add(frames)
    writer.abort()


@pytest.mark.parametrize(("width", "height"), [(63, 64), (64, 63), (0, 64)])
def test_odd_sizes_are_refused(tmp_path: Path, width: int, height: int) -> None:
    """yuv420p has no half pixels."""
    with pytest.raises(ValueError, match="even width and height"):
        Mp4Writer(tmp_path / "film.mp4", width=width, height=height, fps=8)


def test_it_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """x264 and FFmpeg say nothing on the terminal."""
    write(tmp_path / "film.mp4", moving_square(9))
    assert capfd.readouterr() == ("", "")
