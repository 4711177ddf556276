"""Reads the inputs of a task from storage before its turn on the device. All of it blocks."""

from __future__ import annotations

from dataclasses import dataclass

from kinema.engines.base import UInt8Array
from kinema.errors import InvalidRequest
from kinema.manifest import InputFile, input_files
from kinema.media.film import InputFilm, open_film
from kinema.media.images import decode_png
from kinema.request.request import GenerationRequest
from kinema.storage import Storage
from kinema.worker.storage_retries import StorageRetries


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a task; None for each that the request does not name.

    ``image``, the first frame, is (h, w, 3) uint8. The video to edit is (f, h, w, 3) uint8 in the request's size and
    length. The frames of the video to extend are decoded when they are needed. ``files`` describes the inputs for the
    manifest.
    """

    image: UInt8Array | None
    video: UInt8Array | None
    older: InputFilm | None
    files: tuple[InputFile, ...]


def read_inputs(request: GenerationRequest, storage: Storage, retries: StorageRetries) -> Inputs:
    """Read and decode the inputs. Raises FileGone, StorageUnavailable, InvalidRequest."""

    def read(key: str | None) -> bytes | None:
        return None if key is None else retries(lambda: b"".join(storage.read(key)))

    image = _image(read(request.image_key), request)
    edits, continues = read(request.edits_key), read(request.continues_key)
    return Inputs(
        image=image,
        video=_video(edits, request),
        older=_film(continues),
        files=input_files(first_frame=image, continues=continues, edits=edits),
    )


def _image(data: bytes | None, request: GenerationRequest) -> UInt8Array | None:
    if data is None:
        return None
    image = decode_png(data)
    if image.shape[:2] != (request.height, request.width):
        raise InvalidRequest(f"the stored first frame is {image.shape[1]}x{image.shape[0]}, not {request.size}")
    return image


def _video(data: bytes | None, request: GenerationRequest) -> UInt8Array | None:
    film = _film(data)
    return None if film is None else film.fit(request.size, request.fps, request.num_frames).frames


def _film(data: bytes | None) -> InputFilm | None:
    return None if data is None else open_film(data)
