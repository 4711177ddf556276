"""Films that somebody sent: what is accepted, and what becomes of their frames."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from kinema.errors import InvalidRequest
from kinema.media import film
from kinema.media.film import open_film
from kinema.media.images import cover
from kinema.request.shapes import Size
from tests.integration.test_mp4 import moving_square, write

UInt8Array = npt.NDArray[np.uint8]
FRAMES = moving_square(17)
SIZE = Size(width=64, height=48)


def psnr(one: UInt8Array, other: UInt8Array) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2))


def film_of(
    frames: UInt8Array = FRAMES,
    *,
    kind: str = "mp4",
    codec: str = "libx264",
    rate: int = 16,
    rotation: int = 0,
    times_ms: list[int] | None = None,
) -> bytes:
    """As other programs write them: not tagged, with B-frames, and with a time for each frame if given."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A film as we write them."""
    return write(tmp_path_factory.mktemp("film") / "film.mp4", FRAMES, fps=16)


def test_our_own_film_comes_back(own: bytes, tmp_path: Path) -> None:
    """Its size, its rate and every frame, exactly once; from bytes and from a file alike."""
    opened = open_film(own)
    assert (opened.shape.size, opened.shape.num_frames, opened.shape.fps) == (SIZE, 17, 16)
    frames = np.stack(list(opened.frames(SIZE, 16)))
    assert frames.shape == FRAMES.shape
    assert frames.dtype == np.uint8
    assert all(psnr(frame, expected) > 38 for frame, expected in zip(frames, FRAMES, strict=True))
    (tmp_path / "film.mp4").write_bytes(own)
    from_file = open_film(tmp_path / "film.mp4")
    assert from_file.shape == opened.shape
    assert np.array_equal(from_file.fit(SIZE, 16, 17).frames, frames)


@pytest.mark.parametrize("fps", [7, 24, 30])
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_the_shape_is_exact_at_any_rate(tmp_path: Path, fps: int, num_frames: int) -> None:
    """Also for a single frame, whose length the file says."""
    shape = open_film(write(tmp_path / "film.mp4", moving_square(num_frames), fps)).shape
    assert (shape.num_frames, shape.fps) == (num_frames, fps)
    assert shape.num_frames_at(fps) == num_frames


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("mp4", "libx264"),
        ("mov", "libx264"),
        ("mov", "mjpeg"),
        ("mp4", "mpeg4"),
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("matroska", "libx264"),
    ],
)
def test_films_of_other_programs(kind: str, codec: str) -> None:
    """Every frame at its own place, in the colours that were meant."""
    opened = open_film(film_of(kind=kind, codec=codec))
    assert (opened.shape.size, opened.shape.num_frames, round(opened.shape.fps)) == (SIZE, 17, 16)
    frames = opened.fit(SIZE, 16, 17).frames
    assert all(psnr(frame, expected) > 24 for frame, expected in zip(frames, FRAMES, strict=True))


def test_the_last_frame(own: bytes) -> None:
    """As the film shows it, which is what the next film begins with."""
    opened = open_film(own)
    last = opened.last_frame()
    assert np.array_equal(last, list(opened.frames(SIZE, 16))[-1])
    assert psnr(last, FRAMES[-1]) > 38


def test_another_rate_shows_what_is_seen_at_each_time(own: bytes) -> None:
    """Half the rate takes every second frame, twice the rate shows each one twice."""
    opened = open_film(own)
    frames = np.stack(list(opened.frames(SIZE, 16)))
    assert np.array_equal(np.stack(list(opened.frames(SIZE, 8, 9))), frames[::2])
    assert np.array_equal(np.stack(list(opened.frames(SIZE, 32))), np.repeat(frames, 2, axis=0))
    assert [len(list(opened.frames(SIZE, fps))) for fps in (8, 32, 48)] == [8, 34, 51]


def test_frames_of_uneven_length_are_shown_for_their_time() -> None:
    """A phone's film has no fixed rate: a frame stays until the next one comes."""
    opened = open_film(film_of(FRAMES[:3], kind="webm", codec="libvpx-vp9", times_ms=[1000, 1100, 1600]))
    frames = np.stack(list(opened.frames(SIZE, 10, 7)))
    shown = [int(np.argmax([psnr(frame, known) for known in FRAMES[:3]])) for frame in frames]
    assert shown == [0, 1, 1, 1, 1, 1, 2]


def test_a_film_that_ends_early_holds_its_last_frame(own: bytes) -> None:
    """So that whoever asked for a number of frames gets it."""
    frames = np.stack(list(open_film(own).frames(SIZE, 16, 20)))
    assert len(frames) == 20
    assert np.array_equal(frames[17:], np.repeat(frames[16:17], 3, axis=0))


def test_fitting_is_that_of_images(own: bytes) -> None:
    """Scaled until it covers the size, cropped evenly, and said."""
    opened = open_film(own)
    fitted = opened.fit(Size(width=32, height=32), 16, 5)
    assert fitted.note == "video 64x48 was scaled and cropped to 32x32"
    exact = opened.fit(SIZE, 16, 5)
    assert exact.note is None
    assert np.array_equal(fitted.frames[4], cover(exact.frames[4], Size(width=32, height=32)))


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_film_that_lies_on_its_side_is_turned(rotation: int) -> None:
    """As a phone's film is shown; the size is the one that is seen."""
    opened = open_film(film_of(rotation=rotation))
    upright = np.rot90(FRAMES[0], rotation // 90)
    assert opened.shape.size == Size(width=upright.shape[1], height=upright.shape[0])
    assert psnr(opened.last_frame(), np.rot90(FRAMES[-1], rotation // 90)) > 24


PLAYLISTS = {
    "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://%s\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile '%s'\n",
    "dash": b'<?xml version="1.0"?><MPD><Period><AdaptationSet><BaseURL>%s</BaseURL></AdaptationSet></Period></MPD>',
    "sdp": b"v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n%s",
}


@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("prefix", [b"", b"\x00\x00\x00\x08free", b"\x1a\x45\xdf\xa3"])
def test_a_playlist_opens_nothing(name: str, prefix: bytes, own: bytes, tmp_path: Path) -> None:
    """Neither as it is nor behind the first bytes of a film: it names a film, and is none."""
    (tmp_path / "secret.mp4").write_bytes(own)
    data = prefix + PLAYLISTS[name] % str(tmp_path / "secret.mp4").encode()
    with pytest.raises(InvalidRequest, match=r"^video .*; an MP4, MOV or WebM film of at most 128 MiB"):
        open_film(data)
    (tmp_path / "list.mp4").write_bytes(data)
    with pytest.raises(InvalidRequest, match="video"):
        open_film(tmp_path / "list.mp4")


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def broken() -> dict[str, tuple[bytes, str]]:
    whole = film_of()
    return {
        "empty": (b"", "is empty"),
        "text": (b"a text", "not a film of a known kind"),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "not a film of a known kind"),
        "avi": (film_of(kind="avi"), "not a film of a known kind"),
        "no index": (whole[: len(whole) // 2], "damaged"),
        "only the first bytes": (whole[:40], "video"),
        "only sound": (sound(), "has no pictures"),
        "another codec": (film_of(kind="matroska", codec="ffv1"), "in another codec"),
    }


@pytest.mark.parametrize("case", broken())
def test_what_is_no_film_is_refused_in_one_sentence(case: str) -> None:
    """With what would be accepted."""
    data, problem = broken()[case]
    with pytest.raises(InvalidRequest, match=problem) as refused:
        open_film(data)
    assert refused.value.param == "video"
    assert "is accepted" in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_are_refused_or_shown(seed: int, own: bytes) -> None:
    """Whatever is overwritten: frames of the right shape, or the same one sentence."""
    chance = np.random.default_rng(seed)
    data = np.frombuffer(own, np.uint8).copy()
    for at in chance.integers(0, len(data), 12):
        data[at] = chance.integers(0, 256)
    try:
        opened = open_film(data.tobytes())
        frames = opened.fit(SIZE, 16, 17).frames
    except InvalidRequest:
        return
    assert frames.shape == FRAMES.shape


@pytest.mark.parametrize(
    ("cap", "value", "problem"),
    [
        ("MAX_BYTES", 1000, r"is \d+ bytes"),
        ("MAX_PIXELS", 64 * 48 - 1, "is 64x48"),
        ("MAX_FRAMES", 16, "more than 16 frames"),
        ("MAX_SECONDS", 1, "is 1 seconds long"),
    ],
)
def test_caps(cap: str, value: int, problem: str, own: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """On bytes, pixels, frames and seconds."""
    monkeypatch.setattr(film, cap, value)
    with pytest.raises(InvalidRequest, match=problem):
        open_film(own)


def test_a_header_that_lies_about_the_size_does_not_help(own: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder holds each frame to the cap, whatever the container says."""
    monkeypatch.setattr(film, "MAX_PIXELS", 16 * 16)
    lying = own.replace((64).to_bytes(2, "big") + (48).to_bytes(2, "big"), bytes([0, 16, 0, 16]))
    assert lying != own
    with pytest.raises(InvalidRequest, match="video"):
        open_film(lying)


def test_it_is_quiet(own: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """ffmpeg says nothing on the terminal, about damaged films neither."""
    open_film(own).last_frame()
    with pytest.raises(InvalidRequest):
        open_film(own[: len(own) // 2][:-300])
    assert capfd.readouterr() == ("", "")
