"""Encodes the sound of a video into its container, in time with the frames.

The track is as long as the frames are shown, to a sample: what is missing is silent, what is too long is cut.
"""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer

from kinema.media.sound import SOUND_RATE, Int16Array, Sound

# Bits a second of both channels; above what listeners tell from the original in most music (AAC), or in all (Opus).
_BIT_RATES = {"aac": 192_000, "libopus": 128_000}
_SILENCE = np.zeros((0, 2), np.int16)


class Soundtrack:
    """The sound of one container. ``codec`` is aac or libopus."""

    def __init__(self, container: OutputContainer, codec: str, fps: int | Fraction) -> None:
        self._container = container
        self._fps = Fraction(fps)
        stream = container.add_stream(codec, rate=SOUND_RATE, options={"flags": "+bitexact"})
        assert isinstance(stream, AudioStream), "both codecs are of sound"
        stream.codec_context.layout = "stereo"
        stream.bit_rate = _BIT_RATES[codec]
        stream.codec_context.time_base = Fraction(1, SOUND_RATE)
        self._stream = stream
        self._resampler: av.AudioResampler | None = None
        self._rate = 0
        self._num_frames = self._num_samples = 0
        # Resampled sound of the next frames: rounding may give a sample too early.
        self._early = _SILENCE

    def add(self, sound: Sound | None, num_frames: int) -> None:
        """Add what is heard while the next frames are shown; None for silence."""
        if self._resampler is not None and (sound is None or sound.rate != self._rate):
            self._end_resampling()
        if sound is not None and self._resampler is None:
            self._fill()
            self._resampler = av.AudioResampler(format="s16", layout="stereo", rate=SOUND_RATE)
            self._rate = sound.rate
        self._num_frames += num_frames
        if sound is None:
            self._fill()
        elif len(sound.samples):
            self._resample(_frame(sound.samples, sound.rate))

    def close(self) -> None:
        """Encode the rest, and make the track as long as the frames."""
        if self._resampler is not None:
            self._end_resampling()
        self._fill()
        self._container.mux(self._stream.encode(None))

    def _resample(self, frame: av.AudioFrame | None) -> None:
        assert self._resampler is not None, "it was made before"
        for resampled in self._resampler.resample(frame):
            self._encode(samples_of(resampled))

    def _end_resampling(self) -> None:
        self._resample(None)
        self._resampler = None

    def _fill(self) -> None:
        """Silence up to the end of the frames so far."""
        self._encode(np.zeros((max(self._num_missing - len(self._early), 0), 2), np.int16))
        self._early = _SILENCE

    def _encode(self, samples: Int16Array) -> None:
        """Encode what belongs to the frames so far, and keep the rest for the next ones."""
        samples = np.concatenate([self._early, samples])
        samples, self._early = samples[: self._num_missing], samples[self._num_missing :]
        if len(samples):
            frame = _frame(samples, SOUND_RATE)
            frame.pts, frame.time_base = self._num_samples, Fraction(1, SOUND_RATE)
            self._num_samples += len(samples)
            self._container.mux(self._stream.encode(frame))

    @property
    def _num_missing(self) -> int:
        """The samples to the end of the frames so far."""
        return max(round(self._num_frames * SOUND_RATE / self._fps) - self._num_samples, 0)


def samples_of(frame: av.AudioFrame) -> Int16Array:
    """The samples (n, 2) of a frame of two channels in 16 bits."""
    samples: Int16Array = frame.to_ndarray().astype(np.int16, copy=False).reshape(-1, 2)
    return samples


def _frame(samples: Int16Array, rate: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples).reshape(1, -1), format="s16", layout="stereo")
    frame.sample_rate = rate
    return frame
