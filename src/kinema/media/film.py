"""Video files that a client sent or that we stored: from bytes to frames of the right size and rate.

ffmpeg gets an open file and a demuxer that the first bytes choose, never a path or a playlist. So nothing in a file
can make it open another file or a URL. Only known codecs are decoded, the size is checked before a frame is
allocated, and frames come one at a time: however long a video is, only one of its frames is in memory.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Protocol, TypeVar, cast

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import CodecContext
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from kinema.errors import InvalidRequest
from kinema.media import boxes, elements
from kinema.media.boxes import UnfitBoxes, clean_aperture, has_sound, only_pictures, only_sound
from kinema.media.elements import UnfitElements, check_elements
from kinema.media.images import cover, fit_note
from kinema.media.showing import Crop, Showing, UnfitFrame, deinterlaced, showing_notes
from kinema.media.sound import SOUND_RATE, Sound
from kinema.media.soundtrack import samples_of
from kinema.request.shapes import FilmShape, Size

UInt8Array = npt.NDArray[np.uint8]
Int16Array = npt.NDArray[np.int16]
T = TypeVar("T")

# Two minutes of 4K from a phone. Over HTTP the limit of the body applies first.
MAX_BYTES = 128 * 1024 * 1024
# A 4K frame of a cinema camera, in landscape or portrait format.
MAX_PIXELS = 4096 * 2304
# Models make only some seconds. This bounds the counting of frames, and a video that is extended again and again.
MAX_SECONDS = 120
MAX_FRAMES = 60 * MAX_SECONDS
_ACCEPTED = (
    "an MP4, MOV or WebM film of at most 128 MiB, 120 seconds and 4096x2304 pixels is accepted, "
    "in H.264, H.265, VP8, VP9, AV1, MPEG-4, ProRes or Motion JPEG"
)
_CODECS = ("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "prores", "mjpeg")
_SOUND_CODECS = ("aac", "opus", "libopus", "vorbis", "mp3", "mp3float", "flac", "pcm_s16le", "pcm_s16be", "pcm_s24le")
_SOUNDS = "AAC, Opus, Vorbis, MP3, FLAC and PCM"
_DEMUXER_OPTIONS = {
    "protocol_whitelist": "none",  # in case a demuxer tries to open something itself
    "enable_drefs": "0",  # MOV files may not refer to media in other files
    "max_streams": "32",
    "fflags": "discardcorrupt",  # the last frame of a file that was cut short
}
# Box types that a QuickTime or MP4 file begins with; ISO/IEC 14496-12 and Apple's QuickTime File Format.
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_EBML = b"\x1a\x45\xdf\xa3"
# Part of a target frame. WebM rounds times to milliseconds, so a frame may come a little late.
_LATE = Fraction(1, 4)
# WebM rounds times to milliseconds, up or down.
_ROUNDING_S = Fraction(2, 1000)
# A pause of fewer samples is a rounded time; WebM has milliseconds.
_GAP = SOUND_RATE // 100
# The tag DURATION of a track.
_CLOCK = re.compile(r"(\d{1,4}):(\d{1,2}):(\d{1,2}(?:\.\d{1,9})?)", re.ASCII)
# Each of their frames says whether it has two fields, and players believe it rather than the container.
_KNOWING_FIELDS = ("h264", "hevc", "mpeg4", "prores")
# Who decodes the transparency of WebM.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass(frozen=True, slots=True)
class FittedFilm:
    """Frames (f, h, w, 3) uint8 RGB, and a sentence about the changes to them, or None when there were none."""

    frames: UInt8Array
    note: str | None


@dataclass(frozen=True, slots=True)
class InputFilm:
    """A video within the limits. ``shape`` is its shape as it is shown; ``start`` is the time of its first frame.
    ``notes`` has a sentence for each thing that is left out, or changed at any size and rate. ``has_sound`` says that
    there is sound that can be read.

    Every method reads the video from its beginning, and raises InvalidRequest when a frame cannot be decoded.
    """

    source: bytes | Path
    shape: FilmShape
    start: Fraction
    showing: Showing
    notes: tuple[str, ...]
    has_sound: bool = False

    def frames(self, size: Size, fps: int, num_frames: int | None = None) -> Iterator[UInt8Array]:
        """Yield frames (h, w, 3) uint8 RGB: the pictures at 0, 1/fps, 2/fps ... seconds, fitted as images are.

        ``num_frames`` is their number, by default the number of frames that the video has at that rate. A video that
        ends early holds its last frame.
        """
        count = self.shape.num_frames_at(fps) if num_frames is None else num_frames
        yield from _fitted(_sampled(self._decoded(), fps, count), size, self.showing)

    def fit(self, size: Size, fps: int, num_frames: int) -> FittedFilm:
        """The frames of ``frames`` in one array."""
        return fit_frames(self, size, fps, num_frames)

    def last_frame(self) -> UInt8Array:
        """The last frame (h, w, 3) uint8 RGB, in the video's own size."""
        last = deque(self._decoded(), maxlen=1)
        if not last:
            raise refused("has no frame")
        return cover(_shown(last[0][1], self.showing), self.shape.size)  # a film may change its size

    def sound(self) -> Sound | None:
        """The sound from the first frame to the end of the last one, silent where there is none; None for a film
        without sound. What cannot be decoded is silent."""
        if not self.has_sound:
            return None
        samples = np.zeros((num_sound_samples(self.shape), 2), np.int16)
        with suppress(InvalidRequest):  # what came before the damage is heard
            for at, part in _heard(self.source, self.start):
                first, last = max(at, 0), min(at + len(part), len(samples))
                if first < last:
                    samples[first:last] = part[first - at : last - at]
                if at >= len(samples):
                    break
        return Sound(samples, SOUND_RATE)

    def _decoded(self) -> Iterator[tuple[Fraction, VideoFrame]]:
        """Yield every frame with its time in seconds after the first one. Those before time 0 have none: they are there
        for the decoder alone, for instance where a film was cut without being encoded again."""
        with _opened(self.source) as (container, stream):
            for frame in deinterlaced(_decode(container, stream), self.showing.is_top_first):
                if frame.pts is not None and frame.time_base is not None:
                    yield frame.pts * frame.time_base - self.start, frame


def num_sound_samples(shape: FilmShape) -> int:
    """The number of samples of a film's sound."""
    return round(shape.seconds * SOUND_RATE)


class Frames(Protocol):
    """What has a shape, frames and perhaps sound, as ``InputFilm`` has."""

    @property
    def shape(self) -> FilmShape: ...
    def frames(self, size: Size, fps: int, num_frames: int | None = None) -> Iterator[UInt8Array]: ...
    def sound(self) -> Sound | None: ...


def fit_frames(film: Frames, size: Size, fps: int, num_frames: int) -> FittedFilm:
    """The frames of the film at that rate in one array."""
    frames = np.empty((num_frames, size.height, size.width, 3), np.uint8)
    for number, pixels in enumerate(film.frames(size, fps, num_frames)):
        frames[number] = pixels
    return FittedFilm(frames, fit_note("video", film.shape.size, size))


def open_film(source: bytes | Path) -> InputFilm:
    """Read the times of a video and decode its first frame.

    Raises InvalidRequest for anything but an MP4, MOV or WebM video within the limits. Whatever ffmpeg raises on
    hostile bytes, the client gets one sentence.
    """
    _check_size(source)
    with _opened(source) as (container, stream):
        first = next(_decode(container, stream), None)
        if first is None:
            raise refused("has no frame")
        showing = _showing(source, stream, first)
        height, width = _shown(first, showing).shape[:2]
        notes = (*_left_out(container, stream, source), *showing_notes(first, showing))
        has_track = _has_sound_track(container, source)
    with _opened(source) as (container, stream):
        start, num_frames, seconds, fps = _times(container, stream, _stated_end(source, container, stream))
    shape = FilmShape(Size(width=width, height=height), num_frames, fps, seconds)
    if shape.seconds > MAX_SECONDS:
        raise refused(f"is {float(shape.seconds):.0f} seconds long")
    has_sound = has_track and _can_be_heard(source)
    if has_track and not has_sound:
        notes = (f"the sound of the video cannot be read and was left out; {_SOUNDS} can be read", *notes)
    return InputFilm(source, shape, start, showing, notes, has_sound)


def rate_note(shape: FilmShape, fps: int) -> str | None:
    """A sentence about the frames that another rate repeats or leaves out, or None when it takes each once."""
    have, want = shape.num_frames, shape.num_frames_at(fps)
    if have == want:
        return None
    what = "some are repeated" if have < want else "some are left out"
    return f"the video has {have} frames in {float(shape.seconds):.3g} s; at {fps} fps they become {want}: {what}"


def read_comment(source: bytes | Path) -> str | None:
    """The comment tag of the file. Raises InvalidRequest as ``open_film``."""
    _check_size(source)
    with _opened(source) as (container, _stream):
        tags = {name.lower(): text for name, text in container.metadata.items()}
        return tags.get("comment")


def digest_pictures(source: Path) -> str:
    """SHA-256 of the encoded pictures, without the tags of the file. Raises InvalidRequest."""
    digest = hashlib.sha256()
    with _opened(source) as (container, stream):
        digest.update(stream.codec_context.extradata or b"")
        for packet in container.demux(stream):
            digest.update(bytes(packet))
    return digest.hexdigest()


@contextmanager
def _opened(source: bytes | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the file and its first video stream. Every error becomes one sentence for the client."""
    with _refusing(), _demuxer(_bytes(source)) as container:
        yield container, _first_video(container)


@contextmanager
def _refusing() -> Iterator[None]:
    """Make one sentence for the client of every error."""
    try:
        yield
    except InvalidRequest:
        raise
    except (UnfitBoxes, UnfitElements, UnfitFrame) as exc:
        raise refused(str(exc)) from exc
    except Exception as exc:
        raise refused("is damaged or cannot be read") from exc


def _check_size(source: bytes | Path) -> None:
    size_bytes = source.stat().st_size if isinstance(source, Path) else len(source)
    if size_bytes > MAX_BYTES:
        raise refused(f"is {size_bytes} bytes")
    if not size_bytes:
        raise refused("is empty")


def _bytes(source: bytes | Path) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _demuxer(data: bytes, *, is_heard: bool = False) -> InputContainer:
    """Open the tracks of pictures, or those of sound."""
    if data[4:8] in _MP4_BOXES:
        name, data = "mov", only_sound(data) if is_heard else only_pictures(data)
    elif data.startswith(_EBML):
        check_elements(data)
        name = "matroska"
    else:
        raise refused("is not a film of a known kind")
    file = io.BytesIO(data)
    codecs = _SOUND_CODECS if is_heard else _CODECS
    options = _DEMUXER_OPTIONS | {"codec_whitelist": ",".join(codecs)}
    return av.open(file, "r", format=name, container_options=options, metadata_errors="replace")


def _first_video(container: InputContainer) -> VideoStream:
    pictures = [stream for stream in container.streams.video if not _is_cover(stream)]
    # A track that its maker has switched off comes after the others.
    for stream in sorted(pictures, key=lambda stream: not stream.disposition & Disposition.default):
        context = stream.codec_context
        if context is None or context.name not in _CODECS:
            raise refused("is in another codec")
        if stream.width * stream.height > MAX_PIXELS:
            raise refused(f"is {stream.width}x{stream.height}")
        # The size in the header may be wrong. This limit holds for each decoded frame.
        context.options = {"max_pixels": str(MAX_PIXELS)}
        context.thread_count = 2
        return stream
    raise refused("has no pictures")


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame. ffmpeg's own decoders leave transparency out, and libvpx does not."""
    if stream.metadata.get("alpha_mode") != "1" or stream.codec_context.name not in _WITH_ALPHA:
        yield from container.decode(stream)
        return
    decoder = cast(VideoCodecContext, CodecContext.create(_WITH_ALPHA[stream.codec_context.name], "r"))
    decoder.options = {"max_pixels": str(MAX_PIXELS)}
    for packet in container.demux(stream):
        if packet.size:
            yield from decoder.decode(packet)
    yield from decoder.decode(None)


def _showing(source: bytes | Path, stream: VideoStream, frame: VideoFrame) -> Showing:
    """What the container says of all frames, of which one is given."""
    data, aspect = _bytes(source), stream.sample_aspect_ratio or Fraction(1)
    if data[4:8] in _MP4_BOXES:
        crop, is_top_first = _aperture(data, frame), boxes.is_top_first(data)
    else:
        said = elements.pictures(data)
        crop, is_top_first = Crop(*said.crop), said.is_top_first
        aspect = said.aspect if any(said.crop) else aspect  # the demuxer knows of no crop
    if stream.codec_context.name in _KNOWING_FIELDS:
        is_top_first = None
    return Showing(crop, aspect if aspect > 0 else Fraction(1), is_top_first)


def _aperture(data: bytes, frame: VideoFrame) -> Crop:
    """What the clean aperture leaves out."""
    aperture = clean_aperture(data)
    if aperture is None:
        return Crop()
    width, height, right, down = aperture
    across, below = frame.width - width, frame.height - height
    sides = across / 2 + right, below / 2 + down, across / 2 - right, below / 2 - down
    return Crop(*map(round, sides)) if min(sides) >= 0 else Crop()


def _left_out(container: InputContainer, stream: VideoStream, source: bytes | Path) -> Iterator[str]:
    """A sentence about each kind of track that is not used."""
    streams, data = container.streams, _bytes(source)
    is_cut = boxes.is_cut_short if data[4:8] in _MP4_BOXES else elements.is_cut_short
    if is_cut(data):
        yield "the file of the video is cut short; it was read as far as it goes"
    if streams.subtitles:
        yield "the subtitles of the video were left out"
    others = [one for one in streams.video if one.index != stream.index and not _is_cover(one)]
    if others:
        yield f"the video has {1 + len(others)} tracks of pictures; only one of them is used"
    if streams.data:
        yield "the tracks of the video with other data than pictures were left out"


def _has_sound_track(container: InputContainer, source: bytes | Path) -> bool:
    data = _bytes(source)
    return bool(container.streams.audio) or (data[4:8] in _MP4_BOXES and has_sound(data))


def _can_be_heard(source: bytes | Path) -> bool:
    """Whether the first part of the sound can be decoded."""
    try:
        return next(_heard(source, Fraction(0)), None) is not None
    except InvalidRequest:
        return False


def _heard(source: bytes | Path, start: Fraction) -> Iterator[tuple[int, Int16Array]]:
    """Yield each part of the sound, (n, 2) int16 at ``SOUND_RATE``, with the sample after ``start`` at which it begins.

    Raises InvalidRequest when it cannot be decoded.
    """
    with _refusing(), _demuxer(_bytes(source), is_heard=True) as container:
        stream = container.streams.audio[0]
        context = stream.codec_context
        if context.name not in _SOUND_CODECS or not (1 <= context.channels <= 8 and 0 < context.rate <= 192_000):
            raise refused("has sound in another codec")
        resampler = av.AudioResampler(format="s16", layout="stereo", rate=SOUND_RATE)
        at: int | None = None
        for frame in container.decode(stream):
            said = at or 0
            if frame.pts is not None and frame.time_base is not None:
                said = round((frame.pts * frame.time_base - start) * SOUND_RATE)
            if at is None or abs(said - at) > _GAP:
                at = said
            for part in resampler.resample(frame):
                samples = samples_of(part)
                yield at, samples
                at += len(samples)


def _is_cover(stream: VideoStream) -> bool:
    return bool(stream.disposition & Disposition.attached_pic)


def _stated_end(source: bytes | Path, container: InputContainer, stream: VideoStream) -> Fraction:
    """The time at which a WebM or Matroska file says that its pictures end; 0 when it does not say.

    Its frames have no lengths of their own. The tags of a track tell of that track alone, the header of all tracks.
    """
    data = _bytes(source)
    if data[4:8] in _MP4_BOXES or elements.is_cut_short(data):
        return Fraction(0)
    of_file = elements.stated_seconds(data)
    if (tag := _CLOCK.fullmatch(stream.metadata.get("DURATION", ""))) is not None:
        hours, minutes, seconds = map(Fraction, tag.groups())
        of_track = 3600 * hours + 60 * minutes + seconds
        return of_track if of_file is None else min(of_track, of_file)  # a tag may be older than the file
    return of_file if of_file is not None and len(container.streams) == 1 else Fraction(0)


def _times(
    container: InputContainer, stream: VideoStream, stated_end: Fraction
) -> tuple[Fraction, int, Fraction, Fraction]:
    """The time of the first frame, the number of frames, the length in seconds and the rate; without decoding.

    The length is to the end of the last frame. The rate is that of the usual distance of two frames: one that is held
    for long, or a few that were dropped, do not change it.
    """
    times: list[Fraction] = []
    last_time, last_length = Fraction(-1), Fraction(0)
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue
        time = packet.pts * packet.time_base
        times.append(time)
        if time >= last_time or len(times) == 1:
            last_time, last_length = time, (packet.duration or 0) * packet.time_base
        if len(times) > MAX_FRAMES:
            raise refused(f"has more than {MAX_FRAMES} frames")
    times.sort()
    distances = sorted(after - before for before, after in pairwise(times) if after > before)
    if last_length > 0 and len(distances) < 2:
        distances = sorted([*distances, last_length])
    if not distances:
        raise refused("has no times")
    median = distances[(len(distances) - 1) // 2]
    usual = [one for one in distances if abs(one - median) <= max(median / 4, _ROUNDING_S)]
    interval = sum(usual, Fraction(0)) / len(usual)
    end = times[-1] + (last_length or interval)
    if stated_end - end > interval / 2:  # less is a rounded time
        end = stated_end
    return times[0], len(times), end - times[0], 1 / interval


def _sampled(decoded: Iterator[tuple[Fraction, VideoFrame]], fps: int, count: int) -> Iterator[VideoFrame]:
    """Yield the pictures at 0, 1/fps, 2/fps ... seconds, ``count`` of them."""

    def samples() -> Iterator[VideoFrame]:
        shown, number = None, 0
        for time, frame in decoded:
            while shown is not None and Fraction(number, fps) < time - _LATE / fps:
                yield shown
                number += 1
            shown = frame
        if shown is None:
            raise refused("has no frame")
        while True:
            yield shown

    return islice(samples(), count)


def _fitted(frames: Iterator[VideoFrame], size: Size, showing: Showing) -> Iterator[UInt8Array]:
    """Yield pixels in that size. A frame that is shown several times is converted once."""
    for frame, is_new in _with_news(frames):
        if is_new:
            pixels = cover(_shown(frame, showing, size), size)
        yield pixels


def _with_news(items: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item, and whether it differs from the one before."""
    last: T | None = None
    for item in items:
        yield item, item is not last
        last = item


def _shown(frame: VideoFrame, showing: Showing, size: Size | None = None) -> UInt8Array:
    """As ``Showing.shown``; raises InvalidRequest."""
    width, height = showing.size_of(frame)
    if max(frame.width, width) * height > MAX_PIXELS:
        raise refused(f"is {width}x{height}")
    return showing.shown(frame, size)


def refused(problem: str) -> InvalidRequest:
    """The error of a film that is not accepted; the problem follows the word video."""
    return InvalidRequest(f"video {problem}; {_ACCEPTED}", param="video")
