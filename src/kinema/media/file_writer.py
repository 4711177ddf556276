"""What the writers of all kinds of video files share: frames in, in order, and a file that is whole or gone."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from kinema.errors import StorageUnavailable
from kinema.media.fragments import Packet
from kinema.media.live_view import LiveView
from kinema.media.patient_file import PatientFile, Repeat
from kinema.media.planes import as_yuv, check_even, check_frames, to_yuv
from kinema.media.sound import Sound
from kinema.media.soundtrack import Soundtrack
from kinema.request.shapes import Size

UInt8Array = npt.NDArray[np.uint8]


class FileWriter(ABC):
    """Takes frames and writes them to a file at ``path``. Not for several threads at once.

    The file exists from the start, but it is a video only after ``close``.
    """

    def __init__(
        self,
        path: Path,
        container: str,
        options: Mapping[str, str],
        size: tuple[int, int],
        fps: int | Fraction,
        metadata: Mapping[str, str] | None,
        repeat: Repeat | None,
    ) -> None:
        """``size`` is width and height; ``repeat`` repeats a write that finds no space. Raises ValueError when one side
        is odd."""
        width, height = size
        check_even(width, height)
        self._path = path
        self._size = Size(width=width, height=height)
        self._time_base = 1 / Fraction(fps)
        self._num_frames = 0
        self._reformatter = VideoReformatter()
        # bitexact omits library versions, dates and random ids, so that the same frames give the same bytes.
        self._file = None if repeat is None else PatientFile(path, repeat)
        options = {**options, "fflags": "+bitexact"}
        self._container = av.open(self._file or str(path), "w", format=container, options=options)
        self._container.metadata.update(metadata or {})
        self._sound: Soundtrack | None = None
        self._live: LiveView | None = None

    def add(self, frames: UInt8Array, sound: Sound | None = None) -> None:
        """Encode frames: RGB (f, h, w, 3) uint8, or planes (f, h * 3/2, w) as in ``planes.py``. ``sound`` is what is
        heard meanwhile, for a file that has sound.

        The encoder starts, and may delay some frames until later ones have come.
        Raises ValueError for another shape or type.
        """
        check_frames(frames, self._size)
        pictures: Iterable[av.VideoFrame] = map(self._picture, frames)
        if self._live is not None and self._live.encodes:
            pictures = self._live.add(list(pictures))
        # Muxing takes the data out of the packets.
        self._container.mux([packet for picture in pictures for packet in self._encode(picture)])
        if self._sound is not None:
            self._sound.add(sound, len(frames))

    def close(self) -> None:
        """Finish the file. Raises ValueError when no frame was added; then there is no file."""
        if not self._num_frames:
            self.abort()
            raise ValueError("a film needs at least one frame")
        if self._live is not None:
            self._live.close()
        self._container.mux(self._encode(None))
        if self._sound is not None:
            self._sound.close()
        self._container.close()
        self._close_file()

    def abort(self) -> None:
        """Give up and remove the file. May be called after an error, and twice."""
        # Closing writes the index, which may fail like the frames.
        with contextlib.suppress(av.error.FFmpegError, OSError, StorageUnavailable):
            self._container.close()
        self._close_file()
        self._path.unlink(missing_ok=True)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    @abstractmethod
    def _encode(self, picture: av.VideoFrame | None) -> Sequence[Packet]:
        """Encode a picture; None ends the track."""

    def _picture(self, pixels: UInt8Array) -> av.VideoFrame:
        picture = to_yuv(pixels, self._reformatter) if pixels.ndim == 3 else as_yuv(pixels)
        picture.pts, picture.time_base = self._num_frames, self._time_base
        self._num_frames += 1
        return picture
