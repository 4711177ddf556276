"""The sound of a video, as plain samples. Nothing is encoded or decoded here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int16Array = npt.NDArray[np.int16]

# The rate of every sound that is stored: AAC and Opus both take it, and film has used it for decades.
SOUND_RATE = 48_000


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """``samples`` (n, 2) int16 of the left and the right channel, ``rate`` of them a second."""

    samples: Int16Array
    rate: int


def num_samples_at(num_frames: int, fps: int, rate: int = SOUND_RATE) -> int:
    """The number of samples up to the end of that many frames."""
    return round(num_frames * rate / fps)


def sound_of_frames(sound: Sound, start: int, stop: int, fps: int) -> Sound:
    """The part that is heard while the frames from ``start`` to ``stop`` (exclusive) are shown."""
    first, last = (num_samples_at(frames, fps, sound.rate) for frames in (start, stop))
    return Sound(sound.samples[first:last], sound.rate)
