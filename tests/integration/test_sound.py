"""The sound of a video in its file, read back by a decoder: in time with the frames, and as long as they are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from kinema.media.decoders import Decoders
from kinema.media.film import open_film
from kinema.media.sound import SOUND_RATE, Sound, num_samples_at
from kinema.media.writers import open_writer
from kinema.request.formats import OutputFormat
from kinema.request.shapes import Size
from kinema.settings import InputSettings
from tests.integration.test_mp4 import moving_square

Int16Array = npt.NDArray[np.int16]
CODECS: dict[OutputFormat, tuple[str, str]] = {"mp4": ("h264", "aac"), "webm": ("vp9", "opus")}
# What a person hears as one: a film's sound is this close to its pictures.
CLOSE_S = 0.005


def beats(num_frames: int, fps: int, rate: int, at: Sequence[int]) -> Sound:
    """Silence with a beat of 10 ms at the start of the named frames, on the left; softer on the right."""
    samples = np.zeros((num_samples_at(num_frames, fps, rate), 2), np.int16)
    beat = (12000 * np.sin(2 * np.pi * 1000 * np.arange(rate // 100) / rate)).astype(np.int16)
    for frame in at:
        start = num_samples_at(frame, fps, rate)
        samples[start : start + len(beat), 0] = beat
        samples[start : start + len(beat), 1] = beat // 4
    return Sound(samples, rate)


def write(path: Path, kind: OutputFormat, parts: Sequence[tuple[int, Sound | None]], fps: int) -> bytes:
    """The file of these parts, each with its number of frames, written as an engine decodes."""
    frames = moving_square(sum(num_frames for num_frames, _ in parts))
    height, width = frames.shape[1:3]
    writer = open_writer(kind, path, Size(width=width, height=height), fps, {}, has_sound=True)
    done = 0
    for num_frames, sound in parts:
        for start, stop in [(0, 1), *((at, min(at + 4, num_frames)) for at in range(1, num_frames, 4))]:
            heard = None
            if sound is not None:
                first, last = (num_samples_at(frame, fps, sound.rate) for frame in (start, stop))
                heard = Sound(sound.samples[first:last], sound.rate)
            writer.add(frames[done + start : done + stop], heard)
        done += num_frames
    writer.close()
    return path.read_bytes()


def heard(film: bytes) -> tuple[str, Int16Array]:
    """The codec, and the samples (n, 2) at 48,000 a second as a player plays them."""
    resampler = av.AudioResampler(format="s16", layout="stereo", rate=SOUND_RATE)
    with av.open(io.BytesIO(film)) as container:
        stream = container.streams.audio[0]
        frames = [part for frame in container.decode(stream) for part in resampler.resample(frame)]
        return stream.codec_context.name, np.concatenate([frame.to_ndarray().reshape(-1, 2) for frame in frames])


def onsets(samples: Int16Array) -> list[float]:
    """The seconds at which something is heard after a tenth of a second of silence, on the left."""
    (loud,) = np.nonzero(np.abs(samples[:, 0].astype(int)) > 3000)
    begins = np.diff(loud, prepend=-SOUND_RATE) > SOUND_RATE // 10
    return [float(at) / SOUND_RATE for at in loud[begins]]


@pytest.mark.parametrize("kind", list(CODECS))
@pytest.mark.parametrize(("fps", "rate"), [(8, 24_000), (24, 44_100), (30, 48_000)])
def test_sound_is_in_time_with_the_frames_and_as_long(tmp_path: Path, kind: OutputFormat, fps: int, rate: int) -> None:
    """Whatever rate the engine has; the track ends with the last frame."""
    num_frames, at = 33, (0, 9, 25)
    film = write(tmp_path / "film", kind, [(num_frames, beats(num_frames, fps, rate, at))], fps)
    codec, samples = heard(film)
    assert codec == CODECS[kind][1]
    assert abs(len(samples) / SOUND_RATE - num_frames / fps) < 0.02
    assert onsets(samples) == pytest.approx([frame / fps for frame in at], abs=CLOSE_S)
    left, right = (np.abs(samples[:, side].astype(int)).max() for side in (0, 1))
    assert right == pytest.approx(left / 4, rel=0.2)
    with av.open(io.BytesIO(film)) as container:
        (pictures,) = container.streams.video
        assert pictures.codec_context.name == CODECS[kind][0]
        times = [frame.pts * frame.time_base for frame in container.decode(pictures)]  # type: ignore[operator]
        assert float(max(abs(time - Fraction(number, fps)) for number, time in enumerate(times))) <= 0.001
        assert len(times) == num_frames
        assert container.duration is not None
        assert container.duration / 1e6 == pytest.approx(num_frames / fps, abs=0.02)


@pytest.mark.parametrize("kind", list(CODECS))
def test_parts_with_other_rates_and_without_sound_stay_in_time(tmp_path: Path, kind: OutputFormat) -> None:
    """As in a film that is continued: what has no sound is silent, and what follows is where it belongs."""
    parts = [(17, beats(17, 16, 48_000, (4,))), (16, None), (16, beats(16, 16, 24_000, (8,)))]
    _, samples = heard(write(tmp_path / "film", kind, parts, 16))
    assert onsets(samples) == pytest.approx([4 / 16, (17 + 16 + 8) / 16], abs=CLOSE_S)
    assert abs(len(samples) / SOUND_RATE - 49 / 16) < 0.02


@pytest.mark.parametrize("kind", list(CODECS))
def test_the_same_frames_and_sound_give_the_same_bytes(tmp_path: Path, kind: OutputFormat) -> None:
    """However they are divided."""
    parts = [(17, beats(17, 16, 24_000, (4,)))]
    assert write(tmp_path / "a", kind, parts, 16) == write(tmp_path / "b", kind, parts, 16)


@pytest.mark.parametrize("kind", list(CODECS))
def test_the_sound_of_a_film_is_read_again(tmp_path: Path, kind: OutputFormat) -> None:
    """For the video that continues it; by this process and by one that decodes for strangers."""
    film = write(tmp_path / "film", kind, [(33, beats(33, 16, 24_000, (0, 20)))], 16)
    opened = open_film(film)
    own = opened.sound()
    assert own is not None
    assert (opened.notes, own.rate, own.samples.shape) == (
        (),
        SOUND_RATE,
        (round(opened.shape.seconds * SOUND_RATE), 2),
    )
    assert onsets(own.samples) == pytest.approx([0, 20 / 16], abs=CLOSE_S)
    decoders = Decoders(InputSettings())
    try:
        with decoders.for_film() as decoder:
            other = decoder.open_film(film).sound()
    finally:
        decoders.stop()
    assert other is not None
    assert np.array_equal(own.samples, other.samples)


def test_a_film_without_sound_has_none(tmp_path: Path) -> None:
    """Not a silent one."""
    writer = open_writer("mp4", tmp_path / "film", Size(width=64, height=48), 8, {})
    writer.add(moving_square(3, width=64, height=48))
    writer.close()
    opened = open_film((tmp_path / "film").read_bytes())
    assert (opened.has_sound, opened.sound()) == (False, None)


def test_damaged_sound_is_silent_from_there_on(tmp_path: Path) -> None:
    """The pictures are not refused for it."""
    film = bytearray(write(tmp_path / "film", "mp4", [(33, beats(33, 16, 24_000, (0, 20)))], 16))
    with av.open(io.BytesIO(film)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.size]
    for at, size in places[len(places) // 2 :]:
        film[at : at + size] = b"\xff" * size
    opened = open_film(bytes(film))
    sound = opened.sound()
    assert sound is not None
    assert len(sound.samples) == round(opened.shape.seconds * SOUND_RATE)
    assert onsets(sound.samples[: SOUND_RATE // 2]) == pytest.approx([0], abs=CLOSE_S)
    assert not sound.samples[-SOUND_RATE // 4 :].any()
