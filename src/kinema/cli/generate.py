"""One video to one file, without a service: what ``kinema generate`` and ``kinema replay`` run."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path

from av.error import FFmpegError

from kinema.engines.base import Engine, Frames, Inputs, Output, UInt8Array
from kinema.errors import EngineFailed, InvalidRequest, StorageUnavailable
from kinema.files import replacing
from kinema.inputs import Prepared
from kinema.manifest import Manifest
from kinema.media.planes import size_of
from kinema.media.sound import Sound, sound_of_frames
from kinema.media.writers import encoder_facts, open_writer
from kinema.request.formats import MEDIA_TYPES, WITH_SOUND, OutputFormat


def kind_of(path: Path) -> OutputFormat:
    """The kind of video that a file of this name is. Raises InvalidRequest."""
    for kind in MEDIA_TYPES:
        if path.suffix.lower() == f".{kind}":
            return kind
    endings = ", ".join(f".{kind}" for kind in MEDIA_TYPES)
    raise InvalidRequest(
        f"--output {path}: no kind of video has this name; give one that ends in {endings}", param="output"
    )


@contextmanager
def saved_film(path: Path, kind: OutputFormat | None = None) -> Iterator[Path]:
    """A path to write a video to, which takes the place of ``path`` when the block ends without an error.

    Raises InvalidRequest when ``path`` cannot be the name of a video, or not of this kind, StorageUnavailable when it
    cannot be written.
    """
    named = kind_of(path)
    if kind not in (None, named):
        raise InvalidRequest(
            f"--output {path}: the video is of the kind {kind}; give a name that ends in .{kind}", param="output"
        )
    try:
        if path.exists() and not path.is_file():
            raise InvalidRequest(f"--output {path} is not a file; give the name of one, old or new", param="output")
        with replacing(path) as unfinished:
            yield unfinished
    except (OSError, FFmpegError) as exc:
        raise StorageUnavailable(f"--output {path} cannot be written: {exc.strerror or exc}") from exc


def generate_file(engine: Engine, prepared: Prepared, path: Path, on_output: Callable[[Output], None]) -> float:
    """Write the video to ``path``, in the request's kind, and return the seconds it took; no file is left when it
    fails.

    ``engine`` is loaded. ``on_output`` sees every step and every chunk of frames as it comes.
    """
    started = time.perf_counter()
    request = prepared.request
    kind = request.output_format
    tags = Manifest.of(request, prepared.described(), engine.facts, encoder_facts(kind)).tags
    with closing(_chunks(engine, prepared, on_output)) as chunks:
        first = next(chunks, None)
        if first is None:
            raise EngineFailed("The engine ended without a frame.")
        has_sound = kind in WITH_SOUND and (engine.capabilities.has_sound or first[1] is not None)
        writer = open_writer(kind, path, size_of(first[0]), request.fps, tags, has_sound=has_sound)
        try:
            for frames, sound in chain([first], chunks):
                writer.add(frames, sound)
            writer.close()
        except BaseException:
            writer.abort()
            raise
    return time.perf_counter() - started


def _chunks(
    engine: Engine, prepared: Prepared, on_output: Callable[[Output], None]
) -> Generator[tuple[UInt8Array, Sound | None], None, None]:
    """Yield the frames of the film to continue, if any, then the new frames without the one that both share; each with
    what is heard meanwhile."""
    request, num_doubled = prepared.request, 0
    older = prepared.older_film()
    if older is not None:
        num_doubled, heard = 1, older.sound()
        for number, pixels in enumerate(older.frames(request.size, request.fps)):
            yield pixels[None], None if heard is None else sound_of_frames(heard, number, number + 1, request.fps)
    inputs = Inputs(
        prepared.first_frame,
        prepared.last_frame,
        prepared.edited_frames(),
        loras=engine.read_loras(request),
        control_video=prepared.control_frames(),
        reference_images=prepared.reference_images,
        conditioning=tuple(zip(request.conditioning_frames, prepared.conditioning, strict=True)),
    )
    for output in engine.generate(request, inputs):
        if isinstance(output, Frames):
            sound = output.sound
            if num_doubled and sound is not None:
                sound = sound_of_frames(sound, num_doubled, len(output.data), request.fps)
            yield output.data[num_doubled:], sound
            num_doubled = 0
        on_output(output)
