"""Reads the inputs of a task from storage before its turn on the device. All of it blocks.

First and last frames are PNGs that the service made, so they are decoded here. A film is as its client sent it, and
nobody has decoded all frames of one that is edited: that happens in a process of its own, whose crash ends one job and
not the worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kinema.engines.base import Inputs, UInt8Array
from kinema.errors import InvalidRequest
from kinema.manifest import InputFile, input_files
from kinema.media.film import Frames
from kinema.media.images import decode_png
from kinema.media.sound import Sound
from kinema.request.request import GenerationRequest
from kinema.request.shapes import FilmShape, Size
from kinema.storage import Storage
from kinema.worker.film_decoders import FilmDecoders
from kinema.worker.storage_retries import StorageRetries


@dataclass(frozen=True, slots=True)
class TaskInputs:
    """The inputs of a task.

    ``inputs`` are for the engine. The frames of the video to extend, if there is one, are decoded when they are needed.
    ``files`` describes the inputs for the manifest.
    """

    inputs: Inputs
    older: Frames | None
    files: tuple[InputFile, ...]


@dataclass(frozen=True, slots=True)
class _StoredFilm:
    """A film that is decoded when its frames are asked for, from the beginning each time, by one of ``decoders``."""

    data: bytes
    shape: FilmShape
    decoders: FilmDecoders

    def frames(self, size: Size, fps: int, num_frames: int | None = None) -> Iterator[UInt8Array]:
        with self.decoders.for_stored_film() as decoder:
            yield from decoder.open_film(self.data).frames(size, fps, num_frames)

    def sound(self) -> Sound | None:
        with self.decoders.for_stored_film() as decoder:
            return decoder.open_film(self.data).sound()


def read_inputs(
    request: GenerationRequest, storage: Storage, retries: StorageRetries, decoders: FilmDecoders
) -> TaskInputs:
    """Read and decode the inputs.

    Raises FileGone, StorageUnavailable, InvalidRequest, DecoderUnavailable.
    """

    def read(key: str) -> bytes:
        return retries(lambda: b"".join(storage.read(key)))

    def maybe(key: str | None) -> bytes | None:
        return None if key is None else read(key)

    first_frame = _frame(maybe(request.image_key), request)
    last_frame = _frame(maybe(request.last_frame_key), request)
    edits, continues = maybe(request.edits_key), maybe(request.continues_key)
    control = tuple(map(read, request.control_video_keys))
    references = tuple(decode_png(read(key)) for key in request.reference_image_keys)
    frames = tuple(_picture(read(key), request) for key in request.conditioning_keys)
    return TaskInputs(
        Inputs(
            first_frame,
            last_frame,
            film=None if edits is None else _film(edits, request, decoders),
            control_video=tuple(_film(film, request, decoders) for film in control),
            reference_images=references,
            conditioning=tuple(zip(request.conditioning_frames, frames, strict=True)),
        ),
        older=_older(continues, decoders),
        files=input_files(
            first_frame=first_frame,
            last_frame=last_frame,
            continues=continues,
            edits=edits,
            control_video=control,
            reference_images=references,
            conditioning=frames,
        ),
    )


def _frame(data: bytes | None, request: GenerationRequest) -> UInt8Array | None:
    return None if data is None else _picture(data, request)


def _picture(data: bytes, request: GenerationRequest) -> UInt8Array:
    image = decode_png(data)
    if image.shape[:2] != (request.height, request.width):
        raise InvalidRequest(f"a stored frame is {image.shape[1]}x{image.shape[0]}, not {request.size}")
    return image


def _film(data: bytes, request: GenerationRequest, decoders: FilmDecoders) -> UInt8Array:
    """All frames are taken at once, so the limits of a film hold for them too."""
    with decoders.for_film() as decoder:
        return decoder.open_film(data).fit(request.size, request.fps, request.num_frames).frames


def _older(data: bytes | None, decoders: FilmDecoders) -> Frames | None:
    if data is None:
        return None
    with decoders.for_stored_film() as decoder:
        return _StoredFilm(data, decoder.open_film(data).shape, decoders)
