"""What comes with a request: a first frame, a film to continue, or a film to edit.

Checked and fitted before the job exists, stored under its id, and taken away again when the job is refused. All of it
blocks, and a decoded image may be large: callers run it in a thread, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from kinema.errors import StorageUnavailable
from kinema.ids import JobId
from kinema.media.film import InputFilm, open_film
from kinema.media.images import cover, encode_png, fit_note, open_image
from kinema.request.capabilities import Capabilities
from kinema.request.options import GenerationOptions, Given
from kinema.request.request import GenerationRequest
from kinema.request.resolve import Resolved, resolve
from kinema.storage import Storage, film_key, image_key

_FILM_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class _File:
    """A file to be stored, and the request's field that names it then."""

    field: str
    key: Callable[[JobId], str]
    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """The complete request, a sentence for each adjustment, and the files that go with it."""

    request: GenerationRequest
    warnings: tuple[str, ...]
    files: tuple[_File, ...] = ()

    def store(self, storage: Storage, job_id: JobId) -> GenerationRequest:
        """The request with the keys of its files, which are stored then. Raises StorageUnavailable."""
        keys = {file.field: storage.put_bytes(file.key(job_id), file.data, file.media_type).key for file in self.files}
        return self.request.model_copy(update=keys)


def prepare(given: Given, options: GenerationOptions, can: Capabilities) -> Prepared:
    """Raises RequestError for an input that cannot be read, or that the model makes nothing of."""
    if given.continues is not None:
        return _continue(open_film(given.continues), given.continues, options, can)
    if given.edits is not None:
        return _edit(open_film(given.edits), given.edits, options, can)
    if given.image is not None:
        return _begin_with(given.image, options, can)
    resolved = resolve(options, can)
    return Prepared(resolved.request, resolved.warnings)


def read_back(storage: Storage, request: GenerationRequest) -> Given:
    """What an earlier job was given. Raises FileGone, StorageUnavailable."""
    if request.continues_key is not None:
        return Given(continues=_read(storage, request.continues_key))
    if request.edits_key is not None:
        return Given(edits=_read(storage, request.edits_key))
    if request.image_key is not None:
        return Given(image=_read(storage, request.image_key))
    return Given()


def drop(storage: Storage, request: GenerationRequest) -> None:
    """Take the files of a refused job away; what stays is nobody's, and is swept up later."""
    for key in (request.image_key, request.continues_key, request.edits_key):
        if key is not None:
            with suppress(StorageUnavailable):
                storage.delete(key)


def _begin_with(image: bytes, options: GenerationOptions, can: Capabilities) -> Prepared:
    opened = open_image(image)
    resolved = resolve(options, can, opened.size)
    fitted = opened.fit(resolved.request.size)
    first = _File("image_key", image_key, encode_png(fitted.pixels), "image/png")
    return Prepared(resolved.request, _with_note(resolved, fitted.note), (first,))


def _continue(film: InputFilm, data: bytes, options: GenerationOptions, can: Capabilities) -> Prepared:
    """An image-to-video request that begins with the film's last frame."""
    resolved = resolve(options, can, continues=film.shape)
    size, fps = resolved.request.size, resolved.request.fps
    last = _File("image_key", image_key, encode_png(cover(film.last_frame(), size)), "image/png")
    older = _File("continues_key", film_key, data, _FILM_TYPE)
    request = resolved.request.model_copy(update={"continues_frames": film.shape.num_frames_at(fps)})
    return Prepared(request, _with_note(resolved, fit_note("video", film.shape.size, size)), (last, older))


def _edit(film: InputFilm, data: bytes, options: GenerationOptions, can: Capabilities) -> Prepared:
    resolved = resolve(options, can, edits=film.shape)
    note = fit_note("video", film.shape.size, resolved.request.size)
    return Prepared(resolved.request, _with_note(resolved, note), (_File("edits_key", film_key, data, _FILM_TYPE),))


def _with_note(resolved: Resolved, note: str | None) -> tuple[str, ...]:
    return (*resolved.warnings, note) if note else resolved.warnings


def _read(storage: Storage, key: str) -> bytes:
    return b"".join(storage.read(key))
