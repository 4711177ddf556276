"""Films: what each says of itself, and what is to become of it.

All show the same four stripes with a mark at their upper left, so no way to turn one is like another.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial

import av
import numpy as np
from av.video.stream import VideoStream

from tests.hostile import films as hostile
from tests.integration.test_film import FRAMES, film_of
from tests.integration.test_film_containers import (
    BOTTOM,
    FIELD_ORDER,
    INTERLACED,
    LEFT,
    SAYS_CUT,
    SHOWN_HEIGHT,
    SHOWN_WIDTH,
    UNIT,
    VIDEO,
    fragments,
    held,
    lossless,
    moved,
    rewritten,
)
from tests.integration.test_film_showing import STRIPES, in_light, made
from tests.unit.media.test_elements import element

_TO_LIGHT = "zscale=t=linear:npl=203,format=gbrpf32le,tonemap=mobius:param=0.75:peak=4.926:desat=0"
# The curves of ordinary films are those of the screens that sRGB is shown on.
_SAME_SCREEN = "setparams=color_trc=iec61966-2-1"
_TO_SRGB = "zscale=p=bt709:t=iec61966-2-1:m=gbr:r=full,format=gbrp"
_SAYS_BRIGHT = "the video has a high dynamic range; it was tone-mapped to that of an ordinary screen"
_SAYS_SILENT = "the new part is silent: fake makes no sound"
_SAYS_FIELDS = "the video is interlaced; its frames were deinterlaced"


@dataclass
class Film:
    """``shown`` is the filter with which ffmpeg shows what players show; None where its command does so by itself, and
    where a film is refused. ``says`` are the warnings of an extension, or the end of the sentence that refuses it."""

    make: Callable[[], bytes]
    size: tuple[int, int] = (64, 48)
    seconds: float = 0.2
    fps: int = 10
    says: tuple[str, ...] = ()
    shown: str | None = None
    decoder: str | None = None
    is_refused: bool = False
    has_sound: bool = False
    is_shown: bool = True
    # How much the numbers of what ffmpeg shows may differ in the mean: the rounding of a filter or two.
    tolerance: float = 2

    @cached_property
    def data(self) -> bytes:
        return self.make()


def turned(*matrix: int) -> bytes:
    a, b, c, d = (value << 16 for value in matrix)
    return made(lambda stream: stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30]))


def stretched(aspect: Fraction, kind: str) -> bytes:
    def stretch(stream: VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = aspect

    return made(stretch, kind=kind)


def stretched_and_turned() -> bytes:
    def prepare(stream: VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        stream.set_display_matrix([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30])

    return made(prepare)


def with_aperture() -> bytes:
    """A MOV of which the right half is to be shown."""
    data = made(kind="mov")
    aperture = struct.pack(">I4sIIIIiIiI", 40, b"clap", 32, 1, 48, 1, 16, 1, 0, 1)
    changed = data.replace(b"\x00\x00\x00\x10pasp\x00\x00\x00\x01\x00\x00\x00\x01", b"")
    at = changed.index(b"avcC") - 4
    for name in (b"avc1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):  # each box around it grows
        start = changed.index(name) - 4
        size = int.from_bytes(changed[start : start + 4], "big") + 40 - (len(data) - len(changed))
        changed = changed[:start] + size.to_bytes(4, "big") + changed[start + 4 :]
    return changed[:at] + aperture + changed[at:]


def bright(transfer: str, code: int) -> bytes:
    frames = [in_light(transfer)] * 2
    return made(frames=frames, pix_fmt="yuv444p10le", colorspace=9, color_primaries=9, color_trc=code)


def clear() -> bytes:
    """A VP9 film whose right half is transparent."""
    frame = np.dstack([STRIPES, np.full((48, 64, 1), 255, np.uint8)])
    frame[:, 32:, 3] = 0
    options = {"auto-alt-ref": "0", "lossless": "1"}
    return made(frames=[frame] * 2, kind="webm", codec="libvpx-vp9", pix_fmt="yuva420p", options=options)


def with_fields() -> bytes:
    options = {"crf": "4", "x264-params": "interlaced=1:tff=1"}
    return made(frames=moved(), pix_fmt="yuv420p", options=options)


def beside(
    kind: str, sound: str | None = None, *, num_films: int = 1, subtitles: bool = False, seconds: float = 0.2
) -> bytes:
    """The stripes with a tone, with a second track of pictures, or with subtitles."""
    buffer = io.BytesIO()
    codec = "libvpx-vp9" if kind == "webm" else "libx264"
    with av.open(buffer, "w", format=kind) as container:
        films = [container.add_stream(codec, rate=10) for _ in range(num_films)]
        heard = container.add_stream(sound, rate=48000) if sound else None
        texts = av.open(io.BytesIO(_WORDS), format="srt") if subtitles else None
        read = container.add_stream_from_template(texts.streams[0]) if texts else None
        for film in films:
            film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        for film in films:
            for _ in range(2):
                container.mux(film.encode(av.VideoFrame.from_ndarray(STRIPES, format="rgb24")))
            container.mux(film.encode(None))
        if heard is not None:
            tone = np.rint(9000 * np.sin(np.arange(int(48000 * seconds)) / 20)).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            samples.sample_rate = 48000
            resampler = av.AudioResampler(heard.codec_context.format, "mono", 48000, heard.codec_context.frame_size)
            for part in [*resampler.resample(samples), *resampler.resample(None)]:
                container.mux(heard.encode(part))
            container.mux(heard.encode(None))
        for packet in texts.demux() if texts else ():
            if packet.size:
                packet.stream = read
                container.mux(packet)
    return buffer.getvalue()


def cut_fragments() -> bytes:
    whole = fragments()
    return whole[: [at for at in range(len(whole)) if whole[at : at + 4] == b"moof"][2] + 40]


def timed(*times_ms: int, kind: str = "mp4") -> bytes:
    codec = "libx264" if kind == "mp4" else "libvpx-vp9"
    return film_of(FRAMES[: len(times_ms)], kind=kind, codec=codec, times_ms=list(times_ms))


def noted(fields: dict[int, int | bytes | None], film: bytes | None = None) -> bytes:
    """A Matroska film that says this of its pictures."""
    return rewritten(film or made(kind="matroska"), VIDEO, fields)


def _repeated(num_frames: int, seconds: str, want: int, fps: int = 10) -> str:
    return f"the video has {num_frames} frames in {seconds} s; at {fps} fps they become {want}: some are repeated"


def _of(make: Callable[..., bytes], *arguments: object, **more: object) -> Callable[[], bytes]:
    return partial(make, *arguments, **more)


_WORDS = b"1\n00:00:00,000 --> 00:00:00,200\na word\n"
STEREO_MODE, PROJECTION, PROJECTION_TYPE = 0x53B8, 0x7670, 0x7671
_ODD = "the video is turned by an odd angle; it was turned by the nearest quarter of a circle"
_SPARSE: Sequence[int] = (0, 33, 67, 100, 133, 200, 233)

FILMS: dict[str, Film] = {
    # What the numbers mean.
    "no tag, BT.601": Film(_of(made, pix_fmt="yuv420p")),
    "BT.709": Film(_of(made, colorspace=1, color_primaries=1, color_trc=1)),
    "full range": Film(_of(made, codec="mjpeg", pix_fmt="yuvj444p", kind="mov", options={"qmin": "1", "qmax": "2"})),
    "BT.2020, not bright": Film(
        _of(made, colorspace=9, color_primaries=9, color_trc=14), shown=f"{_SAME_SCREEN},{_TO_SRGB}"
    ),
    "Display P3": Film(_of(made, colorspace=1, color_primaries=12, color_trc=13), shown=f"{_SAME_SCREEN},{_TO_SRGB}"),
    "PQ": Film(_of(bright, "pq", 16), says=(_SAYS_BRIGHT,), shown=f"{_TO_LIGHT},{_TO_SRGB}"),
    # ffmpeg's filter bends each colour by itself, and BT.2100 all of them by their luminance.
    "HLG": Film(_of(bright, "hlg", 18), says=(_SAYS_BRIGHT,), shown=f"{_TO_LIGHT},{_TO_SRGB}", tolerance=12),
    "ICtCp": Film(_of(made, colorspace=14), is_refused=True, says=("matrix 14 of ITU-T H.273",)),
    "transparency": Film(clear, decoder="libvpx-vp9", says=("the video is transparent; it was laid on white",)),
    # How the frames lie.
    "mirrored": Film(_of(turned, -1, 0, 0, 1)),
    "upside down, mirrored": Film(_of(turned, 1, 0, 0, -1)),
    "turned by 180 degrees": Film(_of(turned, -1, 0, 0, -1)),
    "turned by 90 degrees": Film(_of(turned, 0, 1, -1, 0), (48, 64)),
    "turned by 270 degrees": Film(_of(turned, 0, -1, 1, 0), (48, 64)),
    "turned and mirrored": Film(_of(turned, 0, 1, 1, 0), (48, 64)),
    "pixels of 2:1": Film(_of(stretched, Fraction(2), "mp4"), (128, 48), shown="scale=iw*2:ih"),
    "pixels of 1:2": Film(_of(stretched, Fraction(1, 2), "matroska"), (32, 48), shown="scale=iw/2:ih"),
    "pixels of 3:2": Film(_of(stretched, Fraction(3, 2), "mp4"), (96, 48), shown="scale=iw*3/2:ih"),
    "pixels of 2:1, turned": Film(stretched_and_turned, (48, 128), shown="scale=iw:ih*2"),
    "clean aperture": Film(with_aperture, (32, 48), shown="crop=32:48:32:0"),
    "crop of Matroska": Film(
        _of(noted, {LEFT: 32, BOTTOM: 16, UNIT: None}),
        (32, 32),
        shown="crop=32:32:32:0",
    ),
    "crop, shown larger": Film(
        _of(noted, {LEFT: 32, SHOWN_WIDTH: 64, SHOWN_HEIGHT: 48, UNIT: None}),
        shown="crop=32:48:32:0,scale=64:48",
    ),
    "fields": Film(with_fields, (64, 64), 0.6, says=(_SAYS_FIELDS,), shown="bwdif=send_frame:auto:interlaced"),
    "fields by the container": Film(
        lambda: noted({INTERLACED: 1, FIELD_ORDER: 1}, lossless("matroska")),
        (64, 64),
        0.6,
        says=(_SAYS_FIELDS,),
        shown="setfield=tff,bwdif=send_frame:tff:interlaced",
    ),
    "fields by fiel": Film(
        _of(lossless, "mov", 2),
        (64, 64),
        0.6,
        says=(_SAYS_FIELDS,),
        shown="setfield=tff,bwdif=send_frame:tff:interlaced",
    ),
    # When they are shown.
    "first frame held": Film(
        _of(timed, 0, 4600, 4700, 4800, 4900), seconds=5, says=(_repeated(5, "5", 50),), shown="fps=10"
    ),
    "a frame in the middle held": Film(
        _of(timed, 0, 100, 200, 900, 1000), seconds=1.1, says=(_repeated(5, "1.1", 11),), shown="fps=10"
    ),
    "last frame held, MOV": Film(
        _of(held, "mov", "mpeg4"), seconds=2.4, says=(_repeated(5, "2.4", 24),), shown="fps=10"
    ),
    "last frame held, WebM": Film(
        _of(held, "webm", "libvpx-vp9"), seconds=2.4, says=(_repeated(5, "2.4", 24),), shown="fps=10"
    ),
    "dropped frames": Film(
        _of(timed, *_SPARSE, kind="webm"), seconds=0.2955, fps=30, says=(_repeated(7, "0.295", 9, 30),), shown="fps=30"
    ),
    "begins late": Film(_of(timed, 1000, 1100, 1200, 1300, kind="webm"), seconds=0.3625),
    # What is beside them.
    "sound, AAC": Film(_of(beside, "mp4", "aac"), has_sound=True, says=(_SAYS_SILENT,)),
    "sound, Opus": Film(_of(beside, "webm", "libopus"), has_sound=True, says=(_SAYS_SILENT,)),
    "sound, PCM": Film(_of(beside, "mov", "pcm_s16le"), has_sound=True, says=(_SAYS_SILENT,)),
    "sound, AC-3": Film(
        _of(beside, "mp4", "ac3"),
        says=(
            "the sound of the video cannot be read and was left out; AAC, Opus, Vorbis, MP3, FLAC and PCM can be read",
        ),
    ),
    "subtitles": Film(_of(beside, "matroska", subtitles=True), says=("the subtitles of the video were left out",)),
    "two tracks of pictures": Film(
        _of(beside, "mp4", num_films=2), says=("the video has 2 tracks of pictures; only one of them is used",)
    ),
    "stereo": Film(
        _of(noted, {STEREO_MODE: 1}),
        says=("the video is stereoscopic; its frames were taken as they are stored, as flat pictures",),
    ),
    "panorama": Film(
        _of(noted, {PROJECTION: element(PROJECTION_TYPE, b"\1")}),
        says=("the video is a panorama; its frames were taken as they are stored, as flat pictures",),
    ),
    "an odd angle": Film(_of(turned, 1, 1, -1, 1), says=(_ODD,), is_shown=False),
    # What is broken.
    "cut in a fragment": Film(cut_fragments, seconds=0.8, says=(SAYS_CUT,), is_shown=False),
    "cut in the pictures": Film(lambda: fragments()[:-300], seconds=1.6, says=(SAYS_CUT,)),
    "cut header": Film(lambda: made()[:-100], is_refused=True, says=("a box 'moov' that is larger",)),
    "samples without bytes": Film(hostile.stsz_bomb, is_refused=True, says=("160000000 samples",)),
    "fragments without bytes": Film(hostile.trun_bomb, is_refused=True, says=("samples",)),
    "no pictures": Film(lambda: made()[:600], is_refused=True, says=("",)),
    "another codec": Film(_of(made, kind="matroska", codec="ffv1"), is_refused=True, says=("is in another codec",)),
    "a picture": Film(hostile.plain_png, is_refused=True, says=("is not a film of a known kind",)),
}
