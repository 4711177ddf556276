"""The inputs of a request: pictures and films of control, or a video to extend or to edit.

They are checked and fitted before the job exists or the engine is loaded. A service stores them once, whatever number
of jobs use them; a command hands them to the engine itself. All of it blocks, so a service calls it in a thread, with a
decoder in another process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from kinema.errors import InvalidRequest
from kinema.ids import JobId
from kinema.manifest import InputFile, input_files
from kinema.media.decoders import Decoder, Film, OwnProcess, Picture
from kinema.media.film import rate_note
from kinema.media.images import FIRST_FRAME, LAST_FRAME, UInt8Array, cover, encode_png, fit_note
from kinema.request.capabilities import Capabilities
from kinema.request.formats import WITH_SOUND
from kinema.request.options import GenerationOptions, Given
from kinema.request.request import GenerationRequest
from kinema.request.resolve import Others, Resolved, resolve
from kinema.request.shapes import FilmShape, Size

if TYPE_CHECKING:
    from kinema.storage import Storage

_OWN_PROCESS = OwnProcess()
_FILM_TYPE = "application/octet-stream"
# Stands for a film that the model does not take, which is refused without being read.
_UNREAD = (FilmShape(Size(width=1, height=1), 1, Fraction(1), Fraction(1)),)
# Networks see squares of 16 pixels or less, and a picture that is narrower is none.
_MIN_REFERENCE_SIDE = 16
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
    last frame of the video to extend. ``continues`` and ``edits`` are the unchanged bytes of a video file, as are those
    of ``control_video``. ``reference_images`` (h, w, 3) have shapes of their own, and ``conditioning`` the request's.
    """

    request: GenerationRequest
    warnings: tuple[str, ...]
    first_frame: UInt8Array | None = None
    last_frame: UInt8Array | None = None
    continues: bytes | None = None
    edits: bytes | None = None
    control_video: tuple[bytes, ...] = ()
    reference_images: tuple[UInt8Array, ...] = ()
    conditioning: tuple[UInt8Array, ...] = ()

    def older_film(self) -> Film | None:
        """The video to extend; its frames are decoded in this process, when they are needed."""
        return None if self.continues is None else _OWN_PROCESS.open_film(self.continues)

    def edited_frames(self) -> UInt8Array | None:
        """The video to edit, (f, h, w, 3) uint8 RGB in the request's size and length. Raises InvalidRequest."""
        return None if self.edits is None else self._fitted(self.edits)

    def control_frames(self) -> tuple[UInt8Array, ...]:
        """The films of control, each as ``edited_frames``. Raises InvalidRequest."""
        return tuple(map(self._fitted, self.control_video))

    def _fitted(self, film: bytes) -> UInt8Array:
        request = self.request
        return _OWN_PROCESS.open_film(film).fit(request.size, request.fps, request.num_frames).frames

    def described(self) -> tuple[InputFile, ...]:
        """The inputs by their digests, as a manifest names them."""
        return input_files(
            first_frame=self.first_frame,
            last_frame=self.last_frame,
            continues=self.continues,
            edits=self.edits,
            control_video=self.control_video,
            reference_images=self.reference_images,
            conditioning=self.conditioning,
        )

    def files(self) -> Iterator[InputData]:
        """The files that a worker needs, made as they are asked for."""
        for field, picture in self._pictures:
            yield InputData(field, encode_png(picture), "image/png")
        for field, film in self._films:
            yield InputData(field, film, _FILM_TYPE)

    def store(self, storage: Storage, job_id: JobId) -> GenerationRequest:
        """Store the files under the job's id, and return the request with their keys. Raises StorageUnavailable.

        This is for a worker without a job database; ``service/stored_inputs.py`` lets jobs share files.
        """
        return self.request.with_keys(self._stored(storage, job_id))

    def _stored(self, storage: Storage, job_id: JobId) -> Iterator[tuple[str, str]]:
        """Store each file, and yield the request's field for it and its key."""
        for file, (field, key) in zip(self.files(), self.keys(job_id), strict=True):
            yield field, storage.put_bytes(key, file.data, file.media_type).key

    def keys(self, job_id: JobId) -> Sequence[tuple[str, str]]:
        """The field of each file that ``store`` stores, and its key."""
        # Slow to import, and `kinema generate` stores none.
        from kinema.storage import film_key, image_key, last_frame_key, other_input_key  # noqa: PLC0415

        own = {"image_key": image_key, "last_frame_key": last_frame_key, "continues_key": film_key}
        make = own | {"edits_key": film_key}
        fields = [field for field, _ in (*self._pictures, *self._films)]
        return [
            (field, make[field](job_id) if field in make else other_input_key(job_id, number))
            for number, field in enumerate(fields)
        ]

    @property
    def _pictures(self) -> Sequence[tuple[str, UInt8Array]]:
        """The pictures with the request's fields for them."""
        pictures = (
            ("image_key", self.first_frame),
            ("last_frame_key", self.last_frame),
            *(("reference_image_keys", picture) for picture in self.reference_images),
            *(("conditioning_keys", picture) for picture in self.conditioning),
        )
        return [(field, picture) for field, picture in pictures if picture is not None]

    @property
    def _films(self) -> Sequence[tuple[str, bytes]]:
        """The films with the request's fields for them."""
        films = (
            ("continues_key", self.continues),
            ("edits_key", self.edits),
            *(("control_video_keys", film) for film in self.control_video),
        )
        return [(field, film) for field, film in films if film is not None]


def prepare(given: Given, options: GenerationOptions, can: Capabilities, decoder: Decoder = _OWN_PROCESS) -> Prepared:
    """Check the options against the model, and fit the inputs to the video's size. ``decoder`` reads what was given.

    Raises RequestError for an input that cannot be read or that the model cannot use.
    """
    if given.continues is not None:
        return _continue(given.continues, options, can, decoder)
    if given.edits is not None:
        return _edit(given.edits, options, can, decoder)
    return _begin_with(given, options, can, decoder)


def read_back(storage: Storage, request: GenerationRequest) -> Given:
    """The inputs of an earlier job. Raises FileGone, StorageUnavailable."""
    if request.continues_key is not None:
        return Given(continues=_read(storage, request.continues_key))
    if request.edits_key is not None:
        return Given(edits=_read(storage, request.edits_key))
    keys = request.image_key, request.last_frame_key
    image, last_frame = (None if key is None else _read(storage, key) for key in keys)
    lists = (request.control_video_keys, request.reference_image_keys, request.conditioning_keys)
    films, references, frames = ([_read(storage, key) for key in some] for some in lists)
    return Given(
        image=image,
        last_frame=last_frame,
        control_video=tuple(films),
        reference_images=tuple(references),
        conditioning=tuple(zip(request.conditioning_frames, frames, strict=True)),
    )


def _begin_with(given: Given, options: GenerationOptions, can: Capabilities, decoder: Decoder) -> Prepared:
    films = [_open_control(film, decoder) for film in given.control_video if can.control_videos]
    opened = None if given.image is None else decoder.open_image(given.image, FIRST_FRAME)
    others = Others(
        control_videos=tuple(film.shape for film in films)
        if can.control_videos
        else _UNREAD * len(given.control_video),
        num_reference_images=len(given.reference_images),
        conditioning_frames=tuple(frame for frame, _ in given.conditioning),
        has_audio=given.audio is not None,
    )
    image_size = None if opened is None else opened.size
    resolved = resolve(options, can, image_size, has_last_frame=given.last_frame is not None, others=others)
    request = resolved.request
    # A decoder has one picture at a time, so each is fitted before the next is opened.
    first = None if opened is None else opened.fit(request.size)
    notes = [*(note for film in films for note in _control_notes(film, request))]
    notes += [] if opened is None or first is None else [*opened.notes, first.note]

    def fitted(data: bytes, field: str) -> UInt8Array:
        picture = decoder.open_image(data, field)
        made = picture.fit(request.size)
        notes.extend((*picture.notes, made.note))
        return made.pixels

    last = None if given.last_frame is None else fitted(given.last_frame, LAST_FRAME)
    frames = tuple(fitted(data, f"conditioning[{frame}]") for frame, data in given.conditioning)
    references = tuple(
        _within(decoder.open_image(data, name := f"reference_images[{number}]"), request, name)
        for number, data in enumerate(given.reference_images)
    )
    return Prepared(
        request,
        _with_note(resolved, *notes),
        None if first is None else first.pixels,
        last,
        control_video=given.control_video,
        reference_images=references,
        conditioning=frames,
    )


def _open_control(data: bytes, decoder: Decoder) -> Film:
    """Raises InvalidRequest, which names the field."""
    try:
        return decoder.open_film(data)
    except InvalidRequest as exc:
        raise InvalidRequest(f"control_video: {exc.message}", param="control_video") from exc


def _within(picture: Picture, request: GenerationRequest, name: str) -> UInt8Array:
    """The picture in its own shape, made smaller where it is larger than the video. Raises InvalidRequest for one that
    is too narrow then."""
    size = picture.size
    scale = min(request.width / size.width, request.height / size.height, 1.0)
    made = Size(width=max(round(size.width * scale), 1), height=max(round(size.height * scale), 1))
    if min(made.width, made.height) < _MIN_REFERENCE_SIDE:
        becomes = f", which becomes {made} in a video of {request.size}" if scale < 1 else ""
        raise InvalidRequest(
            f"{name} is {size}{becomes}; a picture whose sides are {_MIN_REFERENCE_SIDE} or more there is accepted",
            param=name,
        )
    return picture.fit(made).pixels


def _control_notes(film: Film, request: GenerationRequest) -> tuple[str | None, ...]:
    unheard = "the sound of control_video was left out" if film.has_sound else None
    return (*_film_notes(film, request), unheard)


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
