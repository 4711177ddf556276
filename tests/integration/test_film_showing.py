"""Films are taken as their makers meant them to be shown, and what is left out is said."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.video.stream import VideoStream

from kinema.media.decoders import Decoders
from kinema.media.film import InputFilm, open_film, rate_note
from kinema.request.shapes import Size
from kinema.settings import InputSettings
from tests.integration.test_film import FRAMES, film_of, psnr

UInt8Array = npt.NDArray[np.uint8]
COLOURS = np.array([[10, 60, 160], [230, 40, 30], [255, 255, 0], [200, 200, 200]], np.uint8)
# Four stripes, the first one with a mark at its top.
STRIPES = np.repeat(COLOURS, 16, axis=0)[None].repeat(48, axis=0)
STRIPES[:16, :8] = 255


def made(
    prepare: Callable[[VideoStream], object] = lambda _stream: None,
    frames: Sequence[UInt8Array] = (STRIPES,) * 2,
    *,
    kind: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    options: dict[str, str] | None = None,
    **colour: int,
) -> bytes:
    """A film of these frames, with its stream prepared."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10, options=options or ({"crf": "4"} if codec == "libx264" else {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for name, value in colour.items():
            setattr(stream.codec_context, name, value)
        prepare(stream)
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            frame = picture.reformat(format=pix_fmt, dst_colorspace=colour.get("colorspace"), dst_color_range=1)
            for name, value in colour.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def first_frame(opened: InputFilm) -> UInt8Array:
    return next(opened.frames(opened.shape.size, 10))


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-1, 0, 0, 1), STRIPES[:, ::-1]),
        ((1, 0, 0, -1), STRIPES[::-1]),
        ((-1, 0, 0, -1), STRIPES[::-1, ::-1]),
        ((0, 1, 1, 0), STRIPES.transpose(1, 0, 2)),
        ((0, 1, -1, 0), np.rot90(STRIPES, -1)),
        ((0, -1, -1, 0), STRIPES.transpose(1, 0, 2)[::-1, ::-1]),
    ],
)
def test_a_film_is_turned_and_mirrored_by_its_matrix(matrix: Sequence[int], shown: UInt8Array) -> None:
    """All of it, and not its angle alone."""
    a, b, c, d = (value << 16 for value in matrix)
    opened = open_film(made(lambda stream: stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])))
    assert opened.shape.size == Size(width=shown.shape[1], height=shown.shape[0])
    assert psnr(first_frame(opened), shown) > 30
    assert opened.notes == ()


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
@pytest.mark.parametrize(("aspect", "width"), [(Fraction(2), 128), (Fraction(1, 2), 32), (Fraction(16, 15), 68)])
def test_pixels_that_are_not_square_are_stretched(aspect: Fraction, width: int, kind: str) -> None:
    """The width is that of the shown picture."""

    def stretch(stream: VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = aspect

    opened = open_film(made(stretch, kind=kind))
    assert opened.shape.size == Size(width=width, height=48)
    middles = first_frame(opened)[40, [width // 8, 3 * width // 8, 5 * width // 8, 7 * width // 8]]
    assert np.abs(middles.astype(int) - COLOURS).max() < 8


def in_light(transfer: str) -> UInt8Array:
    """The stripes as uint16 numbers of BT.2020, where white is 203 nits."""
    light = np.where(STRIPES <= 10, STRIPES / 255 / 12.92, ((STRIPES / 255 + 0.055) / 1.055) ** 2.4)
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    light = light @ to_2020.T * 203
    if transfer == "pq":
        power = (light / 10000) ** 0.1593017578125
        number = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    else:
        light = light / 1000
        luminance = (light @ [0.2627, 0.6780, 0.0593])[..., None]
        light = light * np.maximum(luminance, 1e-9) ** (1 / 1.2 - 1)
        curve = 0.17883277 * np.log(np.maximum(12 * light - 0.28466892, 1e-9)) + 0.55991073
        number = np.where(light <= 1 / 12, np.sqrt(3 * light), curve)
    return np.rint(number.clip(0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize(("transfer", "code"), [("pq", 16), ("hlg", 18)])
def test_bright_light_is_brought_to_an_ordinary_screen(transfer: str, code: int) -> None:
    """Colours keep their place, white paper stays bright, and a sentence says so."""
    bright = made(
        frames=[in_light(transfer)] * 2, pix_fmt="yuv444p10le", colorspace=9, color_primaries=9, color_trc=code
    )
    opened = open_film(bright)
    assert [note for note in opened.notes if "tone-mapped" in note]
    middles = first_frame(opened)[40, [8, 24, 40, 56]].astype(int)
    assert np.abs(middles - COLOURS).max() < 30


def test_a_film_in_other_primaries_is_converted() -> None:
    """The numbers of sRGB's red are less than those of BT.2020."""
    opened = open_film(made(colorspace=9, color_primaries=9, color_trc=14))
    red = first_frame(opened)[40, 24].astype(int)
    assert red[0] > 245
    assert red[1] < 20
    assert np.abs(first_frame(opened)[40, 56].astype(int) - 200).max() < 4


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparent_parts_are_white(codec: str) -> None:
    """As those of a picture."""
    clear = np.zeros((48, 64, 4), np.uint8)
    clear[:, :32] = 230, 40, 30, 255
    options = {"auto-alt-ref": "0"}
    opened = open_film(made(frames=[clear] * 2, kind="webm", codec=codec, pix_fmt="yuva420p", options=options))
    pixels = first_frame(opened).astype(int)
    assert np.abs(pixels[20, 10] - [230, 40, 30]).max() < 12
    assert pixels[20, 50].min() > 250
    assert opened.notes == ("the video is transparent; it was laid on white",)


def test_interlaced_frames_are_made_whole() -> None:
    """No comb is left where something moves."""
    frames = []
    for number in range(6):
        frame = np.full((64, 64, 3), 20, np.uint8)
        frame[0::2, 8 * number : 8 * number + 16] = 220
        frame[1::2, 8 * number + 4 : 8 * number + 20] = 220
        frames.append(frame)

    options = {"crf": "4", "x264-params": "interlaced=1:tff=1"}
    opened = open_film(made(frames=frames, pix_fmt="yuv420p", options=options))
    taken = list(opened.frames(opened.shape.size, 10))
    assert len(taken) == 6
    comb = np.abs(np.diff(taken[3][16:48].astype(int), axis=0)).mean()
    assert comb < np.abs(np.diff(frames[3][16:48].astype(int), axis=0)).mean() / 3
    assert opened.notes == ("the video is interlaced; its frames were deinterlaced",)


@pytest.mark.parametrize(
    ("times_ms", "seconds", "fps", "shown"),
    [
        ([0, 4600, 4700, 4800, 4900], 5.0, 10, [0] * 46 + [1, 2, 3, 4]),
        ([0, 33, 67, 100, 133, 200, 233], 0.266, 30, [0, 1, 2, 3, 4, 4, 5, 6]),
        ([1000, 1100, 1600], 1.1, 10, [0, 1, 1, 1, 1, 1, 2]),
    ],
)
def test_a_frame_that_is_held_changes_neither_length_nor_rate(
    times_ms: list[int], seconds: float, fps: int, shown: list[int]
) -> None:
    """The rate is that of the usual distance, and each frame is shown for its time."""
    opened = open_film(film_of(FRAMES[: len(times_ms)], kind="webm", codec="libvpx-vp9", times_ms=times_ms))
    assert round(opened.shape.fps) == fps or len(times_ms) == 3
    frames = list(opened.frames(Size(width=64, height=48), fps, len(shown)))
    assert [int(np.argmax([psnr(one, known) for known in FRAMES[:7]])) for one in frames] == shown
    if len(times_ms) > 3:
        assert float(opened.shape.seconds) == pytest.approx(seconds, abs=0.04)
        assert "some are repeated" in (rate_note(opened.shape, fps) or "")


def test_sound_and_a_lost_tail_are_named(tmp_path: Path) -> None:
    """One sentence for each; also through the process that decodes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        pictures, sound = container.add_stream("libx264", rate=10), container.add_stream("pcm_s16le", rate=8000)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        for pixels in FRAMES:
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        container.mux(sound.encode(silence))
        for stream in (pictures, sound):
            container.mux(stream.encode(None))
    whole = buffer.getvalue()
    decoders = Decoders(InputSettings())
    try:
        with decoders.for_film() as decoder:
            opened = decoder.open_film(whole)
            assert (opened.notes, opened.has_sound) == ((), True)
    finally:
        decoders.stop()
    (tmp_path / "film.mp4").write_bytes(b"")
    with av.open(str(tmp_path / "film.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for pixels in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    cut = open_film((tmp_path / "film.mp4").read_bytes()[:-60])
    assert 0 < cut.shape.num_frames < len(FRAMES)
    assert len(list(cut.frames(cut.shape.size, 10))) == cut.shape.num_frames
    assert cut.notes == ("the file of the video is cut short; it was read as far as it goes",)
