"""One video to one file, without a service: what ``kinema generate`` runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from av.error import FFmpegError

from kinema.engines.base import Engine, Frames, Output, UInt8Array
from kinema.errors import EngineFailed, InvalidRequest, StorageUnavailable
from kinema.manifest import InputFile, Manifest, input_files
from kinema.media.film import InputFilm, open_film
from kinema.media.images import cover, open_image
from kinema.media.mp4 import Mp4Writer, encoder_facts
from kinema.media.planes import size_of
from kinema.request.capabilities import Capabilities
from kinema.request.options import GenerationOptions
from kinema.request.resolve import Resolved, resolve


@dataclass(frozen=True)
class Prepared:
    """A complete request with its first frame (h, w, 3) uint8, or the film to edit (f, h, w, 3) uint8; None without.

    ``older`` is the film that goes before the new one, whose first frame is the older one's last. ``files`` says what
    came with the request.
    """

    resolved: Resolved
    image: UInt8Array | None = None
    video: UInt8Array | None = None
    older: InputFilm | None = None
    files: tuple[InputFile, ...] = ()


def prepare(
    can: Capabilities,
    options: GenerationOptions,
    image: bytes | None = None,
    video: Path | None = None,
    *,
    is_continuing: bool = False,
) -> Prepared:
    """Check the options against the model and bring the image or the film to the video's size. Raises RequestError.

    ``video`` is edited, or continued.
    """
    if image is not None and video is not None:
        raise InvalidRequest("input_reference and video exclude each other; an edit begins with the video alone")
    if video is not None and is_continuing:
        return _prepare_extension(can, options, video)
    if video is not None:
        return _prepare_edit(can, options, video)
    if image is None:
        return Prepared(resolve(options, can))
    opened = open_image(image)
    resolved = resolve(options, can, opened.size)
    fitted = opened.fit(resolved.request.size)
    return Prepared(_noted(resolved, fitted.note), image=fitted.pixels, files=input_files(first_frame=fitted.pixels))


def _prepare_edit(can: Capabilities, options: GenerationOptions, path: Path) -> Prepared:
    film = open_film(path)
    resolved = resolve(options, can, edits=film.shape)
    request = resolved.request
    fitted = film.fit(request.size, request.fps, request.num_frames)
    files = input_files(edits=path.read_bytes())
    return Prepared(_noted(resolved, fitted.note), video=fitted.frames, files=files)


def _prepare_extension(can: Capabilities, options: GenerationOptions, path: Path) -> Prepared:
    film = open_film(path)
    resolved = resolve(options, can, continues=film.shape)
    first = cover(film.last_frame(), resolved.request.size)
    files = input_files(first_frame=first, continues=path.read_bytes())
    return Prepared(resolved, image=first, older=film, files=files)


def _noted(resolved: Resolved, note: str | None) -> Resolved:
    return resolved.model_copy(update={"warnings": (*resolved.warnings, note)}) if note else resolved


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; the file takes the place of ``path`` when the block ends without an error.

    Until then ``path`` is not touched, and on an error or Ctrl-C nothing new is left. Raises InvalidRequest when
    ``path`` cannot be the name of a film, StorageUnavailable when it cannot be written.
    """
    if path.suffix.lower() != ".mp4":
        raise InvalidRequest(f"--output {path}: what is written is MP4; give a name that ends in .mp4", param="output")
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise InvalidRequest(f"--output {path} is not a file; give the name of one, old or new", param="output")
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".kinema-", dir=target.parent) as folder:
            unfinished = Path(folder) / target.name
            yield unfinished
            os.replace(unfinished, target)
    except (OSError, FFmpegError) as exc:
        raise StorageUnavailable(f"--output {path} cannot be written: {exc.strerror or exc}") from exc


def generate_file(engine: Engine, prepared: Prepared, path: Path, on_output: Callable[[Output], None]) -> float:
    """Write the video to ``path`` as MP4 and return the seconds it took; no file is left when it fails.

    ``engine`` is loaded. ``on_output`` sees every step and every chunk of frames as it comes.
    """
    started = time.perf_counter()
    request = prepared.resolved.request
    tags = Manifest.of(request, prepared.files, engine.facts, encoder_facts()).tags
    with closing(_frames(engine, prepared, on_output)) as frames:
        first = next(frames, None)
        if first is None:
            raise EngineFailed("The engine ended without a frame.")
        size = size_of(first)
        writer = Mp4Writer(path, width=size.width, height=size.height, fps=request.fps, metadata=tags)
        try:
            for chunk in chain([first], frames):
                writer.add(chunk)
            writer.close()
        except BaseException:
            writer.abort()
            raise
    return time.perf_counter() - started


def _frames(
    engine: Engine, prepared: Prepared, on_output: Callable[[Output], None]
) -> Generator[UInt8Array, None, None]:
    """The older film, if there is one, and the new frames without the one that both have."""
    request, num_doubled = prepared.resolved.request, 0
    if prepared.older is not None:
        num_doubled = 1
        for pixels in prepared.older.frames(request.size, request.fps):
            yield pixels[None]
    for output in engine.generate(request, prepared.image, prepared.video):
        if isinstance(output, Frames):
            yield output.data[num_doubled:]
            num_doubled = 0
        on_output(output)
