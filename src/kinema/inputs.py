"""The inputs of a request: a first frame, perhaps with a last one, a video to extend, or a video to edit.

They are checked and fitted before the job exists or the engine is loaded. A service stores them once, whatever number
of jobs use them; a command hands them to the engine itself. All of it blocks, so a service calls it in a thread, with a
decoder in another process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kinema.errors import InvalidRequest
from kinema.ids import JobId
from kinema.manifest import InputFile, input_files
from kinema.media.decoders import Decoder, Film, OwnProcess
from kinema.media.film import rate_note
from kinema.media.images import FIRST_FRAME, LAST_FRAME, UInt8Array, cover, encode_png, fit_note
from kinema.request.capabilities import Capabilities
from kinema.request.formats import WITH_SOUND
from kinema.request.options import GenerationOptions, Given
from kinema.request.request import GenerationRequest
from kinema.request.resolve import Resolved, resolve

if TYPE_CHECKING:
    from kinema.storage import Storage

_OWN_PROCESS = OwnProcess()
_FILM_TYPE = "application/octet-stream"
_UNHEARD = "the sound of the video was left out: the new video has none"


@dataclass(frozen=True, slots=True)
class InputData:
    """The bytes of an input, and the field of the request that names their file."""

    field: str
    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """The complete request, a sentence for each adjustment, and the inputs.

    ``first_frame`` and ``last_frame`` (h, w, 3) uint8 RGB have the request's size; the first is the given image, or the
    last frame of the video to extend. ``continues`` and ``edits`` are the unchanged bytes of a video file.
    """

    request: GenerationRequest
    warnings: tuple[str, ...]
    first_frame: UInt8Array | None = None
    last_frame: UInt8Array | None = None
    continues: bytes | None = None
    edits: bytes | None = None

    def older_film(self) -> Film | None:
        """The video to extend; its frames are decoded in this process, when they are needed."""
        return None if self.continues is None else _OWN_PROCESS.open_film(self.continues)

    def edited_frames(self) -> UInt8Array | None:
        """The video to edit, (f, h, w, 3) uint8 RGB in the request's size and length. Raises InvalidRequest."""
        if self.edits is None:
            return None
        request = self.request
        return _OWN_PROCESS.open_film(self.edits).fit(request.size, request.fps, request.num_frames).frames

    def described(self) -> tuple[InputFile, ...]:
        """The inputs by their digests, as a manifest names them."""
        return input_files(
            first_frame=self.first_frame, last_frame=self.last_frame, continues=self.continues, edits=self.edits
        )

    def files(self) -> Iterator[InputData]:
        """The files that a worker needs, made as they are asked for."""
        for field, picture in (("image_key", self.first_frame), ("last_frame_key", self.last_frame)):
            if picture is not None:
                yield InputData(field, encode_png(picture), "image/png")
        for field, film in (("continues_key", self.continues), ("edits_key", self.edits)):
            if film is not None:
                yield InputData(field, film, _FILM_TYPE)

    def store(self, storage: Storage, job_id: JobId) -> GenerationRequest:
        """Store the files under the job's id, and return the request with their keys. Raises StorageUnavailable.

        This is for a worker without a job database; ``service/stored_inputs.py`` lets jobs share files.
        """
        return self.request.model_copy(update=dict(self._stored(storage, job_id)))

    def _stored(self, storage: Storage, job_id: JobId) -> Iterator[tuple[str, str]]:
        """Store each file, and yield the request's field for it and its key."""
        # Slow to import, and `kinema generate` stores none.
        from kinema.storage import film_key, image_key, last_frame_key  # noqa: PLC0415

        key_of = {"image_key": image_key, "last_frame_key": last_frame_key}
        for file in self.files():
            key = key_of.get(file.field, film_key)(job_id)
            yield file.field, storage.put_bytes(key, file.data, file.media_type).key


def prepare(given: Given, options: GenerationOptions, can: Capabilities, decoder: Decoder = _OWN_PROCESS) -> Prepared:
    """Check the options against the model, and fit the inputs to the video's size. ``decoder`` reads what was given.

    Raises RequestError for an input that cannot be read or that the model cannot use.
    """
    if given.image is not None or given.last_frame is not None:
        return _begin_with(given, options, can, decoder)
    if given.continues is not None:
        return _continue(given.continues, options, can, decoder)
    if given.edits is not None:
        return _edit(given.edits, options, can, decoder)
    resolved = resolve(options, can)
    return Prepared(resolved.request, resolved.warnings)


def read_back(storage: Storage, request: GenerationRequest) -> Given:
    """The inputs of an earlier job. Raises FileGone, StorageUnavailable."""
    if request.continues_key is not None:
        return Given(continues=_read(storage, request.continues_key))
    if request.edits_key is not None:
        return Given(edits=_read(storage, request.edits_key))
    keys = request.image_key, request.last_frame_key
    image, last_frame = (None if key is None else _read(storage, key) for key in keys)
    return Given(image=image, last_frame=last_frame)


def _begin_with(given: Given, options: GenerationOptions, can: Capabilities, decoder: Decoder) -> Prepared:
    opened = None if given.image is None else decoder.open_image(given.image, FIRST_FRAME)
    image_size = None if opened is None else opened.size
    resolved = resolve(options, can, image_size, has_last_frame=given.last_frame is not None)
    assert opened is not None, "a last frame by itself is refused"
    size = resolved.request.size
    first = opened.fit(size)
    # A decoder has one picture at a time, so the second is opened when the first is there.
    second = None if given.last_frame is None else decoder.open_image(given.last_frame, LAST_FRAME)
    last = None if second is None else second.fit(size)
    notes = (*opened.notes, first.note, *(second.notes if second else ()), last.note if last else None)
    return Prepared(resolved.request, _with_note(resolved, *notes), first.pixels, None if last is None else last.pixels)


def _continue(data: bytes, options: GenerationOptions, can: Capabilities, decoder: Decoder) -> Prepared:
    """An image-to-video request that begins with the last frame of the video."""
    film = decoder.open_film(data)
    resolved = resolve(options, can, continues=film.shape)
    size, fps = resolved.request.size, resolved.request.fps
    request = resolved.request.model_copy(update={"continues_frames": film.shape.num_frames_at(fps)})
    if resolved.request.num_frames == 1:
        raise InvalidRequest("a single frame adds nothing to the video; ask for more", param="num_frames")
    warnings = _with_note(resolved, *_film_notes(film, resolved.request), _heard_note(film, request, can))
    return Prepared(request, warnings, cover(film.last_frame(), size), continues=data)


def _edit(data: bytes, options: GenerationOptions, can: Capabilities, decoder: Decoder) -> Prepared:
    film = decoder.open_film(data)
    resolved = resolve(options, can, edits=film.shape)
    unheard = "the sound of the video was left out: the new video has its own" if can.has_sound else _UNHEARD
    notes = (*_film_notes(film, resolved.request), unheard if film.has_sound else None)
    return Prepared(resolved.request, _with_note(resolved, *notes), edits=data)


def _heard_note(film: Film, request: GenerationRequest, can: Capabilities) -> str | None:
    """What becomes of the sound of a film that is continued."""
    if film.has_sound and request.output_format not in WITH_SOUND:
        return _UNHEARD
    if film.has_sound and not can.has_sound:
        return f"the new part is silent: {can.model} makes no sound"
    if can.has_sound and not film.has_sound and request.output_format in WITH_SOUND:
        return "the video that is continued has no sound, so its part is silent"
    return None


def _film_notes(film: Film, request: GenerationRequest) -> tuple[str | None, ...]:
    return (*film.notes, rate_note(film.shape, request.fps), fit_note("video", film.shape.size, request.size))


def _with_note(resolved: Resolved, *notes: str | None) -> tuple[str, ...]:
    return (*resolved.warnings, *(note for note in notes if note))


def _read(storage: Storage, key: str) -> bytes:
    return b"".join(storage.read(key))
