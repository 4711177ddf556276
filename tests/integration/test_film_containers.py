"""What only the container says of a film, and films that end in the middle of it."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.video.stream import VideoStream

from kinema.errors import InvalidRequest
from kinema.media.elements import _inside
from kinema.media.film import InputFilm, open_film
from kinema.request.shapes import Size
from tests.integration.test_film import FRAMES, film_of
from tests.integration.test_film_showing import STRIPES, first_frame, made
from tests.unit.media.test_elements import element

UInt8Array = npt.NDArray[np.uint8]
SEGMENT, INFO, TRACKS, TRACK, VIDEO, TAGS = 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x1254C367
CLUSTER, GROUP, BLOCK_DURATION = 0x1F43B675, 0xA0, 0x9B
DURATION, INTERLACED, FIELD_ORDER = 0x4489, 0x9A, 0x9D
SHOWN_WIDTH, SHOWN_HEIGHT, UNIT = 0x54B0, 0x54BA, 0x54B2
LEFT, TOP, RIGHT, BOTTOM = 0x54CC, 0x54BB, 0x54DD, 0x54AA
SAYS_CUT = "the file of the video is cut short; it was read as far as it goes"


def rewritten(data: bytes, inside: int, fields: dict[int, int | bytes | None], part: slice = slice(None)) -> bytes:
    """A Matroska file with these numbers, or elements, in its element of that name; None leaves a field out."""
    out = []
    for name, start, end in _inside(data, *part.indices(len(data))[:2]):
        body = data[start:end]
        if name in (SEGMENT, INFO, TRACKS, TRACK, VIDEO, CLUSTER, GROUP):
            body = rewritten(data, inside, fields, slice(start, end))
        if name == inside:
            given = {field: bytes([value]) if isinstance(value, int) else value for field, value in fields.items()}
            body += b"".join(element(field, value) for field, value in given.items() if value is not None)
        if name not in fields:
            out.append(element(name, body))
    return b"".join(out)


@pytest.mark.parametrize(("display", "width"), [(None, 32), ((32, 40), 32), ((64, 40), 64), ((2, 1), 80)])
def test_the_crop_of_matroska_is_followed(display: tuple[int, int] | None, width: int) -> None:
    """And its display size is that of the pixels that are left."""
    size = dict(zip((SHOWN_WIDTH, SHOWN_HEIGHT), display or (None, None), strict=True))
    fields = {LEFT: 8, RIGHT: 24, TOP: 8, **size, UNIT: None}
    opened = open_film(rewritten(made(kind="matroska"), VIDEO, fields))
    assert opened.shape.size == Size(width=width, height=40)
    # Of the stripes half of the first one, the second one, and half of the third one are left.
    middles = first_frame(opened)[20, [width // 8, width // 2, 7 * width // 8]].astype(int)
    assert np.abs(middles - STRIPES[40, [12, 24, 36]]).max() < 12


@pytest.mark.parametrize("fields", [{LEFT: 40, RIGHT: 24}, {TOP: 200}, {BOTTOM: 48}])
def test_a_crop_that_leaves_nothing_is_refused(fields: dict[int, int | bytes | None]) -> None:
    """In a sentence."""
    with pytest.raises(InvalidRequest, match=r"^video is damaged .* is accepted"):
        open_film(rewritten(made(kind="matroska"), VIDEO, fields))


def moved() -> list[UInt8Array]:
    """Frames of which each second line was taken later, while a bar moved on."""
    frames = np.full((6, 64, 64, 3), 20, np.uint8)
    for number, frame in enumerate(frames):
        frame[0::2, 8 * number : 8 * number + 16] = 220
        frame[1::2, 8 * number + 4 : 8 * number + 20] = 220
    return list(frames)


def comb(opened: InputFilm) -> float:
    """How much the lines of a frame in the middle differ from the next ones."""
    frames = list(opened.frames(opened.shape.size, 10))
    assert len(frames) == 6
    return float(np.abs(np.diff(frames[3][16:48].astype(int), axis=0)).mean())


def lossless(kind: str, field_order: int = 0) -> bytes:
    """A film in a codec that does not know of fields."""

    def prepare(stream: VideoStream) -> None:
        stream.codec_context.field_order = field_order

    return made(prepare, moved(), kind=kind, codec="mjpeg", pix_fmt="yuvj420p", options={"qmin": "1", "qmax": "1"})


def test_fields_that_only_the_container_names_are_made_whole() -> None:
    """FlagInterlaced of Matroska and ``fiel`` of MOV."""
    plain = lossless("matroska")
    assert comb(open_film(plain)) > 20
    films = [
        lossless("mov", field_order=2),
        rewritten(plain, VIDEO, {INTERLACED: 1, FIELD_ORDER: 1}),
        rewritten(plain, VIDEO, {INTERLACED: 1, FIELD_ORDER: None}),
        rewritten(plain, VIDEO, {INTERLACED: 1, FIELD_ORDER: 6}),
    ]
    for data in films:
        opened = open_film(data)
        assert comb(opened) < 4
        assert opened.notes == ("the video is interlaced; its frames were deinterlaced",)
    progressive = open_film(rewritten(plain, VIDEO, {INTERLACED: 2, FIELD_ORDER: None}))
    assert progressive.notes == ()


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "kind", "options"),
    [
        ("libx264", "yuv420p", "matroska", {"crf": "4"}),
        ("libx264", "yuv420p", "matroska", {"crf": "4", "x264-params": "fake-interlaced=1"}),
        ("libx265", "yuv420p", "mov", {"x265-params": "log-level=none"}),
        ("mpeg4", "yuv420p", "mov", {"qscale": "1"}),
        ("prores_ks", "yuv422p10le", "mov", {}),
    ],
)
def test_frames_that_say_themselves_that_they_have_no_fields_are_kept(
    codec: str, pix_fmt: str, kind: str, options: dict[str, str]
) -> None:
    """Whatever the container or the head of the stream says; a player looks at each frame."""

    def prepare(stream: VideoStream) -> None:
        stream.codec_context.field_order = 0 if kind == "matroska" else 2

    data = made(prepare, moved(), kind=kind, codec=codec, pix_fmt=pix_fmt, options=options)
    if kind == "matroska":
        data = rewritten(data, VIDEO, {INTERLACED: 1, FIELD_ORDER: 1})
    opened = open_film(data)
    assert comb(opened) > 20
    assert opened.notes == ()


def held(kind: str, codec: str, last_s: int = 2) -> bytes:
    """Five frames, of which the last one is held."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        packets = [
            packet
            for frame in [*(av.VideoFrame.from_ndarray(one, format="rgb24") for one in FRAMES[:5]), None]
            for packet in stream.encode(frame)
        ]
        packets[-1].duration = int(last_s / packets[-1].time_base)
        for packet in packets:
            container.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "codec"), [("webm", "libvpx-vp9"), ("matroska", "libvpx"), ("mov", "mpeg4")])
def test_the_last_frame_is_held_for_its_time(kind: str, codec: str) -> None:
    """Which Matroska knows by the length of the file alone, or that of the track."""
    whole = held(kind, codec)
    if kind != "mov":  # its frames may have lengths, and most have none
        assert open_film(whole).shape.seconds == Fraction(12, 5)
        whole = rewritten(whole, GROUP, {BLOCK_DURATION: None})
    films = [whole] if kind == "mov" else [whole, rewritten(whole, INFO, {DURATION: None})]
    if kind != "mov":
        films.append(rewritten(whole, SEGMENT, {TAGS: None}))
    for data in films:
        opened = open_film(data)
        assert (opened.shape.num_frames, opened.shape.fps, opened.shape.seconds) == (5, 10, Fraction(12, 5))
        frames = list(opened.frames(opened.shape.size, 10))
        assert len(frames) == 24
        assert np.array_equal(frames[4], frames[23])
    if kind != "mov":  # a recorder that was ended says nothing, and a file that was cut says too much
        unsaid = open_film(rewritten(rewritten(whole, INFO, {DURATION: None}), SEGMENT, {TAGS: None}))
        assert unsaid.shape.seconds == Fraction(1, 2)
        cut = open_film(whole[: whole.rindex(b"\x1c\x53\xbb\x6b") - 40])
        assert cut.shape.seconds <= Fraction(1, 2)
        assert cut.notes == (SAYS_CUT,)


def fragments() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "4", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for pixels in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def test_a_film_of_fragments_that_was_cut_is_read_as_far_as_it_goes() -> None:
    """Wherever the cut is: in the head of a box, in what describes a fragment, or in its pictures."""
    whole = fragments()
    third = [at for at in range(len(whole)) if whole[at : at + 4] == b"moof"][2] - 4
    assert open_film(whole).notes == ()
    complete = open_film(whole[:third])
    assert (complete.shape.num_frames, complete.notes) == (8, ())
    for cut in (4, 7, 8, 20, 60, 100, 119, 124, 140):
        opened = open_film(whole[: third + cut])
        assert (opened.shape, opened.notes) == (complete.shape, (SAYS_CUT,))
        assert all(map(np.array_equal, opened.frames(opened.shape.size, 10), complete.frames(opened.shape.size, 10)))


def cut_by_copying(num_before: int) -> bytes:
    """A Matroska film of which so many frames lie before time 0, as they do where a film was cut at no key frame."""
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(film_of(rate=10))) as whole,
        av.open(buffer, "w", format="matroska", options={"avoid_negative_ts": "disabled"}) as container,
    ):
        stream = container.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                shift = int(Fraction(num_before, 10) / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                container.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("num_before", [1, 5])
def test_frames_before_the_beginning_are_not_shown(num_before: int) -> None:
    """They are there for the decoder, which needs the key frame before."""
    whole, cut = open_film(film_of(rate=10)), open_film(cut_by_copying(num_before))
    assert cut.shape.num_frames == whole.shape.num_frames - num_before
    expected = list(whole.frames(whole.shape.size, 10))[num_before:]
    assert np.array_equal(list(cut.frames(cut.shape.size, 10)), expected)
